"""What a decoding step costs: a running fit that decides how unlikely a proposed token may be."""

from __future__ import annotations

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
    The fit is by least squares of relative errors with exponential forgetting, and lives as long as the engine. It is asked
    in every step, hence plain numbers: nine of them are less work than one call of a library.
    """

    def __init__(self) -> None:
        # Decayed sums over steps of x_i * x_j and x_i * seconds, x = (1, rows, proposed), upper triangle row by row.
        self._xx = [0.0] * 6
        self._xy = [0.0] * 3
        self._num_steps = 0
        # By batch size (powers of two): steps, proposed and accepted tokens per row, all decayed.
        self._rates: dict[int, tuple[float, float, float]] = {}

    def observe(
        self, rows: int, proposed: int, seconds: float, accepted: int | None = None
    ) -> None:
        """Adds a step of `rows` rows and `proposed` further tokens, of which `accepted` were kept.

        `accepted` is None where the further tokens were not (all) proposals.
        """
        # Relative errors count: long steps are not measured better than short ones.
        w = 1.0 / max(seconds, 1e-6) ** 2
        products = (1.0, rows, proposed, rows * rows, rows * proposed, proposed * proposed)
        self._xx = [_FORGET * old + w * new for old, new in zip(self._xx, products, strict=True)]
        targets = (seconds, rows * seconds, proposed * seconds)
        self._xy = [_FORGET * old + w * new for old, new in zip(self._xy, targets, strict=True)]
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
        # Scaled to ones on the diagonal; the ridge keeps what was never varied at zero.
        a, b, c, d, e, f = self._xx
        scales = [max(v, 1e-30) ** 0.5 for v in (a, d, f)]
        one = 1.0 + 1e-6
        p, q, r = (
            b / (scales[0] * scales[1]),
            c / (scales[0] * scales[2]),
            e / (scales[1] * scales[2]),
        )
        x, y, z = (v / s for v, s in zip(self._xy, scales, strict=True))
        # Cramer's rule.
        det = one * (one * one - r * r) - p * (p * one - r * q) + q * (p * r - one * q)
        solved = (
            x * (one * one - r * r) - p * (y * one - r * z) + q * (y * r - one * z),
            one * (y * one - r * z) - x * (p * one - r * q) + q * (p * z - y * q),
            one * (one * z - y * r) - p * (p * z - y * q) + x * (p * r - one * q),
        )
        fixed, per_row, per_proposal = (
            max(0.0, v / (det * s)) for v, s in zip(solved, scales, strict=True)
        )
        return fixed, per_row, per_proposal

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
        return min(max(share, 0.05), 0.95)
