from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
from scipy import stats

from spec_rollout.acceptance import (
    AcceptanceRule,
    Coupled,
    Lenient,
    NoReuse,
    OneHot,
    RandomCut,
    RandomReuse,
    RuleKind,
    Schedule,
)
from spec_rollout.keys import noise_keys, prompt_key

INF = math.inf


def _keys(count: int, noise_epoch: int = 0) -> torch.Tensor:
    return noise_keys(3, noise_epoch, [prompt_key([1, 2])] * count, range(count))


@pytest.mark.parametrize(
    ("rule", "needs_draft_logprobs", "uses_drafts", "fresh_noise", "lossless", "kernel_params"),
    [
        (Lenient(), True, True, True, False, (RuleKind.LENIENT, 0.0, 1.0, 0.0)),
        (Lenient(0.5, 2.0, 0.1), True, True, True, False, (RuleKind.LENIENT, 0.5, 2.0, 0.1)),
        (Lenient(INF), False, True, True, False, (RuleKind.LENIENT, INF, 1.0, 0.0)),
        (Lenient(-INF), False, False, True, False, (RuleKind.LENIENT, -INF, 1.0, 0.0)),
        (Coupled(), False, True, False, True, (RuleKind.COUPLED, 0.0, 1.0, 0.0)),
        (Coupled(0.3), False, True, False, False, (RuleKind.COUPLED, 0.3, 1.0, 0.0)),
        (Coupled(tolerance=0.2), False, True, False, False, (RuleKind.COUPLED, 0.2, 1.0, 0.0)),
        (
            Lenient(0.5, 2.0, tolerance=0.25),
            *(True, True, True, False),
            (RuleKind.LENIENT, 0.75, 2.0, 0.0),
        ),
        (OneHot(), False, True, True, True, (RuleKind.ONE_HOT, 0.0, 1.0, 0.0)),
        (RandomReuse(0.2), False, True, True, False, (RuleKind.LENIENT, INF, 1.0, 0.0)),
        (RandomCut(), False, True, True, False, (RuleKind.LENIENT, INF, 1.0, 0.0)),
        (NoReuse(), False, False, True, True, (RuleKind.LENIENT, -INF, 1.0, 0.0)),
    ],
    ids=lambda value: repr(value) if isinstance(value, AcceptanceRule) else "",
)
def test_what_each_rule_says_of_itself(
    rule: AcceptanceRule,
    needs_draft_logprobs: bool,
    uses_drafts: bool,
    fresh_noise: bool,
    lossless: bool,
    kernel_params: tuple[int, float, float, float],
) -> None:
    assert rule.needs_draft_logprobs is needs_draft_logprobs
    assert rule.uses_drafts is uses_drafts
    assert rule.fresh_noise is fresh_noise
    assert rule.lossless is lossless
    assert rule.kernel_params == kernel_params
    assert rule.kind == kernel_params[0]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Lenient(math.nan), r"log_lenience: expected a number, got NaN"),
        (lambda: Lenient(scale=0.0), r"scale: .*got 0.0"),
        (lambda: Lenient(scale=-1.0), r"scale: .*got -1.0"),
        (lambda: Lenient(scale=INF), r"scale: .*got inf"),
        (lambda: Lenient(scale=math.nan), r"scale: .*got nan"),
        (lambda: Lenient(min_target_prob=-0.1), r"min_target_prob: .*got -0.1"),
        (lambda: Lenient(min_target_prob=1.0), r"min_target_prob: .*got 1.0"),
        (lambda: Lenient(min_target_prob=math.nan), r"min_target_prob: .*got nan"),
        (lambda: Lenient(INF, min_target_prob=0.1), r"min_target_prob: expected 0 with .*got 0\.1"),
        (lambda: Coupled(math.nan), r"log_lenience: .*NaN"),
        (lambda: Coupled(-INF), r"log_lenience: expected > -inf.*NoReuse"),
        (lambda: Coupled(tolerance=-0.1), r"tolerance: expected a finite number >= 0.*got -0.1"),
        (lambda: Lenient(tolerance=INF), r"tolerance: .*got inf"),
        (lambda: Lenient(tolerance=math.nan), r"tolerance: .*got nan"),
        (lambda: Coupled(tolerance="most"), r"tolerance: expected nats or 'auto', got 'most'"),
        (lambda: Coupled(tolerance="auto").kernel_params, r"tolerance: .*'auto'.*RolloutSession"),
        (lambda: RandomReuse(-0.01), r"prob: .*got -0.01"),
        (lambda: RandomReuse(1.01), r"prob: .*got 1.01"),
        (lambda: RandomReuse(math.nan), r"prob: .*got nan"),
        (lambda: Schedule(OneHot(), 0.0, 5), r"start_log_lenience: .*got OneHot"),
        (lambda: Schedule(Lenient(INF), 0.0, 5), r"start_log_lenience: .*0.0 and inf"),
        (lambda: Schedule(Lenient(0.5), -INF, 5), r"start_log_lenience: .*-inf and 0.5"),
        (lambda: Schedule(Lenient(0.5), math.nan, 5), r"start_log_lenience: .*nan and 0.5"),
        (lambda: Schedule(Lenient(0.5), 0.0, 0), r"num_steps: .*got 0"),
    ],
)
def test_bad_rules_are_refused(make, match: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=match):
        make()


