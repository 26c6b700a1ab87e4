"""pass@k of a set of problems, and how far it can be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist


@dataclass(frozen=True, slots=True)
class Estimate:
    """A share from 0 to 1 with its confidence interval."""

    value: float
    low: float
    high: float


def pass_at_k(num_samples: int, num_correct: int, k: int) -> Fraction:
    """Probability that one of k samples of a problem is correct, estimated without bias.

    1 - C(n - c, k) / C(n, k): the share of all choices of k of the n samples with a correct one
    (Chen et al., arXiv 2107.03374, eq. 1).

    Args:
        num_samples: n, at least k.
        num_correct: c, at most n.
        k: At least 1.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k: expected 1 to {num_samples} (the samples of a problem), got {k}")
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct: expected 0 to {num_samples}, got {num_correct}")
    return 1 - Fraction(math.comb(num_samples - num_correct, k), math.comb(num_samples, k))


def estimate(
    counts: Sequence[tuple[int, int]], k: int = 1, *, confidence: float = 0.95
) -> Estimate | None:
    """pass@k over problems, every problem with equal weight, and its Wilson score interval.

    The interval is for other problems of the same kind: problems are what was drawn, and the
    samples of one are no independent evidence. So Wilson's formula gets the effective number of
    independent trials, m (1 - m) / variance of the mean over problems (Kish's design effect). With
    one sample per problem that is the number of problems, and the interval Wilson's own; it is at
    most the number of samples, and 1 for a single problem, which says nothing of others. Unlike
    mean +- 1.96 standard errors it stays within 0 and 1, and has a width when every problem is
    solved.

    Args:
        counts: (samples, correct ones) of each problem; one with less than k samples is left out.
        k: See `pass_at_k`.
        confidence: Of the interval, between 0 and 1.

    Returns:
        None if no problem has k samples.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected between 0 and 1, got {confidence}")
    values = [pass_at_k(n, c, k) for n, c in counts if n >= k]
    if not values:
        return None
    size = len(values)
    # Exact until here: equal shares of correct samples are equal numbers, however they came about.
    mean = sum(values, Fraction(0)) / size
    variance = sum(((value - mean) ** 2 for value in values), Fraction(0)) / size
    num_trials = float(sum(n for n, _ in counts if n >= k))
    if variance > 0:
        num_trials = min(num_trials, float(size * mean * (1 - mean) / variance))
    elif size == 1 or mean in (0, 1):
        # Nothing says how much the samples of a problem have in common.
        num_trials = size
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    m, n = float(mean), num_trials
    center = (m + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(m * (1 - m) / n + z * z / (4 * n * n))
    return Estimate(m, max(0.0, center - half), min(1.0, center + half))
