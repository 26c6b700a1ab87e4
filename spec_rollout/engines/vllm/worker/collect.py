"""Log-probs of responses, kept in the worker as packed arrays until the engine fetches them.

vLLM's own path makes Python objects per token and sends them with every step. This one appends
three arrays per step and hands over three arrays per rollout call.
"""

from __future__ import annotations

import numpy as np
import torch


class Collector:
    """Records (collect id, response token, log-prob) by step; ids are `ReuseRequest.collect_id`."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._ids: list[np.ndarray] = []
        self._indices: list[np.ndarray] = []
        self._logprobs: list[torch.Tensor] = []
        self._accepted: dict[int, int] = {}

    def add(self, ids: np.ndarray, indices: np.ndarray, logprobs: torch.Tensor) -> None:
        """One token per entry; the arrays are kept, so pass fresh ones.

        Args:
            ids: < 0: the entry is dropped. [n], int32.
            indices: [n], int32.
            logprobs: [n], float32, on any device: it is not read before `take`.
        """
        self._ids.append(ids)
        self._indices.append(indices)
        self._logprobs.append(logprobs)

    def reused(self, collect_id: int, num_tokens: int) -> None:
        """So many more tokens of a response came from its draft."""
        self._accepted[collect_id] = self._accepted.get(collect_id, 0) + num_tokens

    def take(self) -> tuple[bytes, bytes, bytes, bytes, bytes]:
        """Everything recorded, and forgets it.

        Returns:
            Bytes of: ids int32 [n], token indices int32 [n], log-probs float32 [n]; then, of the
                responses that reused any tokens, ids int32 [m] and how many int32 [m]. A token
                recorded twice counts as recorded last.
        """
        ids = np.concatenate([np.empty(0, np.int32), *self._ids])
        indices = np.concatenate([np.empty(0, np.int32), *self._indices])
        logprobs = _on_cpu(self._logprobs)
        keep = ids >= 0
        out = (
            ids[keep].astype("<i4", copy=False).tobytes(),
            indices[keep].astype("<i4", copy=False).tobytes(),
            logprobs[keep].astype("<f4", copy=False).tobytes(),
            np.array(list(self._accepted), "<i4").tobytes(),
            np.array(list(self._accepted.values()), "<i4").tobytes(),
        )
        self._forget()
        return out


def _on_cpu(parts: list[torch.Tensor]) -> np.ndarray:
    """All parts in order, with one transfer for those that are elsewhere."""
    away = [part for part in parts if part.device.type != "cpu"]
    if away:
        fetched = iter(torch.cat(away).cpu().split([part.numel() for part in away]))
        parts = [part if part.device.type == "cpu" else next(fetched) for part in parts]
    return torch.cat([torch.empty(0, dtype=torch.float32), *parts]).numpy()
