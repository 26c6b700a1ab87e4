"""Are the rollouts of two runs the same? Ids of every training rollout, kept and compared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from spec_rollout.types import Rollouts


class ResponseLog:
    """Collects the responses of all steps; `add` is a callback of the trainer."""

    def __init__(self) -> None:
        self._ids: list[np.ndarray] = []
        self._lens: list[np.ndarray] = []
        self._steps: list[np.ndarray] = []

    def add(self, step: int, rollouts: Rollouts) -> None:
        """Keeps one step's responses."""
        self._ids.append(rollouts.response_ids.numpy().astype(np.int32))
        self._lens.append(rollouts.response_lens.numpy().astype(np.int32))
        self._steps.append(np.full(rollouts.batch, step, dtype=np.int32))

    def save(self, path: Path) -> None:
        """Writes `ids` (all tokens), `lens` and `steps` (one per rollout): int32, in order."""
        empty = [np.empty(0, dtype=np.int32)]
        np.savez_compressed(
            path,
            ids=np.concatenate(self._ids or empty),
            lens=np.concatenate(self._lens or empty),
            steps=np.concatenate(self._steps or empty),
        )


def compare_responses(one: Path, other: Path) -> dict[str, Any]:
    """Compares two files of `ResponseLog`, rollout by rollout.

    Returns:
        total: Rollouts of the longer file.
        identical: Rollouts with the same step, length and tokens in both.
        first_difference: {"rollout", "step", "position"}: index in the file, training step, and
            response position of the first differing token (the shorter length if one is a prefix of
            the other); None if there is none.
    """
    with np.load(one) as a, np.load(other) as b:
        total = max(a["lens"].size, b["lens"].size)
        rows = list(zip(*(_split(file) for file in (a, b)), strict=False))
        steps_a, steps_b = a["steps"], b["steps"]
    same = [steps_a[i] == steps_b[i] and np.array_equal(x, y) for i, (x, y) in enumerate(rows)]
    identical = int(sum(same))
    first = None
    if identical < total:
        index = same.index(False) if False in same else len(rows)
        first = {"rollout": index, "step": None, "position": None}
        if index < len(rows):
            first["step"] = int(steps_a[index])
            first["position"] = _first_difference(*rows[index])
    return {"total": total, "identical": identical, "first_difference": first}


def _split(file: Any) -> list[np.ndarray]:
    return np.split(file["ids"], np.cumsum(file["lens"])[:-1]) if file["lens"].size else []


def _first_difference(a: np.ndarray, b: np.ndarray) -> int:
    shorter = min(a.size, b.size)
    differs = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(differs[0]) if differs.size else shorter
