"""Drafts in named Ray actors, each with a part of the prompts: every process of a job finds them.

Needs Ray. The process that starts the shards holds on to their handles: an actor goes with the last
handle of the process that made it.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from spec_rollout.cache import RolloutCache
from spec_rollout.origins import with_origins
from spec_rollout.types import Drafts, FinishReason, Rollouts

# In a folder of files: which part it is, and of how many.
_FILE = re.compile(r"drafts_(\d+)_of_(\d+)\.cache")
# A step waits for drafts to be written, but not for ever: a folder may hang.
_SAVE_SECONDS = 600
# Steps for which it is remembered who was served: asynchronous trainers mix a few.
STEPS_REMEMBERED = 8


class Begun(NamedTuple):
    """A rollout's draft.

    Attributes:
        is_first: Whether nobody has asked for this sample in this step before.
        token_ids: [num_draft_tokens], int32; empty where there is none.
        logprobs: [num_draft_tokens], float32.
        noise_offset: Of the shard; see `RolloutSession`.
    """

    is_first: bool
    token_ids: np.ndarray
    logprobs: np.ndarray
    noise_offset: int


class Ended(NamedTuple):
    """What became of a draft.

    Attributes:
        accepted_len: Tokens of the draft that were kept, as far as the draft is still known.
        behaviour_logprobs: With which each token of the response was first drawn.
            [num_response_tokens], float32; None if not known.
    """

    accepted_len: int
    behaviour_logprobs: np.ndarray | None


class DraftShard:
    """The last rollouts of a part of the prompts. One thread calls it, Ray's.

    Args:
        max_bytes: Bound of what is kept; prompts used longest ago go first.
        path: File that `save` writes. What it holds already is there from the start; None saves
            nothing.
    """

    def __init__(self, max_bytes: int | None = None, path: str | None = None) -> None:
        self._cache = RolloutCache(max_bytes)
        self._path = path
        self._served: dict[int, set[tuple[bytes, int]]] = {}
        if path is not None:
            _check_parts(Path(path))
            if os.path.exists(path):
                self._cache.load(path)
        # The file may be another run's, whose steps had the same numbers and perhaps the same seed.
        self._noise_offset = self._cache.fingerprint()

    def begin(self, key: bytes, sample: int, step: int, max_tokens: int) -> Begun:
        """A rollout begins; what it may follow.

        Args:
            key: `prompt_key` of its prompt.
            sample: Its index within the prompt's group.
            step: Training step.
            max_tokens: Longest draft.
        """
        served = self._served.setdefault(step, set())
        is_first = (key, sample) not in served
        served.add((key, sample))
        for old in [old for old in self._served if old <= step - STEPS_REMEMBERED]:
            del self._served[old]
        drafts = self._cache.lookup([key], [sample], max_tokens=max_tokens)
        if not is_first or drafts.logprobs is None:
            drafts = Drafts.none(1)
        assert drafts.logprobs is not None
        return Begun(
            is_first, drafts.token_ids.numpy(), drafts.logprobs.numpy(), self._noise_offset
        )

    def end(
        self,
        key: bytes,
        sample: int,
        token_ids: np.ndarray,
        logprobs: np.ndarray,
        accepted_len: int,
        step: int,
    ) -> Ended:
        """A rollout is over, and the next draft of its sample.

        Args:
            key, sample, step: As in `begin`.
            token_ids: [num_response_tokens], int32, at least one.
            logprobs: [num_response_tokens], float32.
            accepted_len: Tokens that are those of the draft that `begin` gave.
        """
        ids = torch.from_numpy(np.array(token_ids, np.int32))
        drafts = Drafts.none(1)
        if accepted_len:
            drafts = self._cache.lookup([key], [sample], max_tokens=ids.numel())
        # An actor that came back may have an older one.
        accepted_len = min(accepted_len, common_prefix(drafts.token_ids.numpy(), token_ids))
        rollouts = Rollouts(
            prompt_ids=torch.zeros(1, dtype=torch.int32),  # the key says which
            cu_prompt_lens=torch.tensor([0, 1]),
            response_ids=ids,
            cu_response_lens=torch.tensor([0, ids.numel()]),
            logprobs=torch.from_numpy(np.array(logprobs, np.float32)),
            accepted_lens=torch.tensor([accepted_len], dtype=torch.int32),
            finish_reasons=torch.tensor([FinishReason.STOP], dtype=torch.uint8),
            policy_version=step,
        )
        rollouts = with_origins(rollouts, drafts)
        self._cache.store([key], [sample], rollouts)
        behaviour = rollouts.behaviour_logprobs
        return Ended(accepted_len, None if behaviour is None else behaviour.numpy())

    def save(self) -> None:
        """Writes what is kept to its file, if it has one."""
        if self._path is not None:
            Path(self._path).parent.mkdir(parents=True, exist_ok=True)
            self._cache.save(self._path)

    def info(self) -> dict[str, int]:
        """Counters of the cache."""
        stats = self._cache.stats
        return {
            "num_prompts": stats.num_groups,
            "num_samples": stats.num_samples,
            "num_bytes": stats.num_bytes,
            "num_evicted": stats.evictions,
        }


def common_prefix(draft: np.ndarray, response: np.ndarray) -> int:
    """Number of tokens with which both begin."""
    most = min(len(draft), len(response))
    differs = np.flatnonzero(draft[:most] != np.asarray(response)[:most])
    return int(differs[0]) if differs.size else most


def part_path(folder: str, part: int, count: int) -> str:
    """The file of one of `count` shards."""
    return os.path.join(folder, f"drafts_{part}_of_{count}.cache")


def _check_parts(path: Path) -> None:
    """Raises where other files lie beside a shard's that are parts of another number of shards:
    none of them would be read."""
    mine = _FILE.fullmatch(path.name)
    if mine is None or not path.parent.is_dir():
        return
    for other in sorted(path.parent.iterdir()):
        match = _FILE.fullmatch(other.name)
        if match is not None and int(match[2]) != int(mine[2]):
            raise ValueError(
                f"num_actors: expected {match[2]}, for whose drafts there is {other}, got "
                f"{mine[2]}: set num_actors={match[2]} to go on with them, or another folder"
            )


def start_shards(
    name: str, count: int, *, max_bytes: int | None = None, folder: str | None = None
) -> tuple[list[str], list[Any]]:
    """Starts actors in this Ray job.

    Args:
        name: That their names begin with.
        count: How many; each is asked for the prompts that fall to it.
        max_bytes: Of all together; None is no bound.
        folder: Of their files; None: nothing is saved.

    Returns:
        Names, and handles to be held on to.

    Raises:
        ValueError: if the folder holds the drafts of another number of actors.
    """
    import ray

    if folder is not None:  # here, too, where it is said plainly; an actor may see another disk
        _check_parts(Path(part_path(folder, 0, count)))

    names = [f"{name}_{i}" for i in range(count)]
    # An actor that dies comes back, with what it saved last.
    actor = ray.remote(num_cpus=0, max_restarts=-1)(DraftShard)
    handles = [
        actor.options(name=shard_name).remote(
            None if max_bytes is None else max_bytes // count,
            None if folder is None else part_path(folder, i, count),
        )
        for i, shard_name in enumerate(names)
    ]
    return names, handles


def save_shards(shards: Sequence[Any]) -> list[Exception]:
    """Has all shards write their files, and waits for them, ten minutes at most.

    Args:
        shards: Handles.

    Returns:
        What went wrong; a shard that fails keeps no other from writing.
    """
    import ray

    errors: list[Exception] = []
    saves = [shard.save.remote() for shard in shards]
    done, pending = ray.wait(saves, num_returns=len(saves), timeout=_SAVE_SECONDS)
    for saved in done:
        try:
            ray.get(saved)
        except Exception as error:
            errors.append(error)
    if pending:
        late = f"{len(pending)} of {len(saves)} actors have not answered in {_SAVE_SECONDS} seconds"
        errors.append(TimeoutError(late))
    return errors


class DraftPool:
    """The shards, as a process that generates sees them. Every call may raise what Ray raises.

    Args:
        names: Of the actors, as `start_shards` gave them.
        timeout: Seconds to wait for an answer.
    """

    def __init__(self, names: Sequence[str], timeout: float) -> None:
        self._names = list(names)
        self._timeout = timeout
        self._handles: dict[str, Any] = {}

    async def begin(self, key: bytes, sample: int, step: int, max_tokens: int) -> Begun:
        """See `DraftShard.begin`."""
        return await self._ask(key, "begin", key, sample, step, max_tokens)

    async def end(self, key: bytes, sample: int, *rest: Any) -> Ended:
        """See `DraftShard.end`."""
        return await self._ask(key, "end", key, sample, *rest)

    async def _ask(self, key: bytes, method: str, *args: Any) -> Any:
        import ray

        name = self._names[int.from_bytes(key[:8], "little") % len(self._names)]
        if name not in self._handles:
            self._handles[name] = ray.get_actor(name)
        call = getattr(self._handles[name], method).remote(*args)
        return await asyncio.wait_for(call, self._timeout)
