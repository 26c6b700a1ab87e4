"""The baseline strategy gives what verification in flight gives, from more work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm_samples import (
    EOS,
    corrupted,
    make_requests,
    mixed_drafts,
    pack_drafts,
    random_prompts,
    rows_of,
)

from spec_rollout.acceptance import Coupled, Lenient, OneHot, RandomReuse
from spec_rollout.types import SamplingParams

PROMPTS = random_prompts(36, seed=41)
SAMPLING = SamplingParams(max_tokens=60, stop_token_ids=(EOS,))


@pytest.mark.parametrize("log_lenience", [0.0, 0.7, float("inf"), float("-inf")])
def test_same_rollouts_as_in_flight(engine: Any, make_engine: Any, log_lenience: float) -> None:
    two_pass = make_engine(strategy="two_pass")
    rule = Lenient(log_lenience)
    plain = engine.rollout(make_requests(PROMPTS), SAMPLING, rule)
    drafts = pack_drafts(mixed_drafts(rows_of(plain)), logprobs=-2.5)
    requests = make_requests(PROMPTS, drafts, seed=1)
    expected, found = (e.rollout(requests, SAMPLING, rule) for e in (engine, two_pass))
    assert rows_of(found) == rows_of(expected)
    assert found.accepted_lens.tolist() == expected.accepted_lens.tolist()
    assert found.finish_reasons.tolist() == expected.finish_reasons.tolist()
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=2e-5, rtol=0)
    for rollouts in (expected, found):  # reused tokens bring along what they were drawn with
        is_reused = rollouts.ages == 1
        assert int(is_reused.sum()) == rollouts.stats.num_reused_tokens
        assert bool((rollouts.behaviour_logprobs[is_reused] == -2.5).all())
        is_fresh = rollouts.ages == 0
        assert torch.equal(rollouts.behaviour_logprobs[is_fresh], rollouts.logprobs[is_fresh])
    if log_lenience == 0.0:
        assert 0 < expected.stats.num_reused_tokens < expected.stats.num_response_tokens
        assert found.stats.num_computed_tokens > expected.stats.num_computed_tokens


def test_what_it_cannot_decide_is_refused(make_engine: Any) -> None:
    two_pass = make_engine(strategy="two_pass")
    requests = make_requests(PROMPTS, pack_drafts(corrupted([[5, 6, 7]] * len(PROMPTS))))
    for rule in (Coupled(), OneHot()):
        with pytest.raises(ValueError, match="rule: expected Lenient"):
            two_pass.rollout(requests, SAMPLING, rule)
    with pytest.raises(ValueError, match="sampling: expected temperature 1"):
        two_pass.rollout(requests, SamplingParams(temperature=0.5, max_tokens=4), Lenient())
    two_pass.rollout(requests, SAMPLING, RandomReuse(1.0))


def test_strategies_are_named(make_engine: Any) -> None:
    with pytest.raises(
        ValueError, match="strategy: expected 'inflight' or 'two_pass', got 'third'"
    ):
        make_engine(strategy="third")
