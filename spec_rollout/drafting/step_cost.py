"""What a decoding step costs: a running fit that decides how unlikely a proposed token may be."""

from __future__ import annotations

import numpy as np

_FORGET = 0.99  # per step: the last hundred steps decide
_MIN_STEPS = 12  # before that, the first guess
# As a share of what a step costs per row without proposals, until measured.
_FIRST_GUESS = 0.5


class StepCost:
    """Fits `seconds = fixed + per_row * rows + per_proposal * proposed tokens` to the steps seen.

    A proposed token costs `per_proposal` for certain and saves a row of a later step with the
    probability that it passes. Its worth is a row's share of a step without proposals, so a token
    pays if its probability is at least

        threshold = per_proposal / (fixed / rows + per_row)

    Few rows share the fixed part among them, so in the tail of a batch unlikelier tokens are worth
    trying than when the batch is full. The fit is by least squares with exponential forgetting,
    and lives as long as the engine.
    """

    def __init__(self) -> None:
        self._xx = np.zeros((3, 3))
        self._xy = np.zeros(3)
        self._num_steps = 0

    def observe(self, rows: int, proposed: int, seconds: float) -> None:
        """Adds a step of `rows` rows and `proposed` further tokens."""
        x = np.array([1.0, rows, proposed])
        # Steps are weighted by 1 / rows^2: relative errors count, so that the tail does too.
        weight = 1.0 / max(1, rows) ** 2
        self._xx = _FORGET * self._xx + weight * np.outer(x, x)
        self._xy = _FORGET * self._xy + weight * seconds * x
        self._num_steps += 1

    @property
    def coefficients(self) -> tuple[float, float, float]:
        """Seconds per step, per row and per proposed token; zeros before anything was seen."""
        scale = np.sqrt(np.maximum(np.diag(self._xx), 1e-30))
        ridge = 1e-6 * np.eye(3)
        solved = np.linalg.solve(self._xx / np.outer(scale, scale) + ridge, self._xy / scale)
        fixed, per_row, per_proposal = np.maximum(solved / scale, 0.0)
        return float(fixed), float(per_row), float(per_proposal)

    def threshold(self, rows: int) -> float:
        """The least probability at which a proposed token pays, between 0.05 and 0.95."""
        share = _FIRST_GUESS
        if self._num_steps >= _MIN_STEPS:
            fixed, per_row, per_proposal = self.coefficients
            worth = fixed / max(1, rows) + per_row
            if worth > 0 and per_proposal > 0:
                share = per_proposal / worth
        return float(np.clip(share, 0.05, 0.95))
