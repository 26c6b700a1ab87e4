"""With `Coupled`, drafts change the number of engine steps and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm_samples import (
    EOS,
    VOCAB,
    drafts_of,
    make_requests,
    mixed_drafts,
    pack_drafts,
    random_prompts,
    rows_of,
)

from spec_rollout.acceptance import Coupled, NoReuse
from spec_rollout.types import FinishReason, Rollouts, SamplingParams

SAMPLING = SamplingParams(max_tokens=60, stop_token_ids=(EOS,))
PROMPTS = random_prompts(36)


def assert_same(found: Rollouts, expected: Rollouts) -> None:
    assert rows_of(found) == rows_of(expected)
    assert torch.equal(found.finish_reasons, expected.finish_reasons)
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=2e-5, rtol=0)


@pytest.fixture(scope="module")
def plain(engine: Any) -> Rollouts:
    return engine.rollout(make_requests(PROMPTS), SAMPLING, NoReuse())


def test_plain_rollouts_end_for_both_reasons(plain: Rollouts) -> None:
    assert {int(r) for r in plain.finish_reasons} == {FinishReason.STOP, FinishReason.LENGTH}
    assert plain.accepted_lens.sum() == 0
    assert plain.stats.num_verified_tokens == 0


@pytest.mark.parametrize("k", [1, 7, 64, 200])
def test_tokens_do_not_depend_on_drafts_or_chunks(
    make_engine: Any, plain: Rollouts, k: int
) -> None:
    engine = make_engine(num_speculative_tokens=k, first_chunk=200)
    drafts = pack_drafts(mixed_drafts(rows_of(plain)))
    found = engine.rollout(make_requests(PROMPTS, drafts), SAMPLING, Coupled())
    assert_same(found, plain)
    # Accepted: as far as the draft agrees with the response, and no further.
    agree = [
        next((i for i, (a, b) in enumerate(zip(d, r, strict=False)) if a != b), min(len(d), len(r)))
        for d, r in zip(mixed_drafts(rows_of(plain)), rows_of(plain), strict=True)
    ]
    assert found.accepted_lens.tolist() == agree


@pytest.mark.parametrize("k", [1, 7, 64, 200])
def test_unchanged_policy_accepts_everything(make_engine: Any, plain: Rollouts, k: int) -> None:
    engine = make_engine(num_speculative_tokens=k, first_chunk=200)
    found = engine.rollout(make_requests(PROMPTS, drafts_of(plain)), SAMPLING, Coupled())
    assert_same(found, plain)
    assert torch.equal(found.accepted_lens.long(), plain.response_lens)
    stats = found.stats
    assert stats.num_generated_tokens == 0
    assert stats.num_fully_reused == int((plain.finish_reasons == FinishReason.STOP).sum())
    # The last token of each response is tested, but nothing needs its KV cache.
    assert stats.num_verified_tokens == plain.response_ids.numel() - len(PROMPTS)
    assert stats.num_engine_steps < plain.stats.num_engine_steps


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_preemption(make_engine: Any, plain: Rollouts, prefix_caching: bool) -> None:
    # 16 running requests of up to 100 tokens in 13 blocks of 32.
    engine = make_engine(num_gpu_blocks_override=14, enable_prefix_caching=prefix_caching)
    scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler
    preempt, count = scheduler._preempt_request, []

    def counting(*args: Any, **kw: Any) -> Any:
        count.append(1)
        return preempt(*args, **kw)

    scheduler._preempt_request = counting
    try:
        for rows in (rows_of(plain), mixed_drafts(rows_of(plain))):
            drafts = pack_drafts(rows)
            assert_same(engine.rollout(make_requests(PROMPTS, drafts), SAMPLING, Coupled()), plain)
        assert_same(engine.rollout(make_requests(PROMPTS), SAMPLING, Coupled()), plain)
    finally:
        scheduler._preempt_request = preempt
    assert len(count) > 10


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_tiny_token_budget_and_identical_prompts(make_engine: Any, prefix_caching: bool) -> None:
    engine = make_engine(
        num_speculative_tokens=40,
        max_num_batched_tokens=48,
        max_num_seqs=12,
        enable_prefix_caching=prefix_caching,
    )
    # Lengths that leave exactly one token after the cached blocks: vLLM makes up drafts for those.
    prompts = [p for p in random_prompts(4, seed=3, longest=70) for _ in range(4)]
    prompts += [random_prompts(1, seed=5)[0].repeat(40)[:33]] * 8
    plain = engine.rollout(make_requests(prompts), SAMPLING, Coupled())
    assert len({tuple(row) for row in rows_of(plain)[-8:]}) > 1  # equal prompts, different noise
    again = engine.rollout(make_requests(prompts), SAMPLING, Coupled())
    assert_same(again, plain)
    for rows in (rows_of(plain), mixed_drafts(rows_of(plain), seed=1)):
        found = engine.rollout(make_requests(prompts, pack_drafts(rows)), SAMPLING, Coupled())
        assert_same(found, plain)


def test_made_up_drafts_are_rejected(make_engine: Any) -> None:
    engine = make_engine(num_speculative_tokens=7)
    prompts = [random_prompts(1, seed=5)[0].repeat(40)[:33]] * 40
    before = engine.metrics.num_placeholder_tokens
    first = engine.rollout(make_requests(prompts), SAMPLING, Coupled())
    assert engine.metrics.num_placeholder_tokens > before
    uncached = make_engine(num_speculative_tokens=7, enable_prefix_caching=False)
    assert_same(first, uncached.rollout(make_requests(prompts), SAMPLING, Coupled()))


def test_500_requests_through_16_slots(engine: Any) -> None:
    prompts = random_prompts(500, seed=9)
    sampling = SamplingParams(max_tokens=24, stop_token_ids=(EOS,))
    plain = engine.rollout(make_requests(prompts), sampling, Coupled())
    drafts = pack_drafts(mixed_drafts(rows_of(plain)))
    found = engine.rollout(make_requests(prompts, drafts), sampling, Coupled())
    assert_same(found, plain)
    assert found.stats.num_engine_steps < plain.stats.num_engine_steps


def test_responses_up_to_the_model_length(engine: Any) -> None:
    prompts = [
        p.repeat(30)[:n]
        for p, n in zip(random_prompts(4, seed=2), (200, 250, 254, 255), strict=True)
    ]
    sampling = SamplingParams(max_tokens=500)
    plain = engine.rollout(make_requests(prompts), sampling, Coupled())
    assert [len(p) + len(r) for p, r in zip(prompts, rows_of(plain), strict=True)] == [256] * 4
    assert plain.finish_reasons.tolist() == [FinishReason.LENGTH] * 4
    drafts = pack_drafts([[*row, *([7] * 300)] for row in rows_of(plain)])
    found = engine.rollout(make_requests(prompts, drafts), sampling, Coupled())
    assert_same(found, plain)
    assert torch.equal(found.accepted_lens.long(), plain.response_lens)


def test_two_engines_in_one_process(make_engine: Any, plain: Rollouts) -> None:
    one, other = make_engine(), make_engine(num_speculative_tokens=7)
    drafts = pack_drafts(mixed_drafts(rows_of(plain)))
    for engine in (one, other, one):
        assert_same(engine.rollout(make_requests(PROMPTS, drafts), SAMPLING, Coupled()), plain)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0.0, max_tokens=40, stop_token_ids=(EOS,)),
        SamplingParams(temperature=0.7, top_k=20, max_tokens=40, stop_token_ids=(EOS, 9)),
        SamplingParams(temperature=1.5, top_p=0.8, max_tokens=40),
        SamplingParams(temperature=0.9, top_k=30, top_p=0.9, max_tokens=1),
    ],
    ids=["greedy", "top_k", "top_p", "one token"],
)
def test_sampling_parameters(engine: Any, sampling: SamplingParams) -> None:
    plain = engine.rollout(make_requests(PROMPTS), sampling, Coupled())
    drafts = pack_drafts(mixed_drafts(rows_of(plain)))
    assert_same(engine.rollout(make_requests(PROMPTS, drafts), sampling, Coupled()), plain)


def test_equal_to_the_transformers_engine(hf_model: Any, plain: Rollouts) -> None:
    from spec_rollout.engines.transformers import TransformersEngine
    from spec_rollout.ops.reference.noise import gumbel_noise

    expected = TransformersEngine(hf_model).rollout(make_requests(PROMPTS), SAMPLING, Coupled())
    same = 0
    keys = make_requests(PROMPTS).keys
    for r, (a, b) in enumerate(zip(rows_of(plain), rows_of(expected), strict=True)):
        if a == b:
            same += 1
            continue
        at = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
        ids = torch.tensor([[*PROMPTS[r].tolist(), *a[:at]]])
        with torch.no_grad():
            logits = hf_model(ids).logits[0, -1]
        scores = logits.double() + gumbel_noise(keys[r : r + 1], torch.tensor([at]), VOCAB)[0]
        gap = abs(float(scores[a[at]] - scores[b[at]]))
        print(f"row {r} token {at}: scores {scores[a[at]]:.6f} and {scores[b[at]]:.6f}")
        assert gap < 1e-4, f"row {r} differs at {at} and it is no near-tie"
    print(f"{same} of {len(PROMPTS)} rollouts identical")
    assert same >= 0.9 * len(PROMPTS)
    rows = [
        r for r, (a, b) in enumerate(zip(rows_of(plain), rows_of(expected), strict=True)) if a == b
    ]
    for r in rows:
        where = slice(*plain.cu_response_lens[r : r + 2].tolist())
        there = slice(*expected.cu_response_lens[r : r + 2].tolist())
        torch.testing.assert_close(
            plain.logprobs[where], expected.logprobs[there], atol=1e-4, rtol=0
        )
