"""History drafting in the embedded engine: fewer steps, never another token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from noise_watch import NoiseWatch
from tiny_models import (
    SAMPLING,
    STOP,
    assert_same,
    build,
    drafts_of,
    perturbed,
    random_requests,
    responses,
    with_drafts,
)

from spec_rollout import ops
from spec_rollout.acceptance import Coupled, Lenient, NoReuse, OneHot
from spec_rollout.drafting import Payoff
from spec_rollout.engines import TransformersEngine
from spec_rollout.packed import cu_lens_from
from spec_rollout.types import History, RolloutRequests, Rollouts, SamplingParams

BATCH, GROUP = 24, 4
GROUPS = torch.arange(BATCH) // GROUP
GREEDY = SamplingParams(temperature=0.0, max_tokens=40, stop_token_ids=(STOP,))


pytestmark = pytest.mark.usefixtures("even_steps")


def history_of(rows: list[list[int]], groups: torch.Tensor) -> History:
    return History(
        torch.tensor([token for row in rows for token in row], dtype=torch.int32),
        cu_lens_from(torch.tensor([len(row) for row in rows], dtype=torch.int64)),
        groups,
        GROUPS,
    )


@pytest.fixture(scope="module")
def old() -> tuple[RolloutRequests, Rollouts]:
    requests = random_requests(BATCH)
    return requests, TransformersEngine(build("qwen3")).rollout(requests, SAMPLING, NoReuse())


@pytest.fixture(scope="module")
def new_model() -> torch.nn.Module:
    return perturbed(build("qwen3"), 0.01)


@pytest.mark.parametrize("slots", [3, 64])
@pytest.mark.parametrize("rule", [NoReuse(), Coupled(), Lenient(0.5), OneHot()])
def test_tokens_and_logprobs_are_those_without(old, new_model, rule, slots) -> None:
    requests, rollouts = old
    requests = with_drafts(requests, drafts_of(rollouts))
    engine = TransformersEngine(new_model, num_slots=slots)
    expected = engine.rollout(requests, SAMPLING, rule)
    past = history_of(responses(rollouts), GROUPS)
    actual = engine.rollout(replace(requests, history=past), SAMPLING, rule)
    assert_same(actual, expected)
    stats = actual.stats
    assert 0 < stats.num_accepted_proposals <= stats.num_proposed_tokens
    # Not fewer, necessarily: the longest response may be one that no proposal was right for.
    assert stats.num_decode_steps <= expected.stats.num_decode_steps
    assert stats.max_row_steps <= expected.stats.max_row_steps
    assert stats.tokens_per_step > 1.0 == expected.stats.tokens_per_step
    assert stats.num_response_tokens == expected.stats.num_response_tokens


def test_nothing_is_proposed_where_it_does_not_pay(old, new_model, monkeypatch) -> None:
    requests, rollouts = old
    monkeypatch.setattr(Payoff, "pays", lambda self, rows: rows % 2 == 0)
    engine = TransformersEngine(new_model)
    expected = engine.rollout(requests, SAMPLING, NoReuse())
    requests = replace(requests, history=history_of(responses(rollouts), GROUPS))
    assert_same(engine.rollout(requests, SAMPLING, NoReuse()), expected)
    monkeypatch.setattr(Payoff, "pays", lambda self, rows: False)
    actual = engine.rollout(requests, SAMPLING, NoReuse())
    assert_same(actual, expected)
    assert actual.stats.num_proposed_tokens == 0
    assert actual.stats.num_decode_steps == expected.stats.num_decode_steps


@pytest.mark.slow
def test_steps_have_proposals_where_the_clock_says_that_it_pays(
    old, new_model, monkeypatch
) -> None:
    requests, rollouts = old
    requests = replace(requests, history=history_of(responses(rollouts), GROUPS))
    verify_prefix, now, test_seconds, num_tests = ops.verify_prefix, 0.0, 0.0, 0

    def verify(*args, **kwargs) -> ops.VerifyResult:
        nonlocal now, num_tests
        now += test_seconds
        num_tests += 1
        return verify_prefix(*args, **kwargs)

    def clock() -> float:
        nonlocal now
        now += 1.0  # what a step takes beside the test of its proposals
        return now

    monkeypatch.setattr(ops, "verify_prefix", verify)
    calls, tests = [], []
    for seconds in (0.0, 30.0):
        test_seconds = seconds
        engine = TransformersEngine(new_model)
        engine.clock = clock
        for _ in range(5):  # learns
            num_tests = 0
            call = engine.rollout(requests, SAMPLING, NoReuse())
        calls.append(call)
        tests.append(num_tests)
    assert_same(*calls)
    assert 2 * tests[1] < tests[0]


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        SamplingParams(temperature=0.7, top_k=5, max_tokens=25, stop_token_ids=(STOP,)),
        SamplingParams(top_p=0.8, max_tokens=1, stop_token_ids=(STOP,)),
        SamplingParams(max_tokens=2),
        SamplingParams(max_tokens=40, stop_token_ids=(STOP, 3, 4, 5)),
    ],
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_sliding"])
def test_sampling_and_limits(name: str, sampling: SamplingParams) -> None:
    """The very rollouts as history: proposals run up to every end there is."""
    engine = TransformersEngine(build(name), num_slots=5)
    requests = random_requests(BATCH)
    expected = engine.rollout(requests, sampling, NoReuse())
    past = history_of(responses(expected), GROUPS)
    actual = engine.rollout(replace(requests, history=past), sampling, NoReuse())
    assert_same(actual, expected)
    if sampling.max_tokens > 20:
        assert actual.stats.num_decode_steps < expected.stats.num_decode_steps


def test_the_noise_in_view_is_that_of_the_token(
    old, new_model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The drafter is told each request's key, and the position after all the tokens it has been
    given."""
    requests, rollouts = old
    engine = TransformersEngine(new_model, num_slots=7)
    past = replace(history_of(responses(rollouts), GROUPS), logprobs=rollouts.logprobs)
    requests = with_drafts(requests, drafts_of(rollouts))
    watch = NoiseWatch(monkeypatch, requests.keys.numpy())
    engine.rollout(replace(requests, history=past), SAMPLING, Coupled())
    assert len(watch.asked) > BATCH // 2
    watch.keys, greedy = None, replace(SAMPLING, temperature=0.0)  # there is no noise then
    engine.rollout(replace(requests, history=past), greedy, NoReuse())


