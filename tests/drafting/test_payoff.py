"""Proposals are made where they pay, by a clock of the tests' own.

Costs are of a machine where a step takes 10 ms and 50 us a request. What is compared are the
seconds of whole rollout calls, with those of an engine that never proposes and of one that always
does; the better of both is the measure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest
from simulated_engine import Epoch, Outcome, SimulatedEngine, sampled, unpredictable

from spec_rollout.drafting import Payoff, StepCost

LENGTH = 192
GROUP = 8
# Seconds of a step with proposals beyond one without, and of a proposed token.
PRICES = {"cheap": (1e-3, 2e-5), "middling": (2e-3, 1e-4), "dear": (5e-3, 1.2e-3)}


def clock(price: str) -> Callable[[int, int], float]:
    fixed, per_token = PRICES[price]
    return lambda rows, proposed: (
        10e-3 + 5e-5 * rows + (fixed if proposed else 0.0) + per_token * proposed
    )


@cache
def epochs(requests: int) -> tuple[tuple[str, Epoch], ...]:
    """An engine's life: nothing to propose, then prompts that come again with the noise they had,
    then with other noise, then nothing again, then the noise they had last."""
    rng = np.random.default_rng(5)
    prompts = np.arange(requests) // min(GROUP, requests)
    old, new = (rng.integers(-(2**62), 2**62, requests) for _ in range(2))
    return (
        ("nothing", unpredictable(requests, LENGTH, 0)),
        ("nothing", unpredictable(requests, LENGTH, 1)),
        ("siblings", sampled(prompts, old, LENGTH, 0)),
        ("own", sampled(prompts, old, LENGTH, 1)),
        ("own", sampled(prompts, old, LENGTH, 2)),
        ("siblings", sampled(prompts, new, LENGTH, 3)),
        ("nothing", unpredictable(requests, LENGTH, 2)),
        ("own", sampled(prompts, new, LENGTH, 4)),
    )


def life(requests: int, price: str, decides: str) -> list[Outcome]:
    engine = SimulatedEngine(clock(price), decides)
    return [engine.rollout(epoch, follows=name == "own") for name, epoch in epochs(requests)]


@pytest.mark.slow
@pytest.mark.parametrize("requests", [4, 16, 64, 256])
@pytest.mark.parametrize("price", list(PRICES))
def test_calls_take_about_what_the_better_of_always_and_never_takes(
    requests: int, price: str
) -> None:
    decided, always, never = (life(requests, price, d) for d in ("payoff", "always", "never"))
    better = [min(a.seconds, n.seconds) for a, n in zip(always, never, strict=True)]
    for (name, _), ours, best in zip(epochs(requests), decided, better, strict=True):
        assert ours.seconds < (1.001 if name == "nothing" else 1.05) * best
    total = sum(outcome.seconds for outcome in decided)
    assert total < 1.01 * sum(better)
    assert total < 1.01 * sum(outcome.seconds for outcome in never)


@pytest.mark.slow
@pytest.mark.parametrize(("requests", "gain"), [(16, 1.0), (64, 1.0), (256, 1.005)])
def test_calls_end_sooner_if_more_is_proposed_to_those_that_end_last(
    requests: int, gain: float
) -> None:
    """Where a proposed token has its price, and the last rollouts tell how long requests are."""
    seconds = []
    for favours_longest in (False, True):
        engine = SimulatedEngine(clock("middling"), favours_longest=favours_longest)
        lives = [engine.rollout(e, follows=name == "own") for name, e in epochs(requests)]
        seconds.append(sum(outcome.seconds for outcome in lives))
    assert seconds[0] > gain * seconds[1]


def test_what_did_not_pay_is_proposed_at_once_when_it_does() -> None:
    """As on a real model: epochs that teach that proposing does not pay, then the own last rollouts
    of eight requests. Without any memory of the use that proposals were, no step is lost."""
    engine = SimulatedEngine(clock("cheap"))
    rng = np.random.default_rng(5)
    prompts, keys = np.arange(8), rng.integers(-(2**62), 2**62, 8)
    for seed in range(3):
        assert engine.rollout(unpredictable(8, LENGTH, seed)).proposed < 40
    first = sampled(prompts, keys, LENGTH, 0)
    engine.rollout(first)
    for seed in range(3, 6):
        engine.rollout(unpredictable(8, LENGTH, seed))
    outcome = engine.rollout(sampled(prompts, keys, LENGTH, 1), follows=True)
    assert outcome.with_proposals is not None
    assert sum(outcome.with_proposals[:12]) >= 10
    assert outcome.accepted > 200


def run(
    payoff: Payoff, steps: Sequence[tuple[int, int, float, int]], per_token: float = 1e-4
) -> list[bool]:
    """Steps of (requests, tokens proposed, expected to pass, that would pass); whether each had its
    proposals. A step takes 10 ms, 2 ms more with proposals."""
    used = []
    for rows, proposed, expected, passing in steps:
        use = payoff.pays(rows) and payoff.worth(rows, proposed, expected)
        if use:
            payoff.tested(expected, passing)
        seconds = 10e-3 + (2e-3 + per_token * proposed if use else 0.0)
        payoff.observe(rows, proposed if use else 0, seconds, passing if use else 0)
        used.append(use)
    return used


GOOD, POOR, EMPTY = (8, 16, 10.0, 10), (8, 16, 1.0, 1), (8, 0, 0.0, 0)


def test_the_costs_are_learned_from_few_steps() -> None:
    payoff = Payoff()
    assert run(payoff, [EMPTY, *[POOR] * 15]) == [False, *[True] * 3, *[False] * 12]
    # The fixed part and 16 tokens for one token expected, which takes 10 ms / 8.
    assert payoff.cost.extra(8, 16) == pytest.approx(3.6e-3, rel=0.05)
    assert all(run(Payoff(), [EMPTY, *[GOOD] * 20])[1:])


@pytest.mark.parametrize("before", [POOR, EMPTY])
def test_no_more_than_a_few_steps_are_lost_when_proposals_become_good(
    before: tuple[int, int, float, int],
) -> None:
    payoff = Payoff()
    run(payoff, [EMPTY, *[GOOD] * 5, *[before] * 500])
    used = run(payoff, [GOOD] * 20)
    assert sum(used[5:]) >= 14  # and one without, to compare with
    run(payoff, [before] * 500)
    payoff.begin()  # the history has changed
    assert all(run(payoff, [GOOD] * 20))


def test_beside_drafts_only_the_tokens_count() -> None:
    """A step that tests drafts anyway has paid for all but the proposed tokens."""
    payoff = Payoff()
    run(payoff, [EMPTY, *[GOOD, (8, 40, 25.0, 25)] * 20])
    assert payoff.cost.proposing(8) == pytest.approx((1e-4, 2e-3), rel=0.15)
    # 16 tokens take 1.6 ms, and the first of them 2 ms more; a token takes 16 ms / 26 or so.
    assert not payoff.worth(8, 16, 3.5)
    assert payoff.worth(8, 16, 3.5, beside=1)
    assert not payoff.worth(8, 16, 1.5, beside=1)


def test_nor_when_they_become_bad() -> None:
    payoff = Payoff()
    run(payoff, [EMPTY, *[GOOD] * 200])
    assert sum(run(payoff, [POOR] * 100)) <= 4


def test_expectations_that_do_not_come_true_are_not_trusted_for_long() -> None:
    payoff = Payoff()
    run(payoff, [EMPTY, *[GOOD] * 20])
    disappointing = (8, 16, 10.0, 0)
    used = run(payoff, [disappointing] * 200)
    assert sum(used[:12]) >= 2
    assert sum(used[12:]) < 0.09 * len(used[12:])  # a try now and then
    assert sum(run(payoff, [GOOD] * 30)) >= 15


def test_where_nothing_is_worth_it_the_drafter_is_asked_seldom() -> None:
    payoff = Payoff()
    asked = []
    for _ in range(200):
        asked.append(payoff.pays(64))
        if asked[-1]:
            assert not payoff.worth(64, 0, 0.0)
        payoff.observe(64, 0, 10e-3, 0)
    assert all(asked[:8])
    assert sum(asked[100:]) == 20
    assert max(len(pause) for pause in "".join("x" if a else " " for a in asked).split("x")) == 4


def test_a_token_pays_if_it_costs_less_than_one_later() -> None:
    payoff = Payoff()
    assert payoff.threshold(8) == 0.5  # nothing is known
    generator = np.random.default_rng(0)
    for step in range(60):
        proposed = int(generator.integers(1, 30)) if step % 2 else 0
        payoff.cost.observe(8, proposed, 10e-3 + 1e-4 * proposed)
    # It costs 0.1 ms; a step of 10 ms gives 8 tokens.
    assert payoff.threshold(8) == pytest.approx(1e-4 / (10e-3 / 8), rel=0.05)
    for _ in range(100):  # and, with proposals, 20 tokens in 11 ms
        payoff.observe(8, 10, 11e-3, 12)
    assert payoff.threshold(8) == pytest.approx(1e-4 / (11e-3 / 20), rel=0.1)
    payoff.begin()
    assert payoff.threshold(8) == pytest.approx(1e-4 / (10e-3 / 8), rel=0.05)
    free = Payoff(StepCost())
    for step in range(60):
        free.observe(8, step % 2, 10e-3, 0)
    assert free.threshold(8) == 0.5  # nothing speaks against it, nor for more


def test_what_a_token_takes_is_known_where_the_batch_has_halved() -> None:
    payoff = Payoff()
    for step in range(120):
        proposed = step % 7 if step % 2 else 0
        payoff.cost.observe(7 + step // 2 % 2, proposed, 10e-3 + 1e-4 * proposed)
    for _ in range(100):  # 2.5 tokens a row, in a tenth more than without proposals
        payoff.observe(8, 10, 11e-3, 12)
    assert payoff.threshold(7) == pytest.approx(1e-4 / (10e-3 / 7 * 1.1 / 2.5), rel=0.1)


def _steps(payoff: Payoff, count: int, rows: int, seconds: Callable[[int], float]) -> list[int]:
    """Tokens proposed in each step, where half of the requests have four that pass."""
    proposed = []
    for _ in range(count):
        num = 0
        if payoff.pays(rows) and payoff.threshold(rows) <= 0.7:
            num = min(2 * rows, payoff.room(rows))
            num = num if payoff.worth(rows, num, 0.9 * num) else 0
        payoff.observe(rows, num, seconds(num), int(0.9 * num))
        if num:
            payoff.tested(0.9 * num, int(0.9 * num))
        proposed.append(num)
    return proposed


@pytest.mark.parametrize("rows", [4, 64, 256])
def test_a_machine_that_was_busy_for_a_few_steps_is_asked_again_soon(rows: int) -> None:
    payoff = Payoff()
    usual = clock("cheap")
    # The first steps with proposals take eight times as long, for reasons of the machine's.
    _steps(payoff, 6, rows, lambda num: (8.0 if num else 1.0) * usual(rows, num))
    proposed = _steps(payoff, 60, rows, lambda num: usual(rows, num))
    assert next(i for i, num in enumerate(proposed) if num) <= 16
    assert sum(num > 0 for num in proposed[-20:]) == 20


def test_what_never_pays_is_tried_ever_more_seldom() -> None:
    payoff = Payoff()
    seconds = [2.0e-2, 1.0e-2]
    proposed = _steps(payoff, 2000, 16, lambda num: seconds[not num] + 2e-3 * num)
    tried = [i for i, num in enumerate(proposed) if num]
    assert len(tried) < 45
    assert sum(i >= 1000 for i in tried) < 20
