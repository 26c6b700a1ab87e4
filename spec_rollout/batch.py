"""The rows of a rollout call: prompt, identity of the prompt, and sample index of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from spec_rollout.checks import integer, items, sample_indices
from spec_rollout.keys import TokenIds, prompt_key
from spec_rollout.packed import cu_lens_from
from spec_rollout.types import Drafts, History, RolloutRequests


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of a call: prompt, identity of the prompt, and sample index of each."""

    prompt_ids: torch.Tensor
    cu_prompt_lens: torch.Tensor
    keys: list[bytes]
    sample_ids: np.ndarray

    @property
    def size(self) -> int:
        return len(self.keys)

    def requests(
        self,
        keys: torch.Tensor,
        drafts: Drafts,
        history: History | None,
        expected_lens: torch.Tensor | None = None,
    ) -> RolloutRequests:
        return RolloutRequests(
            self.prompt_ids, self.cu_prompt_lens, keys, drafts, history, expected_lens
        )

    def expected_lens(self, cached: Drafts, max_tokens: int) -> torch.Tensor | None:
        """How long the responses may become: as long as they were, or, where that is not known, as
        the longest of the prompt's, or as may be. None if nothing is cached. [batch], int64."""
        if not cached.token_ids.numel():
            return None
        groups = self.groups
        longest = torch.zeros(int(groups.max()) + 1, dtype=torch.int64)
        longest.scatter_reduce_(0, groups, cached.lens, "amax")
        longest[longest == 0] = max_tokens
        return torch.where(cached.lens > 0, cached.lens, longest[groups])

    @property
    def groups(self) -> torch.Tensor:
        """Which rows are rollouts of the same prompt: equal numbers. [batch], int64."""
        numbers: dict[bytes, int] = {}
        return torch.tensor([numbers.setdefault(key, len(numbers)) for key in self.keys])

    @classmethod
    def of_prompts(
        cls, prompts: Sequence[TokenIds], num_samples: int, user_keys: Sequence[str | bytes] | None
    ) -> Batch:
        """Every prompt `num_samples` times in a row."""
        if integer("num_samples", num_samples) < 1:
            raise ValueError(f"num_samples: expected >= 1, got {num_samples}")
        arrays, keys = _identify(prompts, user_keys)
        first_ids = []
        seen: Counter[bytes] = Counter()
        for key in keys:
            first_ids.append(seen[key] * num_samples)
            seen[key] += 1
        lens = torch.tensor([array.size for array in arrays]).repeat_interleave(num_samples)
        rows = [array for array in arrays for _ in range(num_samples)]
        return cls(
            prompt_ids=torch.from_numpy(np.concatenate(rows)),
            cu_prompt_lens=cu_lens_from(lens),
            keys=[key for key in keys for _ in range(num_samples)],
            sample_ids=np.add.outer(np.array(first_ids), np.arange(num_samples)).ravel(),
        )

    @classmethod
    def of_rows(
        cls,
        prompts: Sequence[TokenIds],
        sample_ids: Sequence[int] | np.ndarray | torch.Tensor,
        user_keys: Sequence[str | bytes] | None,
    ) -> Batch:
        """Rows as they come."""
        prompts = items("prompts", prompts)
        samples = sample_indices(sample_ids, len(prompts), "row of prompts")
        arrays, keys = _identify(prompts, user_keys)
        first_row: dict[tuple[bytes, int], int] = {}
        for row, identity in enumerate(zip(keys, samples.tolist(), strict=True)):
            other = first_row.setdefault(identity, row)
            if other != row:
                raise ValueError(
                    "sample_ids: expected another one for each row of a prompt, "
                    f"got {identity[1]} in rows {other} and {row}, whose prompts are the same"
                )
        return cls(
            prompt_ids=torch.from_numpy(np.concatenate(arrays)),
            cu_prompt_lens=cu_lens_from(torch.tensor([array.size for array in arrays])),
            keys=keys,
            sample_ids=samples,
        )


def _identify(
    prompts: Sequence[TokenIds], user_keys: Sequence[str | bytes] | None
) -> tuple[list[np.ndarray], list[bytes]]:
    """Each prompt's ids as int32, and its `prompt_key`.

    Raises:
        ValueError: naming the prompt.
    """
    prompts = items("prompts", prompts)
    if len(prompts) == 0:
        raise ValueError("prompts: expected at least one, got none")
    if user_keys is not None and len(user_keys := items("user_keys", user_keys)) != len(prompts):
        raise ValueError(
            f"user_keys: expected one per prompt ({len(prompts)}), got {len(user_keys)}"
        )
    arrays, keys = [], []
    # The rows of a prompt often are one and the same list: hashed once. The list is kept with its
    # key, so that no other can take its place in memory.
    known: dict[tuple[int, str | bytes], tuple[TokenIds, np.ndarray, bytes]] = {}
    heads: dict[bytes, bytes] = {}  # what the noise is made of: the key that has it
    for index, prompt in enumerate(prompts):
        user_key = "" if user_keys is None else user_keys[index]
        if isinstance(user_key, bytes):
            _check_key(index, user_key, heads)
        found = known.get((id(prompt), user_key))
        if found is None:
            try:
                ids_key = prompt_key(prompt, "" if isinstance(user_key, bytes) else user_key)
            except ValueError as error:
                raise ValueError(f"prompts[{index}]: {error}") from error
            if len(prompt) == 0:
                raise ValueError(f"prompts[{index}]: expected at least one token, got none")
            key = user_key if isinstance(user_key, bytes) else ids_key
            found = (prompt, np.asarray(prompt, dtype=np.int32), key)
            known[id(prompt), user_key] = found
        arrays.append(found[1])
        keys.append(found[2])
    return arrays, keys


def _check_key(index: int, key: bytes, heads: dict[bytes, bytes]) -> None:
    """Refuses a key of a row that gives no noise of its own (`noise_keys`)."""
    if len(key) < 8:
        raise ValueError(f"user_keys[{index}]: expected at least 8 bytes, got {len(key)}")
    if len(key) == 16 and (other := heads.setdefault(key[:8], key)) != key:
        raise ValueError(
            f"user_keys[{index}]: expected the 16 bytes of a hash, or another number of them, got "
            f"{key!r} beside {other!r}, which begins alike: both would draw with the same noise"
        )