def test_model_length(new_model) -> None:
    requests = random_requests(BATCH)
    longest = int(requests.cu_prompt_lens.diff().max())
    engine = TransformersEngine(new_model, max_model_len=longest + 9)
    expected = engine.rollout(requests, SAMPLING, NoReuse())
    past = history_of([row * 5 for row in responses(expected)], GROUPS)
    assert_same(engine.rollout(replace(requests, history=past), SAMPLING, NoReuse()), expected)


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(([], []), id="none"),
        pytest.param(([[7, 8, 9]], [0]), id="one"),
        pytest.param(([[6] * 3000], [2]), id="a loop"),
        pytest.param(([[], [], [5]], [0, 1, 1]), id="empty rows"),
        pytest.param(([[1, 2, 3]], [99]), id="a group without requests"),
    ],
)
def test_any_history_will_do(new_model, rows) -> None:
    engine = TransformersEngine(new_model, num_slots=7)
    requests = random_requests(BATCH)
    expected = engine.rollout(requests, SAMPLING, NoReuse())
    past = history_of(rows[0], torch.tensor(rows[1], dtype=torch.int64))
    assert_same(engine.rollout(replace(requests, history=past), SAMPLING, NoReuse()), expected)


def test_padded_forwards(new_model) -> None:
    """Without batch invariance rows are padded, and a token may flip where two are nearly tied."""
    requests = random_requests(BATCH)
    engine = TransformersEngine(new_model, num_slots=9, batch_invariant=False)
    expected = engine.rollout(requests, SAMPLING, NoReuse())
    past = history_of(responses(expected), GROUPS)
    actual = engine.rollout(replace(requests, history=past), SAMPLING, NoReuse())
    same = sum(a == b for a, b in zip(responses(actual), responses(expected), strict=True))
    assert same >= BATCH - 1
    assert actual.stats.num_decode_steps < expected.stats.num_decode_steps
    assert actual.stats.num_padding_tokens > 0


def test_history_of_other_requests_is_refused() -> None:
    requests = random_requests(BATCH)
    past = replace(history_of([], torch.empty(0, dtype=torch.int64)), request_groups=GROUPS[1:])
    with pytest.raises(ValueError, match=r"history\.request_groups: expected 24 requests, got 23"):
        replace(requests, history=past)
