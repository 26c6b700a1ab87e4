"""The test that other tests decide by: right samples pass, wrong ones do not."""

from __future__ import annotations

import numpy as np
import pytest
from laws import SMALLEST_P, assert_law, assert_rate, p_value
from scipy import stats

LAW = np.array([0.4, 0.3, 0.2, 0.0999, 1e-4, 0.0])


@pytest.mark.slow
def test_p_values_of_right_samples_are_uniform() -> None:
    """Not small more often than they say, with rare outcomes and without."""
    rng = np.random.default_rng(0)
    for law in (LAW, np.array([0.5, 0.5]), np.array([0.9995, 0.0003, 0.0002])):
        found = np.array([p_value(rng.multinomial(20_000, law), law) for _ in range(1_000)])
        for bound in (0.01, 0.1):
            below = int((found < bound).sum())
            assert stats.binomtest(below, 1_000, 1.2 * bound, "greater").pvalue > SMALLEST_P


def test_wrong_samples_are_told() -> None:
    rng = np.random.default_rng(1)
    for wrong in ([0.38, 0.32, 0.2, 0.0999, 1e-4, 0.0], [0.4, 0.3, 0.2, 0.098, 2e-3, 0.0]):
        assert p_value(rng.multinomial(50_000, wrong), LAW) < SMALLEST_P
    with pytest.raises(AssertionError, match=r"expected rate 0\.3"):
        assert_rate(rng.random(50_000) < 0.32, 0.3)


def test_what_is_impossible_up_to_rounding_may_not_occur() -> None:
    """1 - sum(q) of probabilities that sum to 1 is often 2e-16, or less than nothing."""
    for rounding in (0.0, 2.2e-16, -2.2e-16):
        law = np.array([1.0 - rounding, rounding])
        assert_law(np.array([1000, 0]), law)
        assert p_value(np.array([999, 1]), law) == 0.0
    assert_rate(np.ones(10, bool), 1.0)
    with pytest.raises(AssertionError, match="9 of 10"):
        assert_rate(np.arange(10) < 9, 1.0)
