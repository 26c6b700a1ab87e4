"""Who drew each token, how long ago, and which responses are new."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from markov_engine import MarkovEngine

from spec_rollout.acceptance import Coupled, Lenient, NoReuse
from spec_rollout.cache import RolloutCache
from spec_rollout.origins import (
    MAX_AGE,
    aged,
    count_responses,
    kl_sum,
    taken_lens,
    with_origins,
)
from spec_rollout.packed import cu_lens_from
from spec_rollout.rollout import RolloutSession
from spec_rollout.types import Drafts, Rollouts, SamplingParams


def _drafts(rows: list[list[int]], **given: torch.Tensor | None) -> Drafts:
    ids = torch.tensor([t for row in rows for t in row], dtype=torch.int32)
    fields = {
        "token_ids": ids,
        "cu_lens": cu_lens_from(torch.tensor([len(row) for row in rows])),
        "logprobs": -ids.float(),
        "finished": torch.zeros(len(rows), dtype=torch.bool),
    }
    return Drafts(**{**fields, **given})  # type: ignore[arg-type]


def _rollouts(rows: list[list[int]], accepted: list[int]) -> Rollouts:
    ids = torch.tensor([t for row in rows for t in row], dtype=torch.int32)
    batch = len(rows)
    return Rollouts(
        prompt_ids=torch.ones(batch, dtype=torch.int32),
        cu_prompt_lens=torch.arange(batch + 1),
        response_ids=ids,
        cu_response_lens=cu_lens_from(torch.tensor([len(row) for row in rows])),
        logprobs=-ids.float() / 2,
        accepted_lens=torch.tensor(accepted, dtype=torch.int32),
        finish_reasons=torch.zeros(batch, dtype=torch.uint8),
    )


ROWS = [[1, 2, 3], [4, 5], [6], [7, 8]]
ACCEPTED = [2, 0, 1, 2]
# Longer than what was accepted, or than the whole response.
DRAFTS = [[1, 2, 9, 9], [9, 9, 9], [6, 9], [7, 8]]


def test_reused_tokens_keep_what_they_were_drawn_with() -> None:
    behaviour = torch.arange(11) / -8
    ages = torch.tensor([9, 8, 7, 6, 5, 4, 3, 2, 1, 2, 1], dtype=torch.int16)
    drafts = _drafts(DRAFTS, behaviour_logprobs=behaviour, ages=ages)
    out = with_origins(_rollouts(ROWS, ACCEPTED), drafts)
    assert out.behaviour_logprobs is not None
    assert out.ages is not None
    # Row 0 takes draft tokens 0 and 1, row 2 the seventh, row 3 the last two; others are fresh.
    assert out.behaviour_logprobs.tolist() == [
        *(0.0, -1 / 8, -1.5), *(-2.0, -2.5), -7 / 8, *(-9 / 8, -10 / 8),
    ]  # fmt: skip
    assert out.ages.tolist() == [9, 8, 0, 0, 0, 2, 2, 1]
    assert out.logprobs.tolist() == [-0.5, -1.0, -1.5, -2.0, -2.5, -3.0, -3.5, -4.0]


def test_drafts_that_say_no_more_were_drawn_an_epoch_ago_with_their_logprobs() -> None:
    out = with_origins(_rollouts(ROWS, ACCEPTED), _drafts(DRAFTS))
    assert out.behaviour_logprobs is not None
    assert out.ages is not None
    assert out.behaviour_logprobs.tolist() == [-1.0, -2.0, -1.5, -2.0, -2.5, -6.0, -7.0, -8.0]
    assert out.ages.tolist() == [1, 1, 0, 0, 0, 1, 1, 1]


def test_what_is_not_known_is_none() -> None:
    drafts = _drafts(DRAFTS, logprobs=None)
    out = with_origins(_rollouts(ROWS, ACCEPTED), drafts)
    assert out.behaviour_logprobs is None
    assert out.ages is not None
    assert int(out.ages.sum()) == 5
    assert kl_sum(out) == 0.0
    fresh = with_origins(_rollouts(ROWS, [0] * 4), drafts)
    assert fresh.behaviour_logprobs is not None
    assert torch.equal(fresh.behaviour_logprobs, fresh.logprobs)


def test_ages_stop_at_the_largest() -> None:
    ages = torch.tensor([0, 5, MAX_AGE - 1, MAX_AGE], dtype=torch.int16)
    assert aged(ages).tolist() == [1, 6, MAX_AGE, MAX_AGE]


def test_kl_by_hand() -> None:
    rollouts = _rollouts([[1, 2, 3]], [2])
    now = torch.tensor([math.log(0.5), math.log(0.2), -1.0])
    drawn = torch.tensor([math.log(0.25), math.log(0.4), -1.0])
    rollouts = replace(rollouts, logprobs=now, behaviour_logprobs=drawn)
    # r = 2: 2 - 1 - ln 2; r = 0.5: 0.5 - 1 + ln 2; r = 1: 0.
    assert kl_sum(rollouts) == pytest.approx((1 - math.log(2)) + (math.log(2) - 0.5), abs=1e-6)
    never = replace(rollouts, logprobs=torch.tensor([-math.inf, math.log(0.4), -1.0]))
    assert kl_sum(never) == pytest.approx(math.exp(-20) - 1 + 20, rel=1e-5)


def test_a_token_that_neither_policy_would_draw_adds_nothing_to_the_kl() -> None:
    """As with a top-p filter that left it out twice."""
    rollouts = _rollouts([[1, 2]], [2])
    now = torch.tensor([-math.inf, math.log(0.5)])
    drawn = torch.tensor([-math.inf, math.log(0.25)])
    rollouts = replace(rollouts, logprobs=now, behaviour_logprobs=drawn)
    assert kl_sum(rollouts) == pytest.approx(1 - math.log(2), abs=1e-6)


def test_kl_is_that_of_the_distributions_on_average() -> None:
    q, p = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.4, 0.4, 0.2])
    tokens = torch.multinomial(q, 200_000, replacement=True, generator=torch.manual_seed(0))
    rollouts = replace(
        _rollouts([[0] * tokens.numel()], [0]),
        logprobs=p.log()[tokens],
        behaviour_logprobs=q.log()[tokens],
    )
    expected = float((q * (q / p).log()).sum())
    assert kl_sum(rollouts) / tokens.numel() == pytest.approx(expected, rel=0.02)


def test_responses_are_counted_per_prompt() -> None:
    rollouts = _rollouts([[1, 2], [1, 2], [3], [3], [1, 2], [4]], [0] * 6)
    groups = ["a", "a", "a", "b", "b", "b"]
    nothing = Drafts.none(6)
    assert count_responses(groups, rollouts, nothing) == (2, 5, 5)
    # Prompt a knew [3] from another of its rows; what b knew is a's only, or the start of its own.
    cached = _drafts([[3], [], [9], [1], [], []])
    assert count_responses(groups, rollouts, cached) == (2, 5, 4)


SAMPLING = SamplingParams(max_tokens=6, stop_token_ids=(4,))


def _policy(seed: int, drift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 5, generator=generator)
    return logits + drift * torch.randn(5, 5, generator=generator)


@pytest.mark.parametrize("keep_logprobs", [True, False])
def test_origins_are_carried_through_epochs(keep_logprobs: bool) -> None:
    """Against a record of every token's first draw, kept beside the session."""
    rule = Lenient(0.5) if keep_logprobs else Coupled(0.5)
    engine = MarkovEngine(_policy(1))
    cache = RolloutCache(keep_logprobs=keep_logprobs, keep_behaviour=True)
    session = RolloutSession(engine, rule, cache=cache, seed=3)
    num_rows = 12
    drawn: list[list[tuple[float, int]]] = [[] for _ in range(num_rows)]
    oldest = 0
    for epoch in range(5):
        rollouts = session.rollout([[0], [1], [2]], 4, SAMPLING, step=epoch, epoch=epoch)
        assert rollouts.behaviour_logprobs is not None
        assert rollouts.ages is not None
        cu = rollouts.cu_response_lens.tolist()
        for row, accepted in enumerate(rollouts.accepted_lens.tolist()):
            fresh = rollouts.logprobs[cu[row] + accepted : cu[row + 1]].tolist()
            drawn[row] = drawn[row][:accepted] + [(value, epoch) for value in fresh]
            span = slice(cu[row], cu[row + 1])
            assert rollouts.behaviour_logprobs[span].tolist() == [v for v, _ in drawn[row]]
            assert rollouts.ages[span].tolist() == [epoch - born for _, born in drawn[row]]
        stats = rollouts.stats
        ages = [epoch - born for row in drawn for _, born in row]
        oldest = max(oldest, *ages)
        assert stats.sum_ages == sum(ages)
        assert stats.num_reused_tokens == sum(age > 0 for age in ages)
        assert stats.sum_kl_reused == pytest.approx(kl_sum(rollouts))
        assert (stats.sum_kl_reused > 0) == (stats.num_reused_tokens > 0)
        assert stats.num_groups == 3
        engine.update_weights([("logits", _policy(1, drift=0.3 * (epoch + 1)))])
    assert oldest > 2  # it took several epochs


