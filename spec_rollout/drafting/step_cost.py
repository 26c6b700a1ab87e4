"""What a decoding step costs, and so how unlikely a proposed token may be."""

from __future__ import annotations

from dataclasses import dataclass, field

_FORGET = 0.98  # per step of about that batch size: the last fifty decide
_FORGET_OTHERS = 0.995  # per step of another
_FORGET_CALL = 0.5  # per rollout call
_MIN_STEPS = 12  # before that, the first guess
# As a share of what a token costs otherwise, until measured.
_FIRST_GUESS = 0.5


@dataclass(slots=True)
class _Size:
    """Decayed sums over the steps of about one batch size."""

    step: int = 0  # the last one
    weight: float = 0.0
    sums: list[float] = field(default_factory=lambda: [0.0] * 3)  # of rows, proposed, seconds
    products: list[float] = field(default_factory=lambda: [0.0] * 6)  # of their pairs, rows first
    spent: float = 0.0  # of steps with proposals: seconds
    given: float = 0.0  # and tokens


class StepCost:
    """Fits the seconds of a step to its rows and proposed tokens, over the steps seen.

        seconds = fixed(batch size) + per_row * rows + per_proposal * proposed tokens

    A proposed token costs `per_proposal` for certain. It gives a token with the probability that it
    passes. A token that is not given now has to be given later, and the cost of that is measured:
    the seconds of steps with proposals, divided by the tokens they gave. Batches only shrink, so
    this is taken over all batches of at most the present size. So a proposed token pays if its
    probability is at least

        threshold = per_proposal / (seconds per token from here on)

    Where few rows share the fixed part, a token costs more. So unlikelier tokens are worth trying
    in the tail of a batch than in a full one.

    The fit is by least squares of relative errors, with exponential forgetting. It lives as long as
    the engine. Each batch size (to a power of two) has a fixed part of its own, because the cost of
    a step is no straight line from one row to hundreds. Otherwise steps of the tail would bend the
    line for full batches. Every step asks it, so it computes with plain numbers.

    It reads no clock: the engine says what each step took.
    """

    def __init__(self) -> None:
        self._sizes: dict[int, _Size] = {}
        self._num_steps = 0

    def observe(
        self, rows: int, proposed: int, seconds: float, accepted: int | None = None
    ) -> None:
        """Adds a step.

        Args:
            rows: Requests in the batch, >= 1.
            proposed: Tokens computed beyond one per row.
            seconds: What the step took.
            accepted: How many of `proposed` were kept; None where they were not all proposals.
        """
        size = self._sizes.setdefault(rows.bit_length(), _Size())
        # Relative errors count: long steps are not measured better than short ones.
        w = 1.0 / max(seconds, 1e-6) ** 2
        x = (rows, proposed, seconds)
        pairs = (x[i] * x[j] for i in range(3) for j in range(i, 3))
        keep = _FORGET * _FORGET_OTHERS ** (self._num_steps - size.step)
        size.weight = keep * size.weight + w
        size.sums = [keep * old + w * new for old, new in zip(size.sums, x, strict=True)]
        size.products = [
            keep * old + w * new for old, new in zip(size.products, pairs, strict=True)
        ]
        self._num_steps += 1
        size.step = self._num_steps
        if proposed and accepted is not None:
            size.spent += seconds
            size.given += rows + accepted

    def begin(self) -> None:
        """A rollout call begins: seconds and tokens of earlier calls count half."""
        for size in self._sizes.values():
            size.spent *= _FORGET_CALL
            size.given *= _FORGET_CALL

    @property
    def coefficients(self) -> tuple[float, float]:
        """Seconds per row and per proposed token; 0 for what has not varied yet."""
        rr = rp = rs = pp = ps = 0.0
        for size in self._sizes.values():  # around the means of each size
            r, p, s = size.sums
            w = size.weight
            keep = _FORGET_OTHERS ** (self._num_steps - size.step)
            rr += keep * (size.products[0] - r * r / w)
            rp += keep * (size.products[1] - r * p / w)
            rs += keep * (size.products[2] - r * s / w)
            pp += keep * (size.products[3] - p * p / w)
            ps += keep * (size.products[4] - p * s / w)
        # The ridge keeps what was never varied at zero.
        rr, pp = rr * (1.0 + 1e-6) + 1e-9, pp * (1.0 + 1e-6) + 1e-9
        det = rr * pp - rp * rp
        return max(0.0, (rs * pp - ps * rp) / det), max(0.0, (ps * rr - rs * rp) / det)

    def threshold(self, rows: int) -> float:
        """The least probability at which a proposed token pays, between 0.05 and 0.95."""
        share = _FIRST_GUESS
        if self._num_steps >= _MIN_STEPS:
            known = [k for k, size in self._sizes.items() if size.given]
            here = max(rows.bit_length(), min(known, default=0))
            given = sum(self._sizes[k].given for k in known if k <= here)
            _, per_proposal = self.coefficients
            if given and per_proposal > 0:
                share = per_proposal * given / sum(self._sizes[k].spent for k in known if k <= here)
        return min(max(share, 0.05), 0.95)
