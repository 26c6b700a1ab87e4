"""History drafting in vLLM: fewer engine steps, never another token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from noise_watch import NoiseWatch
from vllm_samples import (
    EOS,
    drafts_of,
    make_requests,
    mixed_drafts,
    pack_drafts,
    proposer_in,
    random_prompts,
    rows_of,
)

from spec_rollout.acceptance import AcceptanceRule, Coupled, Lenient, NoReuse, OneHot
from spec_rollout.drafting import Payoff, StepCost
from spec_rollout.packed import cu_lens_from
from spec_rollout.types import FinishReason, History, RolloutRequests, Rollouts, SamplingParams

GROUP = 4
SAMPLING = SamplingParams(max_tokens=60, stop_token_ids=(EOS,))
PROMPTS = [prompt for prompt in random_prompts(9) for _ in range(GROUP)]
BATCH = len(PROMPTS)
GROUPS = torch.arange(BATCH) // GROUP


@pytest.fixture(autouse=True)
def one_thread(vllm_installed: None) -> Iterator[None]:
    """With several, sums depend on the batch, and near-ties turn."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def fixed_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    """How much is proposed does not depend on how busy this machine is."""
    monkeypatch.setattr(Payoff, "threshold", lambda self, rows: 0.3)
    monkeypatch.setattr(Payoff, "worth", lambda self, rows, proposed, expected, **_: proposed > 0)
    monkeypatch.setattr(StepCost, "room", lambda self, rows: 10_000)
    monkeypatch.setattr(Payoff, "pays", lambda self, rows: True)


def history_of(rows: Sequence[Sequence[int]], groups: Sequence[int] | torch.Tensor) -> History:
    return History(
        torch.tensor([token for row in rows for token in row], dtype=torch.int32),
        cu_lens_from(torch.tensor([len(row) for row in rows], dtype=torch.int64)),
        torch.as_tensor(groups, dtype=torch.int64),
        GROUPS,
    )


def assert_same(found: Rollouts, expected: Rollouts) -> None:
    assert rows_of(found) == rows_of(expected)
    assert torch.equal(found.finish_reasons, expected.finish_reasons)
    assert torch.equal(found.accepted_lens, expected.accepted_lens)
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=2e-5, rtol=0)
    assert found.stats.num_reused_tokens == expected.stats.num_reused_tokens
    assert 0 <= found.stats.num_accepted_proposals <= found.stats.num_proposed_tokens
    assert found.stats.num_accepted_proposals <= found.stats.num_generated_tokens


def check(
    engine: Any,
    requests: RolloutRequests,
    past: History,
    sampling: SamplingParams = SAMPLING,
    rule: AcceptanceRule = NoReuse(),  # noqa: B008 (immutable)
) -> tuple[Rollouts, Rollouts]:
    """(with the history, without)."""
    expected = engine.rollout(requests, sampling, rule)
    found = engine.rollout(replace(requests, history=past), sampling, rule)
    assert_same(found, expected)
    assert expected.stats.num_proposed_tokens == 0
    return found, expected


@pytest.fixture(scope="module")
def plain(engine: Any) -> Rollouts:
    """Also the history of most tests: what the same noise gives again."""
    return engine.rollout(make_requests(PROMPTS), SAMPLING, NoReuse())


@pytest.mark.parametrize("k", [1, 7, 64])
@pytest.mark.parametrize("rule", [NoReuse(), Coupled(), Lenient(0.5), OneHot()], ids=str)
def test_tokens_are_those_without(
    make_engine: Any, plain: Rollouts, rule: AcceptanceRule, k: int
) -> None:
    drafts = pack_drafts(mixed_drafts(rows_of(plain)), logprobs=-1.5)
    found, expected = check(
        make_engine(num_speculative_tokens=k),
        make_requests(PROMPTS, drafts),
        history_of(rows_of(plain), GROUPS),
        rule=rule,
    )
    stats = found.stats
    if isinstance(rule, (NoReuse, Coupled)):  # the others have drawn other tokens by then
        assert stats.num_accepted_proposals > 0
        assert stats.num_engine_steps < expected.stats.num_engine_steps
        assert 0 < stats.max_row_steps <= expected.stats.max_row_steps
        assert stats.tokens_per_step > 1.0 == expected.stats.tokens_per_step


def test_drafts_are_counted_alike_in_chunks_and_as_proposals(engine: Any, plain: Rollouts) -> None:
    drafts = pack_drafts(mixed_drafts(rows_of(plain)), logprobs=-1.5)
    requests = make_requests(PROMPTS, drafts)
    engine.rollout(requests, SAMPLING, Coupled())
    chunks = engine.last_metrics
    past = history_of(rows_of(plain), GROUPS)
    engine.rollout(replace(requests, history=past), SAMPLING, Coupled())
    found = engine.last_metrics
    for name in ("num_drafts", "num_draft_tokens", "num_tested_tokens", "num_accepted_tokens"):
        assert getattr(found, name) == getattr(chunks, name), name
    assert found.num_fully_reused == chunks.num_fully_reused > 0
    np.testing.assert_array_equal(found.tested_at, chunks.tested_at)
    np.testing.assert_array_equal(found.accepted_at, chunks.accepted_at)
    assert 0 <= found.num_wasted_tokens <= found.num_verified_tokens


def test_far_fewer_steps_where_history_is_right(engine: Any, plain: Rollouts) -> None:
    past = history_of(rows_of(plain), GROUPS)
    found, expected = check(engine, make_requests(PROMPTS), past)
    assert found.stats.num_engine_steps < 0.6 * expected.stats.num_engine_steps
    assert found.stats.num_accepted_proposals > 0.5 * found.stats.num_generated_tokens
    assert found.stats.num_tail_steps <= found.stats.num_decode_steps
    assert expected.stats.tail_seconds >= 0.0


def test_the_live_siblings_alone_are_history(engine: Any) -> None:
    """Greedy samples of a prompt are all the same: what one has said, another will."""
    greedy = SamplingParams(temperature=0.0, max_tokens=80)
    found, expected = check(engine, make_requests(PROMPTS), history_of([], []), greedy)
    assert found.stats.num_accepted_proposals > 0
    assert found.stats.num_engine_steps < expected.stats.num_engine_steps


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_preemption(make_engine: Any, plain: Rollouts, prefix_caching: bool) -> None:
    engine = make_engine(num_gpu_blocks_override=14, enable_prefix_caching=prefix_caching)
    scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler
    preempt, count = scheduler._preempt_request, []

    def counting(*args: Any, **kw: Any) -> Any:
        count.append(1)
        return preempt(*args, **kw)

    scheduler._preempt_request = counting
    past = history_of(rows_of(plain), GROUPS)
    try:
        for rows in ([[]] * BATCH, mixed_drafts(rows_of(plain))):
            requests = make_requests(PROMPTS, pack_drafts(rows))
            found = engine.rollout(replace(requests, history=past), SAMPLING, Coupled())
            assert rows_of(found) == rows_of(plain)
            assert found.stats.num_accepted_proposals > 0
    finally:
        scheduler._preempt_request = preempt
    assert len(count) > 5


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_chunked_prefill(make_engine: Any, prefix_caching: bool) -> None:
    engine = make_engine(
        num_speculative_tokens=40,
        max_num_batched_tokens=48,
        max_num_seqs=12,
        enable_prefix_caching=prefix_caching,
    )
    # Lengths that leave exactly one token after the cached blocks: vLLM makes up drafts for those.
    prompts = [p for p in random_prompts(7, seed=3, longest=70) for _ in range(GROUP)]
    prompts += [random_prompts(1, seed=5)[0].repeat(40)[:33]] * 8
    first = engine.rollout(make_requests(prompts), SAMPLING, NoReuse())
    for past in (history_of(rows_of(first), GROUPS), history_of([], [])):
        check(engine, make_requests(prompts, drafts_of(first)), past, rule=Coupled())
        check(engine, make_requests(prompts), past)


@pytest.mark.parametrize(
    ("rows", "groups"),
    [
        pytest.param([], [], id="none"),
        pytest.param([[7, 8, 9]], [0], id="one sibling"),
        pytest.param([[6] * 3000], [2], id="a loop"),
        pytest.param([[], [], [5]], [0, 1, 1], id="empty rows"),
        pytest.param([[1, EOS, 3] * 20], [99], id="a group without requests"),
        pytest.param([[EOS] * 50], [0], id="stop tokens"),
    ],
)
def test_any_history_will_do(engine: Any, rows: list[list[int]], groups: list[int]) -> None:
    check(engine, make_requests(PROMPTS), history_of(rows, groups))


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0.0, max_tokens=40, stop_token_ids=(EOS,)),
        SamplingParams(temperature=0.7, top_k=20, max_tokens=25, stop_token_ids=(EOS, 9)),
        SamplingParams(top_p=0.8, max_tokens=1),
        SamplingParams(max_tokens=2),
        SamplingParams(max_tokens=40, stop_token_ids=(EOS, 3, 4, 5, 6, 7)),
    ],
    ids=["greedy", "top_k", "one token", "two tokens", "many stops"],
)
def test_sampling_stops_and_limits(engine: Any, sampling: SamplingParams) -> None:
    """The very rollouts as history: proposals run up to every end there is."""
    first = engine.rollout(make_requests(PROMPTS), sampling, NoReuse())
    check(engine, make_requests(PROMPTS), history_of(rows_of(first), GROUPS), sampling)
    limits = np.random.default_rng(0).integers(1, sampling.max_tokens + 1, BATCH).tolist()
    past = history_of(rows_of(first), GROUPS)
    args = (sampling, NoReuse(), limits)
    expected = engine.rollout_with_limits(make_requests(PROMPTS), *args)
    found = engine.rollout_with_limits(replace(make_requests(PROMPTS), history=past), *args)
    assert_same(found, expected)


def test_model_length(engine: Any) -> None:
    prompts = [
        p.repeat(30)[:n]
        for p, n in zip(random_prompts(9, seed=2), (200, 230, 240, 248) * 2 + (255,), strict=True)
        for _ in range(GROUP)
    ]
    sampling = SamplingParams(max_tokens=500)
    first = engine.rollout(make_requests(prompts), sampling, NoReuse())
    rows = [row * 5 for row in rows_of(first)]
    found, _ = check(engine, make_requests(prompts), history_of(rows, GROUPS), sampling)
    assert found.finish_reasons.tolist() == [FinishReason.LENGTH] * BATCH
    assert found.stats.num_accepted_proposals > 0


def test_the_noise_in_view_is_that_of_the_token(
    engine: Any, plain: Rollouts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The drafter is told each request's key, and the position after all its tokens."""
    drafts = pack_drafts(mixed_drafts(rows_of(plain)), logprobs=-1.5)
    requests = make_requests(PROMPTS, drafts)
    past = replace(history_of(rows_of(plain), GROUPS), logprobs=plain.logprobs)
    watch = NoiseWatch(monkeypatch, requests.keys.numpy())
    engine.rollout(replace(requests, history=past), SAMPLING, Coupled())
    assert len(watch.asked) > BATCH // 2
    watch.keys, greedy = None, replace(SAMPLING, temperature=0.0)  # there is no noise then
    engine.rollout(replace(requests, history=past), greedy, NoReuse())


