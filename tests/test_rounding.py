"""What is measured of an engine whose filter moves by rounding."""

from __future__ import annotations

import json

import pytest
import torch
from markov_engine import MarkovEngine

from spec_rollout.acceptance import AcceptanceRule, Coupled
from spec_rollout.rollout import RolloutSession
from spec_rollout.rounding import Rounding
from spec_rollout.types import RolloutRequests, Rollouts, SamplingParams

SAMPLING = SamplingParams(top_p=0.9, max_tokens=8)
PROMPTS = [[1, 2], [3]]


class EdgeEngine(MarkovEngine):
    """Verification moves every log-prob by 1/64 and puts each `every`-th token outside of the
    nucleus."""

    def __init__(self, every: int) -> None:
        super().__init__(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))
        self.every = every

    def rollout(
        self, requests: RolloutRequests, sampling: SamplingParams, acceptance: AcceptanceRule
    ) -> Rollouts:
        rollouts = super().rollout(requests, sampling, acceptance)
        if requests.drafts.token_ids.numel():
            rollouts.logprobs.sub_(1 / 64)
            rollouts.logprobs[:: self.every] = -torch.inf
        return rollouts


def test_tokens_that_left_the_filter_are_not_compared() -> None:
    session = RolloutSession(EdgeEngine(4), Coupled(tolerance="auto"))
    found = session.measure_rounding(PROMPTS, 4, SAMPLING)
    assert found.num_tokens == 8 * 8 * 3 // 4
    for nats in (found.mean, found.largest, found.tolerance):
        assert nats == pytest.approx(1 / 64, abs=1e-6)
    assert Rounding.of_state(json.loads(json.dumps(found.state()))) == found


def test_a_run_goes_on_where_no_token_stayed_in_the_filter() -> None:
    session = RolloutSession(EdgeEngine(1), Coupled(tolerance="auto"))
    for step in range(2):
        session.rollout(PROMPTS, 4, SAMPLING, step=step, epoch=step)
    assert session.rounding is not None
    assert (session.rounding.num_tokens, session.rounding.tolerance) == (0, 0.0)
    assert Rounding.of_state(session.rounding.state()) == session.rounding
