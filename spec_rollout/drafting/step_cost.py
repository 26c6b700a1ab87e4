"""What a decoding step takes, by its requests and the tokens proposed in it."""

from __future__ import annotations

from dataclasses import dataclass

_FORGET = 0.98  # per step of that kind and about that batch size: the last fifty decide
_FORGET_OTHERS = 0.997  # per step of another
# A fixed part of proposing is believed once it has shown in more than this share of a step.
_FREE_STEPS = 0.2
# A batch size is believed to be like the others for this many steps of its own.
_LIKE_OTHERS = 2.0
# Steps with proposals that are enough to judge by, and those that are too few to go on judging.
_ENOUGH, _TOO_FEW = 2.5, 1.0
# Comparisons of a step with proposals and one without that are too few.
_TOO_FEW_PAIRS = 0.5
# Fitted anew after each of the first steps, of all and of a kind, then now and then.
_FIRST_STEPS, _FIRST_OF_KIND, _REFIT_STEPS = 64, 4.0, 16
_NOTHING = 1e-200  # what is forgotten has no weight that could be divided by
# What proposing added, as a share of what it should add, that says that the latter is wrong.
_WRONG = 0.3
_LEAST_SHARE = 0.02
# Tokens proposed while it is not known what they take: a share of the requests, or a few.
_TRIAL_SHARE, _TRIAL_TOKENS = 4, 8