def test_costs_are_measured(
    engine: Any, plain: Rollouts, even_steps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step of decoding is learnt from, and what it teaches is asked for."""
    sampler = proposer_in(engine).sampler
    monkeypatch.setattr(sampler.times, "payoff", payoff := Payoff())
    asked: list[int] = []
    monkeypatch.setattr(Payoff, "threshold", lambda self, rows: asked.append(rows) or 0.3)
    seen: list[tuple[int, int, float, int | None]] = []
    observe = Payoff.observe
    monkeypatch.setattr(
        Payoff,
        "observe",
        lambda self, *args: (self is payoff and seen.append(args), observe(self, *args))[1],
    )
    past = history_of(rows_of(plain), GROUPS)
    found, _ = check(engine, make_requests(PROMPTS), past)
    assert 0 < len(seen) <= found.stats.num_decode_steps
    assert sum(proposed for _, proposed, _, _ in seen) <= found.stats.num_proposed_tokens
    assert all(1 <= rows <= 16 and seconds == 2.0**-10 for rows, _, seconds, _ in seen)
    kept = [(accepted, proposed) for _, proposed, _, accepted in seen if accepted is not None]
    assert all(0 <= accepted <= proposed for accepted, proposed in kept)
    assert 0 < sum(accepted for accepted, _ in kept) <= found.stats.num_accepted_proposals
    assert set(asked) <= set(range(1, 17))
    assert len(asked) > 0


def test_nothing_is_proposed_where_it_does_not_pay(
    engine: Any, plain: Rollouts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Payoff, "threshold", lambda self, rows: 5.0)  # of those with much left, too
    past = history_of(rows_of(plain), GROUPS)
    found, expected = check(engine, make_requests(PROMPTS), past)
    for name in ("num_proposed_tokens", "num_accepted_proposals"):
        assert getattr(found.stats, name) == 0
    for name in ("num_engine_steps", "num_decode_steps", "num_computed_tokens", "max_row_steps"):
        assert getattr(found.stats, name) == getattr(expected.stats, name)


def test_history_is_forgotten(engine: Any, plain: Rollouts) -> None:
    sampler = proposer_in(engine).sampler
    requests = replace(make_requests(PROMPTS), history=history_of(rows_of(plain), GROUPS))
    seen: list[bool] = []
    engine.before_step = lambda: seen.append(sampler.record.history is not None)
    try:
        engine.rollout(requests, SAMPLING, NoReuse())
        assert all(seen)
        assert sampler.record.history is None

        def stop() -> None:
            seen.append(True)
            if len(seen) > steps + 4:
                raise KeyboardInterrupt

        steps, engine.before_step = len(seen), stop
        with pytest.raises(KeyboardInterrupt):
            engine.rollout(requests, SAMPLING, NoReuse())
    finally:
        engine.before_step = None
    assert sampler.record.history is None
    assert_same(engine.rollout(requests, SAMPLING, NoReuse()), plain)


def test_two_pass_refuses_history(make_engine: Any) -> None:
    engine = make_engine(strategy="two_pass")
    assert not engine.supports_history
    requests = replace(make_requests(PROMPTS), history=history_of([], []))
    with pytest.raises(ValueError, match="history: expected None with the strategy two_pass"):
        engine.rollout(requests, SAMPLING, Lenient(0.0))


def test_ranks_that_schedule_for_themselves_take_no_history(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spec_rollout.engines.vllm import VLLMEngine

    parallel = engine.llm.llm_engine.vllm_config.parallel_config
    monkeypatch.setattr(parallel, "distributed_executor_backend", "external_launcher")
    assert VLLMEngine.wrap(engine.llm).supports_history  # one rank
    monkeypatch.setattr(parallel, "tensor_parallel_size", 2)
    ranks = VLLMEngine.wrap(engine.llm)
    assert not ranks.supports_history
    requests = replace(make_requests(PROMPTS), history=history_of([], []))
    with pytest.raises(ValueError, match="history: expected None with external_launcher and tens"):
        ranks.rollout(requests, SAMPLING, NoReuse())


def test_history_outside_the_vocabulary_is_refused(engine: Any) -> None:
    requests = replace(make_requests(PROMPTS), history=history_of([[10_000]], [0]))
    with pytest.raises(ValueError, match=r"history\.token_ids: expected token ids from 0 to 63"):
        engine.rollout(requests, SAMPLING, NoReuse())
