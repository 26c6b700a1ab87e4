"""pass@k and its interval against numbers worked out by hand, and against scipy."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import binomtest

from spec_rollout.evals.estimates import estimate, pass_at_k


def test_pass_at_k_by_hand() -> None:
    # Of 4 samples 1 is correct: 3 of the 6 pairs have it, and 3 of the 4 triples.
    assert [pass_at_k(4, 1, k) for k in (1, 2, 3, 4)] == [
        Fraction(1, 4),
        Fraction(1, 2),
        Fraction(3, 4),
        1,
    ]
    assert [pass_at_k(3, 0, k) for k in (1, 2, 3)] == [0, 0, 0]
    assert [pass_at_k(3, 2, k) for k in (1, 2)] == [Fraction(2, 3), 1]


@pytest.mark.parametrize(("n", "c", "k"), [(6, 2, 3), (7, 5, 2), (5, 5, 5), (8, 3, 4)])
def test_pass_at_k_is_the_share_of_choices_with_a_correct_one(n: int, c: int, k: int) -> None:
    choices = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == Fraction(sum(map(any, choices)), len(choices))


@pytest.mark.parametrize(
    ("n", "c", "k", "message"),
    [(4, 1, 5, "k: expected 1 to 4"), (4, 1, 0, "k: expected 1 to 4"), (4, 5, 1, "num_correct")],
)
def test_what_pass_at_k_refuses(n: int, c: int, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pass_at_k(n, c, k)


@pytest.mark.parametrize("confidence", [0.9, 0.95])
@pytest.mark.parametrize(("size", "correct"), [(30, 7), (10, 0), (10, 10), (500, 431), (1, 1)])
def test_with_a_sample_per_problem_it_is_wilsons_interval(
    size: int, correct: int, confidence: float
) -> None:
    found = estimate([(1, 1)] * correct + [(1, 0)] * (size - correct), confidence=confidence)
    wanted = binomtest(correct, size).proportion_ci(confidence, method="wilson")
    assert found is not None
    assert found.value == correct / size
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=1e-12)


def test_an_interval_worked_out_by_hand() -> None:
    # Shares 1, 1/2, 0, 1/2: mean 1/2, variance over problems 1/8, of independent trials 1/4: as much
    # as 4 * (1/4) / (1/8) = 8 trials tell. Wilson's for 4 of 8 at z = 1.959964:
    # (4 + z^2 / 2) / (8 + z^2) +- z / (8 + z^2) * sqrt(8 / 4 + z^2 / 4) = 0.5 +- 0.2848.
    found = estimate([(2, 2), (2, 1), (2, 0), (2, 1)])
    assert found is not None
    assert found.value == 0.5
    assert (found.low, found.high) == pytest.approx((0.215217, 0.784783), abs=1e-6)


def test_samples_of_a_problem_that_all_agree_are_worth_one() -> None:
    once = estimate([(1, 1), (1, 0), (1, 0)])
    assert estimate([(32, 32), (32, 0), (32, 0)]) == once


def test_no_more_is_known_than_all_samples_tell() -> None:
    # All problems have the same share: by their variance it would be known without error.
    found = estimate([(2, 1)] * 5)
    wanted = binomtest(5, 10).proportion_ci(0.95, method="wilson")
    assert found is not None
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))
    # Nor where all samples are correct: they may have the same reason.
    assert estimate([(8, 8)] * 5) == estimate([(1, 1)] * 5)


def test_one_problem_says_nothing_of_others() -> None:
    found = estimate([(16, 15)])
    assert found is not None
    assert (found.low, found.high) == pytest.approx((0.1809, 0.9986), abs=1e-3)
    assert estimate([(32, 30)]) == found
    assert estimate([(16, 15), (2, 2)], 4) == estimate([(16, 15)], 4)


def test_problems_with_too_few_judged_samples_are_left_out() -> None:
    assert estimate([(4, 2), (0, 0)]) == estimate([(4, 2)])
    assert estimate([(4, 2), (1, 1)], 2) == estimate([(4, 2)], 2)
    assert estimate([(0, 0)]) is None
    with pytest.raises(ValueError, match="confidence: expected between 0 and 1, got 95"):
        estimate([(1, 1)], confidence=95)


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.5, 4.0])
def test_the_interval_holds_the_truth_as_often_as_it_says(spread: float) -> None:
    """Problems of very different and of similar difficulty, 4 samples each, mean 0.3."""
    rng = np.random.default_rng(0)
    tries, problems, samples = 1000, 40, 4
    shares = rng.beta(0.3 * spread, 0.7 * spread, size=(tries, problems))
    correct = rng.binomial(samples, shares)
    hits = 0
    for row in correct.tolist():
        found = estimate([(samples, c) for c in row])
        assert found is not None
        hits += found.low <= 0.3 <= found.high
    assert 0.925 < hits / tries < 0.975
