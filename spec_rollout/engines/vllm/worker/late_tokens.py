"""Tokens that the drafter is told some steps later, in one go."""

from __future__ import annotations

import numpy as np
import torch

from spec_rollout.packed import ranges

# Steps in a row that may be kept: what a request generates is to be of use to its siblings soon.
_MOST_STEPS = 32


class LateTokens:
    """Keeps what requests were given in steps that gave one token to each.

    Telling the drafter takes most of what a step costs that proposes nothing, and most of that is
    the call. Log-probs stay on their device until they are taken.

    Args:
        num_slots: Requests are numbered below it.
    """

    def __init__(self, num_slots: int) -> None:
        self._lens = np.zeros(num_slots, np.int64)
        self._ids = np.empty((num_slots, _MOST_STEPS), np.int32)
        # Of each step: which requests, which of their late tokens, and log-probs if known.
        self._steps: list[tuple[np.ndarray, np.ndarray, torch.Tensor | None]] = []

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def is_full(self) -> bool:
        """Whether they have to be taken before any is added."""
        return len(self._steps) == _MOST_STEPS

    def add(self, slots: np.ndarray, tokens: np.ndarray, logprobs: torch.Tensor | None) -> None:
        """One token of each of some requests.

        Args:
            slots: Each once. [count], int64. Kept: it must not change.
            tokens: [count], int32.
            logprobs: On any device. None: not known. [count], float32.
        """
        at = self._lens[slots]
        self._ids[slots, at] = tokens
        self._lens[slots] = at + 1
        self._steps.append((slots, at, logprobs))

    def take(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """All tokens, and forgets them.

        Returns:
            Requests [count], int64; their numbers of tokens [count], int64; token ids, request
            after request [num_tokens], int32; log-probs, NaN where not known [num_tokens], float32.
        """
        slots = np.flatnonzero(self._lens)
        lens = self._lens[slots]
        where = np.repeat(slots, lens), ranges(lens)
        logprobs = np.full(self._ids.shape, np.nan, np.float32)
        known = [(*places, values) for *places, values in self._steps if values is not None]
        if known:
            rows, columns, values = zip(*known, strict=True)
            # One transfer for all.
            on_host = torch.cat(values).cpu().numpy()
            logprobs[np.concatenate(rows), np.concatenate(columns)] = on_host
        self._lens[slots] = 0
        self._steps = []
        return slots, lens, self._ids[where], logprobs[where]

    def grow(self, num_slots: int) -> None:
        """From now on requests are numbered below `num_slots`."""
        added = num_slots - self._lens.size
        self._lens = np.concatenate([self._lens, np.zeros(added, np.int64)])
        self._ids = np.concatenate([self._ids, np.empty((added, _MOST_STEPS), np.int32)])
