"""What a decoding step costs: a running fit that decides how unlikely a proposed token may be."""

from __future__ import annotations

import numpy as np

_FORGET = 0.995  # per step: the last two hundred steps decide
_FORGET_RATE = 0.9  # per step with proposals of that batch size
_MIN_STEPS = 12  # before that, the first guess
# As a share of what a step costs per row without proposals, until measured.
_FIRST_GUESS = 0.5


class StepCost:
    """Fits `seconds = fixed + per_row * rows + per_proposal * proposed tokens` to the steps seen.

    A proposed token costs `per_proposal` for certain and gives a token with the probability that it passes. What a token
    costs otherwise is known: what steps of this size take per row, over the tokens they give to a row. So a proposed token
    pays if its probability is at least

        threshold = per_proposal / price
        price = (fixed / rows + per_row + per_proposal * proposed per row) / (1 + accepted per row)

    which is the condition for the most tokens per second (the marginal token is as dear as the average one). Few rows share
    the fixed part among them, so in the tail of a batch unlikelier tokens are worth trying than when the batch is full.
    The fit is by least squares of relative errors with exponential forgetting, and lives as long as the engine.
    """

    def __init__(self) -> None:
        self._xx = np.zeros((3, 3))
        self._xy = np.zeros(3)
        self._num_steps = 0
        # By batch size (powers of two): steps, proposed and accepted tokens per row, all decayed.
        self._rates: dict[int, tuple[float, float, float]] = {}

    def observe(
        self, rows: int, proposed: int, seconds: float, accepted: int | None = None
    ) -> None:
        """Adds a step of `rows` rows and `proposed` further tokens, of which `accepted` were kept.

        `accepted` is None where the further tokens were not (all) proposals.
        """
        x = np.array([1.0, rows, proposed])
        # Relative errors count: long steps are not measured better than short ones.
        weight = 1.0 / max(seconds, 1e-6) ** 2
        self._xx = _FORGET * self._xx + weight * np.outer(x, x)
        self._xy = _FORGET * self._xy + weight * seconds * x
        self._num_steps += 1
        if proposed and accepted is not None:
            size = rows.bit_length()
            steps, per_row, kept = self._rates.get(size, (0.0, 0.0, 0.0))
            self._rates[size] = (
                _FORGET_RATE * steps + 1.0,
                _FORGET_RATE * per_row + proposed / rows,
                _FORGET_RATE * kept + accepted / rows,
            )

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
            steps, proposed, accepted = self._rates.get(rows.bit_length(), (1.0, 0.0, 0.0))
            price = (fixed / max(1, rows) + per_row + per_proposal * proposed / steps) / (
                1.0 + accepted / steps
            )
            if price > 0 and per_proposal > 0:
                share = per_proposal / price
        return float(np.clip(share, 0.05, 0.95))
