"""Whether samples follow a law: the chi-square test of every test that draws."""

from __future__ import annotations

import numpy as np
import torch
from scipy import stats

# A right implementation falls below this about once in a million tests, so a test that fails for
# another seed, or with another processor's last bits, fails for a reason.
SMALLEST_P = 1e-6
# A probability of at most this is the rounding of a closed form: the outcome is impossible.
_ROUNDING = 1e-12
# Outcomes expected less often are counted together; chi-square is no good approximation for them.
_RARE = 30.0

Values = np.ndarray | torch.Tensor


def p_value(counts: Values, law: Values) -> float:
    """How likely counts as unlike the law as these are under the law.

    0 where an impossible outcome occurred. Rare outcomes are tested together by their exact law,
    the others by chi-square; of two tests the smaller p-value counts, times two.

    Args:
        counts: Of each outcome, integers; any shape.
        law: Probability of each outcome, which sum to 1 up to rounding; shape of `counts`.
    """
    observed = np.asarray(counts, dtype=np.int64).ravel()
    probs = np.asarray(law, dtype=np.float64).ravel()
    assert observed.shape == probs.shape
    assert abs(probs.sum() - 1.0) < 1e-6
    impossible = probs <= _ROUNDING
    if observed[impossible].any():
        return 0.0
    total = int(observed.sum())
    expected = probs * total
    rare = ~impossible & (expected < _RARE)
    p_values = []
    if rare.any():
        share = min(1.0, float(probs[rare].sum()))
        p_values.append(stats.binomtest(int(observed[rare].sum()), total, share).pvalue)
    often = ~impossible & ~rare
    if often.sum() > 1:
        left = expected[often] / expected[often].sum() * observed[often].sum()
        p_values.append(stats.chisquare(observed[often], left).pvalue)
    if not p_values:  # one outcome is certain
        return 1.0
    return min(1.0, len(p_values) * float(min(p_values)))


def assert_law(counts: Values, law: Values) -> None:
    """Fails where counts of outcomes are not from the law (`p_value`)."""
    found = p_value(counts, law)
    assert found > SMALLEST_P, f"p = {found:.1e}: counts {counts}, law {law}"


def assert_rate(passed: Values, rate: float) -> None:
    """Fails where booleans are not true at this rate, by the exact test."""
    values = np.asarray(passed, dtype=bool)
    count = int(values.sum())
    found = stats.binomtest(count, values.size, rate).pvalue
    assert found > SMALLEST_P, f"p = {found:.1e}: {count} of {values.size}, expected rate {rate}"