def test_new_responses_are_those_that_the_cache_had_not() -> None:
    engine = MarkovEngine(_policy(1))
    session = RolloutSession(engine, Lenient(float("inf")), seed=3)
    first = session.rollout([[0], [1]], 4, SAMPLING, step=0, epoch=0).stats
    assert first.num_new_responses == first.num_distinct_responses
    again = session.rollout([[0], [1]], 4, SAMPLING, step=1, epoch=1).stats
    assert again.num_distinct_responses == first.num_distinct_responses
    assert (again.num_new_responses, again.new_per_prompt) == (0, 0.0)


def test_without_a_cache_everything_is_fresh() -> None:
    session = RolloutSession(MarkovEngine(_policy(1)), NoReuse(), seed=3)
    rollouts = session.rollout([[0]], 3, SAMPLING, step=0, epoch=0)
    assert rollouts.ages is not None
    assert not rollouts.ages.any()
    assert rollouts.behaviour_logprobs is not None
    assert torch.equal(rollouts.behaviour_logprobs, rollouts.logprobs)
    assert (rollouts.stats.mean_age, rollouts.stats.kl_reused) == (0.0, 0.0)


@pytest.mark.parametrize("share", [0.0, 0.125, 0.25, 0.5, 0.75, 1.0])
def test_a_share_of_each_group_is_fresh_and_all_take_turns(share: float) -> None:
    drafts = _drafts([[1, 2]] * 8)
    taken = np.stack(
        [
            taken_lens(drafts, np.arange(8), epoch, fresh_share=share).numpy() == 0
            for epoch in range(8)
        ]
    )
    assert taken.sum(1).tolist() == [8 * share] * 8  # of each group
    assert taken.sum(0).tolist() == [8 * share] * 8  # of each sample's epochs
    if share == 0.5:
        assert taken[0].tolist() == [False, True] * 4
        assert (taken[1] != taken[0]).all()


