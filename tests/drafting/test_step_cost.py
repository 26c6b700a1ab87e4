"""What steps are found to cost."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from spec_rollout.drafting import StepCost


def test_the_coefficients_are_found() -> None:
    generator = np.random.default_rng(0)
    cost = StepCost()
    for _ in range(200):
        rows = int(generator.integers(1, 256))
        proposed = int(generator.integers(0, 500)) if generator.random() < 0.7 else 0
        fixed = 2e-3 + 3e-3 * (proposed > 0)
        cost.observe(rows, proposed, fixed + 4e-5 * rows + 1e-5 * proposed)
    np.testing.assert_allclose(cost.coefficients, [4e-5, 1e-5], rtol=0.05)
    assert cost.extra(200, 300) == pytest.approx(3e-3 + 3e-3, rel=0.05)
    assert cost.extra(200, 1) == pytest.approx(3e-3, rel=0.05)
    assert cost.plain(250) == pytest.approx(2e-3 + 1e-2, rel=0.02)
    assert cost.plain(512) == pytest.approx(2e-3 + 4e-5 * 512, rel=0.02)  # a size never seen


def test_full_batches_are_not_bent_by_the_tail() -> None:
    """One row costs far less than the straight line through full batches says."""
    generator = np.random.default_rng(0)
    cost = StepCost()
    for rows in [*generator.integers(128, 256, 40).tolist(), *[1] * 400]:
        proposed = int(generator.integers(0, 8 * rows))
        fixed = 12e-3 if rows > 1 else 3e-3
        cost.observe(rows, proposed, fixed + 9e-5 * rows + 2e-5 * proposed)
    np.testing.assert_allclose(cost.coefficients, [9e-5, 2e-5], rtol=1e-2)


def test_what_proposing_costs_may_differ_by_batch_size() -> None:
    """Dear tokens and a dear fixed part with many requests, and hardly any with few."""
    generator = np.random.default_rng(0)
    cost = StepCost()
    for step in range(120):
        rows, dear = ((200, 1.0), (4, 0.05))[step % 2]
        proposed = int(generator.integers(1, 3 * rows)) if step % 4 < 2 else 0
        cost.observe(rows, proposed, 0.01 + dear * ((proposed > 0) * 4e-3 + 1e-4 * proposed))
    assert cost.extra(200, 300) == pytest.approx(34e-3, rel=0.05)
    assert cost.extra(4, 10) < 1e-3


def test_a_change_is_followed() -> None:
    generator = np.random.default_rng(0)
    cost = StepCost()
    for price in (1e-5, 3e-5):
        for _ in range(1600):
            rows, proposed = int(generator.integers(1, 256)), int(generator.integers(0, 500))
            cost.observe(rows, proposed, 2e-3 + 4e-5 * rows + price * proposed)
    assert cost.coefficients[1] == pytest.approx(3e-5, rel=0.02)


def test_one_slow_step_changes_little() -> None:
    """Another process had the machine, during one of the first steps with proposals."""
    cost = StepCost()
    for step in range(12):
        cost.observe(8, 0, 0.01)
        cost.observe(8, 8, 0.2 if step == 1 else 0.012)
    assert cost.extra(8, 8) == pytest.approx(2e-3, rel=0.2)


def test_nothing_is_known_before_steps_of_both_kinds() -> None:
    cost = StepCost()
    assert cost.plain(8) is None
    assert cost.extra(8, 4) is None
    assert cost.room(8) == 8
    assert cost.room(256) == 64
    for _ in range(100):
        cost.observe(8, 0, 2e-3)
    assert cost.extra(8, 4) is None
    assert not cost.lacks_plain_steps(8)
    for _ in range(3):
        cost.observe(8, 4, 3e-3)
    assert cost.extra(8, 4) == pytest.approx(1e-3, rel=0.05)
    # Those are forgotten in time, not at once.
    for step in range(600):
        assert (cost.extra(8, 4) is not None) == (step < 366) or 250 < step < 500
        cost.observe(8, 0, 2e-3)
    only = StepCost()
    for _ in range(5):
        assert not only.lacks_plain_steps(64)
        for _ in range(3):
            only.observe(16, 4, 3e-3)
    assert only.lacks_plain_steps(16)
    assert only.extra(16, 4) is None
    only.observe(16, 0, 2e-3)
    assert not only.lacks_plain_steps(16)
    assert only.extra(16, 4) == pytest.approx(1e-3, rel=0.5)


def test_what_proposing_costs_is_known_until_a_plain_step_says_it_anew() -> None:
    """Steps without proposals are worth nothing but the comparison, so there are hardly any."""
    cost = StepCost()
    plain = 0
    for step in range(3000):
        if step < 3 or cost.lacks_plain_steps(64):
            plain += 1
            cost.observe(64, 0, 10e-3)
        else:
            cost.observe(64, 32, 12e-3)
        if step > 6:
            assert cost.extra(64, 32) == pytest.approx(2e-3, rel=0.2)
            assert cost.room(64) > 64
    assert plain <= 3 + 15


def test_steps_grow_no_more_than_twofold() -> None:
    cost = StepCost()
    for _ in range(4):
        cost.observe(8, 0, 1.0)
        cost.observe(8, 8, 1.0)
    assert cost.room(8) == 2 * 16 - 8
    cost.observe(8, 24, 1.0)
    assert cost.room(8) == 2 * 32 - 8
    assert cost.room(40) == 40


def test_sizes_not_seen_for_long_are_forgotten_and_nothing_else_happens() -> None:
    cost = StepCost()
    for _ in range(5):
        cost.observe(200, 0, 0.02)
        cost.observe(200, 40, 0.03)
    cost._num_steps += 400_000  # steps of other sizes
    cost.observe(4, 0, 0.01)
    cost.observe(4, 4, 0.011)
    for rows in (4, 200):
        assert cost.plain(rows) is not None
        cost.extra(rows, 8)
        cost.room(rows)
        cost.lacks_plain_steps(rows)


@pytest.mark.parametrize("rows", [64, 8])
def test_a_trial_that_added_less_says_that_others_did_too(rows: int) -> None:
    cost = StepCost()
    for _ in range(6):
        cost.observe(64, 0, 0.01)
        cost.observe(64, 64, 0.08)
        cost.observe(8, 64, 0.08)
    for size in (64, 8):
        assert cost.extra(size, 64) == pytest.approx(0.07, rel=0.3)
    usual = StepCost()
    usual._steps, usual._num_steps = copy.deepcopy(cost._steps), cost._num_steps
    cost.observe(rows, 64, 0.0102, is_trial=True)  # it was not the proposals
    for size in (64, 8):
        extra = cost.extra(size, 64)
        assert extra is not None
        assert 0.0 <= extra < 0.1 * 0.07
        plain = cost.plain(size)
        assert plain is not None
        assert plain == pytest.approx(usual.plain(size), rel=0.2)
    # One that took half as long, where they are made all the time, says little.
    usual.observe(rows, 64, 0.045)
    assert usual.extra(rows, 64) > 0.5 * 0.07
