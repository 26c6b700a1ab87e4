"""What is proposed depends on what steps take; the tests set the clock that says so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from vllm_samples import EOS, VOCAB, make_requests, proposer_in, random_prompts, rows_of

from spec_rollout.acceptance import NoReuse
from spec_rollout.drafting import Payoff
from spec_rollout.types import History, RolloutRequests, Rollouts, RolloutStats, SamplingParams

GROUP = 4
SAMPLING = SamplingParams(max_tokens=60, stop_token_ids=(EOS,))
PROMPTS = [prompt for prompt in random_prompts(9, seed=11) for _ in range(GROUP)]
GROUPS = torch.arange(len(PROMPTS)) // GROUP


class WorkClock:
    """A clock that only the model moves: by `per_step` seconds a step and `per_token` a token."""

    def __init__(self, record: Any, per_step: float, per_token: float) -> None:
        self.record = record
        self.per_step, self.per_token = per_step, per_token

    def __call__(self) -> float:
        metrics = self.record.metrics  # new ones in every call
        return (
            self.per_step * metrics.num_engine_steps + self.per_token * metrics.num_computed_tokens
        )


@pytest.fixture(scope="module")
def plain(engine: Any) -> Rollouts:
    return engine.rollout(make_requests(PROMPTS), SAMPLING, NoReuse())


@pytest.fixture(scope="module")
def with_history(plain: Rollouts) -> RolloutRequests:
    """A history that is right about most tokens, and not about every fourth."""
    ids = plain.response_ids
    wrong = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.25
    ids = torch.where(wrong, 3 + (ids + 1) % (VOCAB - 3), ids).to(torch.int32)
    history = History(ids, plain.cu_response_lens, GROUPS, GROUPS)
    return replace(make_requests(PROMPTS), history=history)


@pytest.fixture
def taught(engine: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`taught(requests, per_step, per_token)`: the rollout of an engine that knows such steps."""
    sampler = proposer_in(engine).sampler
    times = sampler.times

    def rollout(requests: RolloutRequests, per_step: float, per_token: float) -> Rollouts:
        clock = WorkClock(sampler.record, per_step, per_token)
        monkeypatch.setitem(vars(times), "clock", clock)
        monkeypatch.setattr(times, "payoff", Payoff())
        engine.rollout(requests, SAMPLING, NoReuse())
        return engine.rollout(requests, SAMPLING, NoReuse())

    return rollout


def test_how_much_is_proposed_depends_on_what_steps_take(
    plain: Rollouts, with_history: RolloutRequests, taught: Any
) -> None:
    """Where tokens take the time, only what is nearly sure breaks even; where steps do, proposals
    cost nothing."""
    calls: dict[str, RolloutStats] = {}
    for name, per_step, per_token in (("tokens", 0.0, 1.0), ("steps", 1.0, 0.0)):
        found = taught(with_history, per_step, per_token)
        assert rows_of(found) == rows_of(plain)
        calls[name] = found.stats
    tokens, steps = calls["tokens"], calls["steps"]
    assert 1.5 * tokens.num_proposed_tokens < steps.num_proposed_tokens
    assert tokens.num_engine_steps > steps.num_engine_steps


def test_the_tail_takes_what_its_steps_take(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tail of 36 requests begins with fewer than 3.6 of them running."""
    sampler = proposer_in(engine).sampler
    monkeypatch.setitem(vars(sampler.times), "clock", WorkClock(sampler.record, 1.0, 0.0))
    limits = [5] * (len(PROMPTS) - 1) + [60]
    sampling = SamplingParams(max_tokens=60)  # without stop tokens
    stats = engine.rollout_with_limits(make_requests(PROMPTS), sampling, NoReuse(), limits).stats
    assert 50 <= stats.num_tail_steps < 60
    assert stats.tail_seconds == stats.num_tail_steps
