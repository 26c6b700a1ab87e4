"""Tokens that the drafter is told some steps later, in one go."""

from __future__ import annotations

import numpy as np
import torch

# Steps in a row that may be kept: what a request generates is to be of use to its siblings soon.
_MOST_STEPS = 32


class LateTokens:
    """Keeps what requests were given in steps that gave one token to each.

    Telling the drafter takes most of what a step costs that proposes nothing, and most of that is
    the call. So nothing is done in the step itself.
    """

    def __init__(self) -> None:
        # Of each step: which requests, their tokens, and the log-probs.
        self._steps: list[tuple[np.ndarray, torch.Tensor, torch.Tensor]] = []

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def is_full(self) -> bool:
        """Whether they have to be taken before any is added."""
        return len(self._steps) == _MOST_STEPS

    def add(self, slots: np.ndarray, tokens: torch.Tensor, logprobs: torch.Tensor) -> None:
        """One token of each of some requests. All three are kept: they must not change.

        Args:
            slots: Each once. [count], int64.
            tokens: On the host. [count], int32.
            logprobs: On the host. [count], float32.
        """
        self._steps.append((slots, tokens, logprobs))

    def take(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """All tokens, and forgets them.

        Returns:
            Requests in ascending order [count], int64; their numbers of tokens [count], int64;
            token ids, request after request [num_tokens], int32; their log-probs [num_tokens],
            float32.
        """
        if not self._steps:
            none = np.empty(0, np.int64)
            return none, none, none.astype(np.int32), none.astype(np.float32)
        slots, tokens, logprobs = zip(*self._steps, strict=True)
        self._steps = []
        every = np.concatenate(slots)
        order = np.argsort(every, kind="stable")  # of each request in the order of the steps
        requests, lens = np.unique(every, return_counts=True)
        ids, values = torch.cat(tokens).numpy(), torch.cat(logprobs).numpy()
        return requests, lens, ids[order], values[order]