def test_rules_are_immutable_values() -> None:
    rule = Lenient(0.5)
    with pytest.raises(FrozenInstanceError):
        rule.log_lenience = 1.0  # type: ignore[misc]
    assert rule == Lenient(0.5)
    assert hash(rule) == hash(Lenient(0.5))
    assert rule != Coupled(0.5)


@pytest.mark.parametrize("rule", [Lenient(0.5, 2.0), Coupled(0.1)], ids=repr)
def test_a_measured_tolerance_takes_the_place_of_auto(rule: AcceptanceRule) -> None:
    auto = replace(rule, tolerance="auto")
    assert auto.needs_rounding
    assert not auto.lossless
    assert auto.with_tolerance(0.25) == replace(rule, tolerance=0.25)
    assert not rule.needs_rounding
    assert rule.with_tolerance(0.25) == rule
    assert OneHot().with_tolerance(0.25) == OneHot()


def test_a_schedule_is_linear_and_then_constant() -> None:
    schedule = Schedule(Lenient(0.5, scale=2.0), start_log_lenience=-1.5, num_steps=4)
    values = [schedule.at(step) for step in range(7)]
    assert [rule.log_lenience for rule in values] == [-1.5, -1.0, -0.5, 0.0, 0.5, 0.5, 0.5]
    assert {rule.scale for rule in values} == {2.0}
    coupled = Schedule(Coupled(0.0), start_log_lenience=1.0, num_steps=2)
    assert [coupled.at(step) for step in (0, 1, 2)] == [Coupled(1.0), Coupled(0.5), Coupled(0.0)]
    assert Schedule(OneHot()).at(10**9) == OneHot()


@pytest.mark.parametrize("rule", [Lenient(), Coupled(), OneHot()], ids=repr)
def test_rules_that_test_tokens_cut_nothing_beforehand(rule: AcceptanceRule) -> None:
    assert rule.cut_lens(torch.tensor([3, 0]), _keys(2)) is None


def test_no_reuse_cuts_everything() -> None:
    assert NoReuse().cut_lens(torch.tensor([3, 0]), _keys(2)).tolist() == [0, 0]


@pytest.mark.parametrize("prob", [0.05, 0.5, 0.9])
def test_random_reuse_keeps_whole_drafts_at_its_rate(prob: float) -> None:
    count = 100_000
    lens = torch.arange(count) % 7 + 1
    cut = RandomReuse(prob).cut_lens(lens, _keys(count))
    assert bool(((cut == lens) | (cut == 0)).all())
    kept = int((cut == lens).sum())
    assert stats.binomtest(kept, count, prob).pvalue > 1e-5
    # Whether a draft is kept has nothing to do with its length.
    table = [[int(((lens == n) & (cut == k * lens)).sum()) for n in range(1, 8)] for k in (0, 1)]
    assert stats.chi2_contingency(table).pvalue > 1e-5


def test_random_reuse_of_none_and_of_all_is_exact() -> None:
    lens = torch.full((100_000,), 5)
    assert not RandomReuse(0.0).cut_lens(lens, _keys(100_000)).any()
    assert torch.equal(RandomReuse(1.0).cut_lens(lens, _keys(100_000)), lens)


@pytest.mark.parametrize("length", [1, 2, 9, 100])
def test_random_cut_is_uniform_over_all_lengths_ends_included(length: int) -> None:
    count = 200_000
    cut = RandomCut().cut_lens(torch.full((count,), length), _keys(count)).numpy()
    assert cut.min() == 0
    assert cut.max() == length
    assert stats.chisquare(np.bincount(cut, minlength=length + 1)).pvalue > 1e-5


def test_random_cut_of_empty_drafts_is_empty_and_keeps_the_dtype() -> None:
    for dtype in (torch.int32, torch.int64):
        cut = RandomCut().cut_lens(torch.tensor([0, 4, 0], dtype=dtype), _keys(3))
        assert cut.dtype == dtype
        assert cut[0] == cut[2] == 0


def test_cuts_depend_on_the_key_alone_and_are_independent_between_epochs() -> None:
    lens = torch.full((20_000,), 3)
    keys = _keys(20_000)
    cut = RandomCut().cut_lens(lens, keys)
    order = torch.randperm(20_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(RandomCut().cut_lens(lens, keys[order]), cut[order])
    other = RandomCut().cut_lens(lens, _keys(20_000, noise_epoch=1))
    table = np.bincount((cut * 4 + other).numpy(), minlength=16).reshape(4, 4)
    assert stats.chi2_contingency(table).pvalue > 1e-5
    assert stats.chisquare(table.ravel()).pvalue > 1e-5