def test_drafts_with_a_token_that_is_too_old_are_left_alone() -> None:
    ages = torch.tensor([3, 1, 2, 2, 1], dtype=torch.int16)
    drafts = _drafts([[1, 2], [], [3, 4], [5]], ages=ages)
    for max_age, lens in ((1, [0, 0, 0, 1]), (2, [0, 0, 2, 1]), (3, [2, 0, 2, 1])):
        assert taken_lens(drafts, np.arange(4), 0, max_age=max_age).tolist() == lens
    assert taken_lens(drafts, np.arange(4), 0).tolist() == [2, 0, 2, 1]
    young = _drafts([[1, 2]])  # says no ages: all 1
    assert taken_lens(young, np.arange(1), 0, max_age=1).tolist() == [2]


@pytest.mark.parametrize("max_age", [MAX_AGE, MAX_AGE + 1, 40_000, 2**16, 10**12])
def test_no_age_is_above_a_limit_that_ages_cannot_reach(max_age: int) -> None:
    ages = torch.tensor([MAX_AGE, 1, 2], dtype=torch.int16)
    drafts = _drafts([[1, 2], [3]], ages=ages)
    assert taken_lens(drafts, np.arange(2), 0, max_age=max_age).tolist() == [2, 1]


def test_a_session_with_an_age_limit_reuses_no_older_token() -> None:
    oldest = []
    for max_age in (1, 2, None):
        session = RolloutSession(
            MarkovEngine(_policy(1)), Lenient(float("inf")), seed=3, max_age=max_age
        )
        ages = []
        for epoch in range(6):
            rollouts = session.rollout([[0]], 4, SAMPLING, step=epoch, epoch=epoch)
            assert rollouts.ages is not None
            ages.append(int(rollouts.ages.max()))
        oldest.append(ages)
    assert oldest == [[0, 1, 0, 1, 0, 1], [0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]]


def test_a_session_draws_its_share_afresh() -> None:
    session = RolloutSession(
        MarkovEngine(_policy(1)), Lenient(float("inf")), seed=3, fresh_share=0.5
    )
    session.rollout([[0], [1]], 4, SAMPLING, step=0, epoch=0)
    rollouts = session.rollout([[0], [1]], 4, SAMPLING, step=1, epoch=1)
    # Sample i is fresh in epoch e where i + e is odd.
    assert (rollouts.accepted_lens > 0).tolist() == [False, True] * 4
    assert rollouts.stats.num_drafts == 4
    # Rows find their turn by themselves, wherever they come.
    session.rollout_rows([[0]] * 2, [3, 0], SAMPLING, step=2, epoch=2)
    rows = session.rollout_rows([[0]] * 2, [3, 0], SAMPLING, step=3, epoch=3)
    assert (rows.accepted_lens > 0).tolist() == [True, False]


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        (Lenient(), {"fresh_share": 1.5}, "fresh_share: expected 0 <= value <= 1, got 1.5"),
        (Coupled(), {"fresh_share": 0.5}, "fresh_share: expected 0 with Coupled"),
        (Lenient(), {"max_age": 0}, "max_age: expected >= 1 or None"),
        (Lenient(), {"max_age": 1.5}, "max_age: expected an integer"),
    ],
)
def test_bad_limits_are_refused(rule: Lenient, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RolloutSession(MarkovEngine(_policy(1)), rule, **options)