@dataclass(slots=True)
class _Steps:
    """Decayed sums over the steps of about one batch size, with or without proposals."""

    step: int = 0  # the last one
    count: float = 0.0
    weight: float = 0.0
    # Of rows, proposed, seconds; and of their products, rows first, without seconds squared.
    sums: tuple[float, float, float] = (0.0, 0.0, 0.0)
    products: tuple[float, float, float, float, float] = (0.0, 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class _Fit:
    """Of all batch sizes together."""

    per_row: float = 0.0
    per_proposal: float = 0.0
    proposing: float = 0.0  # of a step with proposals, beyond these
    pairs: float = 0.0  # comparisons of steps with and without proposals that say so


class StepCost:
    """Fits the seconds of a step to its rows and proposed tokens, over the steps seen.

        seconds = fixed(batch size) + per_row * rows
                  + proposing(batch size) + per_proposal(batch size) * proposed, where any are

    The fit is by least squares of relative errors, with exponential forgetting. It lives as long as
    the engine, whatever becomes of the history. Each batch size (to a power of two) has fixed parts
    of its own, because the cost of a step is no straight line from one row to hundreds. Otherwise
    steps of the tail would bend the line for full batches. What proposing costs is first taken to
    be what it is at other sizes. Every step asks, so it computes with plain numbers.

    It reads no clock: the engine says what each step took.
    """

    def __init__(self) -> None:
        self._steps: dict[int, tuple[_Steps, _Steps]] = {}  # by size: without proposals, with
        self._num_steps = 0
        self._longest = 0  # tokens of a step
        self._fit = _Fit()
        self._refit_at = 1  # after so many steps
        self._of_sizes: dict[int, tuple[float, float]] = {}  # `_of_proposing`, until then
        self._is_known = False
        self._was_compared = False  # enough steps with proposals and without, ever

    def observe(self, rows: int, proposed: int, seconds: float, *, is_trial: bool = False) -> bool:
        """Adds a step.

        Args:
            rows: Requests in the batch, >= 1.
            proposed: Tokens computed beyond one per row.
            seconds: What the step took.
            is_trial: It was made to see whether what is known of such steps is wrong. Where
                proposals are made all the time, time corrects it.

        Returns:
            Whether a trial showed that it was.
        """
        was_wrong = is_trial and proposed > 0 and self._correct(rows, proposed, seconds)
        size = rows.bit_length()
        if size not in self._steps:
            self._steps[size] = (_Steps(), _Steps())
        kind = self._steps[size][proposed > 0]
        # Relative errors count: long steps are not measured better than short ones.
        w = 1.0 / max(seconds, 1e-6) ** 2
        wr, wp, ws = w * rows, w * proposed, w * seconds
        keep = _FORGET * _FORGET_OTHERS ** (self._num_steps - kind.step)
        kind.count = keep * kind.count + 1.0
        kind.weight = keep * kind.weight + w
        r, p, s = kind.sums
        kind.sums = (keep * r + wr, keep * p + wp, keep * s + ws)
        rr, rp, rs, pp, ps = kind.products
        kind.products = (
            keep * rr + wr * rows,
            keep * rp + wr * proposed,
            keep * rs + wr * seconds,
            keep * pp + wp * proposed,
            keep * ps + wp * seconds,
        )
        self._num_steps += 1
        kind.step = self._num_steps
        self._longest = max(self._longest, rows + proposed)
        if self._num_steps <= _FIRST_STEPS or kind.count < _FIRST_OF_KIND:
            self._refit_at = self._num_steps
        return was_wrong

    def _correct(self, rows: int, proposed: int, seconds: float) -> bool:
        """Where a step with proposals adds far less than it should, all earlier ones are taken to
        have added as much less: the machine was busy then. It is never faster than it can be."""
        extra, plain = self.extra(rows, proposed), self.plain(rows)
        if extra is None or plain is None or extra < _FREE_STEPS * plain:
            return False
        share = (seconds - plain) / extra
        if share >= _WRONG:
            return False
        share = max(share, _LEAST_SHARE)
        per_row = self._fitted().per_row
        for size, (_, kind) in self._steps.items():
            without = self.plain(1 << size - 1)
            if not kind.count or without is None:
                continue
            fixed = without - per_row * (1 << size - 1)
            r, p, s = kind.sums
            rr, rp, rs, pp, ps = kind.products
            rest = 1.0 - share
            kind.sums = (r, p, share * s + rest * (fixed * kind.weight + per_row * r))
            kind.products = (
                rr,
                rp,
                share * rs + rest * (fixed * r + per_row * rr),
                pp,
                share * ps + rest * (fixed * p + per_row * rp),
            )
        self._refit_at = self._num_steps
        return True

    @property
    def coefficients(self) -> tuple[float, float]:
        """Seconds per row and per proposed token, over all batch sizes; 0 for what has not varied
        yet."""
        fit = self._fitted()
        return fit.per_row, fit.per_proposal

    def plain(self, rows: int) -> float | None:
        """Seconds of a step without proposals, by those of about its size, else of the nearest;
        None while none was seen."""
        if not self._steps:
            return None
        known = size = rows.bit_length()
        if size not in self._steps:
            known = min(self._steps, key=lambda k: abs(k - size))
        without, proposing = self._steps[known]
        kind = without if without.count else proposing
        r, p, s = (total / kind.weight for total in kind.sums)
        seconds = s + self._fitted().per_row * (rows - r)
        if kind is proposing:
            per_proposal, fixed = self._of_proposing(known)
            seconds -= per_proposal * p + fixed
        return max(seconds, 0.1 * s)

    def extra(self, rows: int, proposed: int) -> float | None:
        """Seconds that proposing so many tokens adds to a step; None while too little is known."""
        found = self.proposing(rows)
        return None if found is None else found[1] + found[0] * proposed

    def proposing(self, rows: int) -> tuple[float, float] | None:
        """Seconds of a proposed token, and of a step with proposals beyond these and the seconds of
        one without; None while too little is known."""
        self._fitted()
        # What is old is better than nothing until the next step without proposals.
        if not self._is_known or not self._was_compared:
            return None
        return self._of_proposing(rows.bit_length())

    def room(self, rows: int) -> int:
        """Most tokens to propose in a step.

        It is at most twice as long as any before, because nothing is known of what longer ones
        take. While nothing is known at all, few are enough to learn it.
        """
        if self.proposing(rows) is None:
            return self.trial_room(rows)
        return 2 * max(self._longest, rows) - rows

    @staticmethod
    def trial_room(rows: int) -> int:
        """Tokens enough to learn what they take."""
        return max(rows // _TRIAL_SHARE, _TRIAL_TOKENS)

    def lacks_plain_steps(self, rows: int) -> bool:
        """Whether only a step without proposals would say what proposing costs."""
        kinds = self._steps.get(rows.bit_length())
        if kinds is None or self._count(kinds[1]) < _ENOUGH:
            return False
        return self._fitted().pairs < _TOO_FEW_PAIRS

    def _count(self, kind: _Steps) -> float:
        return kind.count * _FORGET_OTHERS ** (self._num_steps - kind.step)

    def _of_proposing(self, size: int) -> tuple[float, float]:
        """Seconds of a proposed token, and of proposing at all, at this batch size: as far as they
        are known there, else as at any."""
        fit = self._fitted()
        found = self._of_sizes.get(size)
        if found is None:
            found = self._of_sizes[size] = self._solved_for(size, fit)
        return found

    def _solved_for(self, size: int, fit: _Fit) -> tuple[float, float]:
        per_proposal, fixed = fit.per_proposal, fit.proposing
        without, kind = self._steps.get(size, (_Steps(), _Steps()))
        if not kind.count:
            return per_proposal, fixed
        w = kind.weight
        r, p, s = kind.sums
        _, rp, _, pp, ps = kind.products
        like_others = _LIKE_OTHERS * w / kind.count * (p / w) ** 2
        slope = ps - p * s / w - fit.per_row * (rp - r * p / w) + like_others * per_proposal
        per_proposal = max(0.0, slope / (pp - p * p / w + like_others))
        if not without.count:
            return per_proposal, fixed
        rest = (s - fit.per_row * r - per_proposal * p) / w
        rest -= (without.sums[2] - fit.per_row * without.sums[0]) / without.weight
        numbers = self._count(without), self._count(kind)
        if sum(numbers) < _NOTHING:
            return per_proposal, fixed
        pairs = numbers[0] * numbers[1] / sum(numbers)
        fixed = (pairs * rest + _LIKE_OTHERS * fixed) / (pairs + _LIKE_OTHERS)
        return per_proposal, max(0.0, fixed)

    def _fitted(self) -> _Fit:
        if self._num_steps >= self._refit_at and self._steps:
            self._refit_at = self._num_steps + _REFIT_STEPS
            self._fit = self._solved()
            self._was_compared |= self._fit.pairs >= _TOO_FEW_PAIRS
            self._of_sizes.clear()
            num = sum(self._count(proposing) for _, proposing in self._steps.values())
            self._is_known = num >= (_TOO_FEW if self._is_known else _ENOUGH)
        return self._fit

    def _solved(self) -> _Fit:
        """Least squares around the means of each size."""
        # Of rows, proposed tokens, and whether there are any; the last column is seconds.
        a = [[0.0] * 4 for _ in range(3)]
        weight = count = num_pairs = 0.0
        for kinds in self._steps.values():
            keeps = [_FORGET_OTHERS ** (self._num_steps - kind.step) for kind in kinds]
            both = [0.0] * 9  # of both kinds: weight, sums, products
            for keep, kind in zip(keeps, kinds, strict=True):
                values = (kind.weight, *kind.sums, *kind.products)
                both = [old + keep * new for old, new in zip(both, values, strict=True)]
            w, r, p, s, rr, rp, rs, pp, ps = both
            if w < _NOTHING:  # not seen for a hundred thousand steps
                continue
            h, hr, hp, hs = (keeps[1] * v for v in (kinds[1].weight, *kinds[1].sums))
            a[0][0] += rr - r * r / w
            a[0][1] += rp - r * p / w
            a[0][2] += hr - r * h / w
            a[0][3] += rs - r * s / w
            a[1][1] += pp - p * p / w
            a[1][2] += hp - p * h / w
            a[1][3] += ps - p * s / w
            a[2][2] += h - h * h / w
            a[2][3] += hs - h * s / w
            numbers = [keep * kind.count for keep, kind in zip(keeps, kinds, strict=True)]
            num_pairs += numbers[0] * numbers[1] / max(sum(numbers), _NOTHING)
            weight += w
            count += sum(numbers)
        if not count:
            return _Fit()
        a[1][0], a[2][0], a[2][1] = a[0][1], a[0][2], a[1][2]
        for i in range(3):  # the ridge keeps what was never varied at zero
            a[i][i] = a[i][i] * (1.0 + 1e-6) + 1e-9
        a[2][2] += _FREE_STEPS * weight / count
        per_row, per_proposal, proposing = _least_squares(a)
        return _Fit(per_row, per_proposal, proposing, num_pairs)


def _least_squares(a: list[list[float]]) -> list[float]:
    """Solves a[:, :-1] x = a[:, -1]; what would be negative is left out, the last one first."""
    used = list(range(len(a)))
    while used:
        rows = [[a[i][j] for j in used] + [a[i][-1]] for i in used]
        for i, pivot in enumerate(rows):  # positive definite: no need to look for pivots
            for k in range(i + 1, len(rows)):
                share = rows[k][i] / pivot[i]
                rows[k] = [x - share * y for x, y in zip(rows[k], pivot, strict=True)]
        found = [0.0] * len(a)
        for i in range(len(rows) - 1, -1, -1):
            rest = sum(rows[i][j] * found[used[j]] for j in range(i + 1, len(rows)))
            found[used[i]] = (rows[i][-1] - rest) / rows[i][i]
        negative = [i for i in used if found[i] < 0.0]
        if not negative:
            return found
        used.remove(negative[-1])
    return [0.0] * len(a)
