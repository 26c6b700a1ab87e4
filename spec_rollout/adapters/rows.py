"""Rows of a distributed trainer: which rollout each of them is, and rollouts that all ranks know.

Trainers hand out rows. The rows of a prompt may be spread over ranks, and come to other ranks in
the next epoch. What stays is the prompt's content and the row's number among the rows of that
prompt; `RolloutSession.rollout_rows` takes both.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from spec_rollout.cache import RolloutCache
from spec_rollout.types import Rollouts

Gather = Callable[[Any], list[Any]]
"""Takes this rank's object and returns those of all ranks, in their order. Collective."""


def alone(value: Any) -> list[Any]:
    """`Gather` of a single process."""
    return [value]


def row_user_key(data_source: object = "", item: object = "") -> str:
    """What keeps equal prompts apart that are not the same to the trainer.

    Args:
        data_source: Name of the data set.
        item: What names the row in it (an index, an id).

    Returns:
        The `user_key` of `spec_rollout.keys.prompt_key`; "" where both are "".
    """
    if data_source == "" and item == "":
        return ""
    return json.dumps([str(data_source), str(item)])


class RowNumbers:
    """The sample index of every row: sample k is the k-th of its prompt since the weights changed.

    Rows are counted over all ranks, in the order of ranks. So groups may straddle ranks, a prompt
    may stand twice in a batch, and a prompt that comes again before the weights change (gradient
    accumulation) goes on counting: no two rows that draw from the same policy have the same name.
    Neither the size of a group nor the order of the data matters, from one epoch to the next.

    Args:
        gather: Of the ranks that share the prompts.
        rank: Of this process among them.
    """

    def __init__(self, gather: Gather = alone, rank: int = 0) -> None:
        self._gather = gather
        self._rank = rank
        self._version: int | None = None
        self._counted: Counter[bytes] = Counter()

    def next(self, keys: Sequence[bytes], version: int) -> np.ndarray:
        """Numbers this rank's rows; every rank calls it at the same time, with no rows too.

        Args:
            keys: `prompt_key` of each row. Length batch.
            version: Says whether the weights are those of the last call: the optimizer step.

        Returns:
            Sample indices. [batch], int64.
        """
        if version != self._version:
            self._version = version
            self._counted.clear()
        mine: list[int] = []
        for rank, theirs in enumerate(self._gather(list(keys))):
            for key in theirs:
                if rank == self._rank:
                    mine.append(self._counted[key])
                self._counted[key] += 1
        return np.array(mine, np.int64)


@dataclass(frozen=True, slots=True)
class NamedRollouts:
    """What a rank generated, with the names under which the cache knows it.

    Attributes:
        keys: `prompt_key` of each row. Length batch.
        sample_ids: [batch], int64.
        rollouts: Of the rows.
    """

    keys: list[bytes]
    sample_ids: np.ndarray
    rollouts: Rollouts


def share(
    cache: RolloutCache,
    mine: Sequence[NamedRollouts],
    gather: Gather = alone,
    rank: int = 0,
) -> None:
    """Stores what the other ranks generated, so that a prompt finds its drafts on any rank.

    Every rank calls it at the same time. Each then holds the rollouts of all ranks in its own
    memory, which `RolloutCache(max_bytes=...)` bounds. If the caches of all ranks are over one
    store of several machines (`RolloutCache.is_shared`), they are there already: nothing is sent,
    and each rank waits until all have stored theirs.

    Args:
        cache: Of this rank; it holds this rank's rollouts already.
        mine: What this rank generated since the last call; may be empty.
        gather, rank: As of `RowNumbers`.
    """
    if cache.is_shared:
        cache.flush()
        gather([])
        return
    for other, theirs in enumerate(gather(list(mine))):
        if other != rank:
            for named in theirs:
                cache.store(named.keys, named.sample_ids, named.rollouts)


def split_rows(values: torch.Tensor, cu_lens: torch.Tensor) -> list[list[Any]]:
    """Packed values as a list per row, as trainers that take lists want them.

    Args:
        values: [num_tokens].
        cu_lens: Row r is values[cu_lens[r]:cu_lens[r + 1]]. [batch + 1], integer.
    """
    flat = values.tolist()
    return [flat[start:end] for start, end in pairwise(cu_lens.tolist())]
