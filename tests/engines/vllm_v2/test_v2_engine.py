"""`VLLMEngine` on Model Runner V2: rollouts as on any engine, the noise key being the seed."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from v2_samples import LLM_ARGS, Given, assert_same, generate, params, random_prompts

from spec_rollout.acceptance import Coupled, Lenient, NoReuse
from spec_rollout.keys import noise_keys, prompt_key
from spec_rollout.packed import cu_lens_from
from spec_rollout.types import (
    Drafts,
    FinishReason,
    History,
    RolloutRequests,
    Rollouts,
    SamplingParams,
)

PROMPTS = random_prompts([4, 12, 7, 21], seed=4)
SAMPLING = SamplingParams(temperature=0.8, top_k=30, max_tokens=10, stop_token_ids=(2,))


def requests(drafts: Drafts | None = None, history: History | None = None) -> RolloutRequests:
    ids = [np.array(p, np.int32) for p in PROMPTS]
    return RolloutRequests(
        prompt_ids=torch.from_numpy(np.concatenate(ids)),
        cu_prompt_lens=cu_lens_from(torch.tensor([len(p) for p in PROMPTS])),
        keys=noise_keys(0, 0, [prompt_key(p) for p in ids], np.arange(len(PROMPTS))),
        drafts=Drafts.none(len(PROMPTS)) if drafts is None else drafts,
        history=history,
    )


def drafts_of(rollouts: Rollouts) -> Drafts:
    return Drafts(
        rollouts.response_ids,
        rollouts.cu_response_lens,
        rollouts.logprobs,
        rollouts.finish_reasons == FinishReason.STOP,
    )


@pytest.fixture(scope="module")
def engine(reuse: Any) -> Any:
    from spec_rollout.engines.vllm import VLLMEngine

    return VLLMEngine.wrap(reuse)


@pytest.fixture(scope="module")
def plain(engine: Any) -> Rollouts:
    return engine.rollout(requests(), SAMPLING, NoReuse())


def test_rollouts_are_stock_vllms_with_the_keys_as_seeds(stock: Any, plain: Rollouts) -> None:
    kw = {"temperature": 0.8, "top_k": 30, "max_tokens": 10, "stop_token_ids": [2]}
    expected = generate(stock, PROMPTS, [params(k, **kw) for k in requests().keys.tolist()])
    cu = plain.cu_response_lens.tolist()
    rows = [slice(a, b) for a, b in pairwise(cu)]
    found = Given(
        [plain.response_ids[row].tolist() for row in rows],
        [plain.logprobs[row].tolist() for row in rows],
        ["stop" if r == FinishReason.STOP else "length" for r in plain.finish_reasons],
    )
    assert_same(found, expected)


def test_reuse_changes_steps_and_nothing_else(engine: Any, plain: Rollouts) -> None:
    again = engine.rollout(requests(drafts_of(plain)), SAMPLING, Coupled())
    assert torch.equal(again.response_ids, plain.response_ids)
    assert torch.equal(again.finish_reasons, plain.finish_reasons)
    torch.testing.assert_close(again.logprobs, plain.logprobs, atol=2e-5, rtol=0)
    assert torch.equal(again.accepted_lens.long(), plain.response_lens)
    stats = again.stats
    assert stats.num_reused_tokens == stats.num_draft_tokens == plain.response_ids.numel()
    assert stats.num_generated_tokens == 0
    assert stats.num_engine_steps < plain.stats.num_engine_steps
    # Whatever was drawn before: all of it is taken over.
    whole = engine.rollout(requests(drafts_of(plain)), SAMPLING, Lenient(float("inf")))
    assert torch.equal(whole.response_ids, plain.response_ids)


def test_new_weights(engine: Any, plain: Rollouts, model_dir: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir).float()
    old = {name: tensor.clone() for name, tensor in model.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    engine.update_weights(model.named_parameters())
    changed = engine.rollout(requests(drafts_of(plain)), SAMPLING, Coupled())
    assert 0 < changed.stats.num_reused_tokens < plain.response_ids.numel()
    context = [*PROMPTS[0], *changed.response_ids[: changed.cu_response_lens[1]].tolist()]
    with torch.no_grad():
        logits = model(torch.tensor([context])).logits[0, len(PROMPTS[0]) - 1 : -1] / 0.8
    kept = logits >= logits.topk(30, dim=-1).values[:, -1:]
    expected = logits.masked_fill(~kept, -torch.inf).log_softmax(-1)
    ids = torch.tensor(context[len(PROMPTS[0]) :])
    torch.testing.assert_close(
        changed.logprobs[: ids.numel()], expected.gather(1, ids[:, None])[:, 0], atol=1e-4, rtol=0
    )
    engine.update_weights(old.items())
    assert torch.equal(
        engine.rollout(requests(), SAMPLING, Coupled()).response_ids, plain.response_ids
    )


def test_a_history_changes_steps_and_nothing_else(engine: Any, plain: Rollouts) -> None:
    numbers = torch.arange(len(PROMPTS))
    history = History(
        plain.response_ids, plain.cu_response_lens, numbers, numbers, logprobs=plain.logprobs
    )
    assert engine.supports_history
    drawn = engine.rollout(requests(history=history), SAMPLING, NoReuse())
    assert torch.equal(drawn.response_ids, plain.response_ids)
    # The noise is that of the history, so what is guessed of it is right.
    assert drawn.stats.num_accepted_proposals > 10
    assert drawn.stats.num_engine_steps < plain.stats.num_engine_steps
    followed = engine.rollout(requests(drafts_of(plain), history), SAMPLING, Coupled())
    assert torch.equal(followed.response_ids, plain.response_ids)
    assert torch.equal(followed.accepted_lens.long(), plain.response_lens)
    assert engine.last_metrics.num_fully_reused == len(PROMPTS)
    lenient = engine.rollout(requests(drafts_of(plain), history), SAMPLING, Lenient(float("inf")))
    assert torch.equal(lenient.response_ids, plain.response_ids)
    # Nothing of it is left in the next call.
    again = engine.rollout(requests(), SAMPLING, NoReuse())
    assert torch.equal(again.response_ids, plain.response_ids)
    assert again.stats.num_engine_steps == plain.stats.num_engine_steps


def test_what_it_does_not_have(engine: Any, reuse: Any, make_llm: Any) -> None:
    from spec_rollout.engines.vllm import VLLMEngine

    assert not VLLMEngine.wrap(make_llm(8, async_scheduling=True)).supports_history
    with pytest.raises(ValueError, match="strategy: expected inflight on vLLM's Model Runner V2"):
        VLLMEngine.wrap(reuse, strategy="two_pass")


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logits"])
def test_log_probs_of_another_distribution_are_refused(
    reuse: Any, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    from spec_rollout.engines.vllm import VLLMEngine

    monkeypatch.setattr(reuse.llm_engine.vllm_config.model_config, "logprobs_mode", mode)
    with pytest.raises(
        ValueError, match=f"logprobs_mode: expected processed_logprobs .* got {mode}"
    ):
        VLLMEngine.wrap(reuse)


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size: expected 1, got 2"),
        ({"max_num_batched_tokens": 8}, "num_speculative_tokens: expected fewer than"),
        ({"first_chunk": 0}, "first_chunk: expected >= 1"),
    ],
)
def test_engines_that_cannot_be(model_dir: Any, kw: dict[str, Any], message: str) -> None:
    from spec_rollout.engines.vllm import VLLMEngine

    own = {k: kw.pop(k) for k in list(kw) if k == "first_chunk"}
    with pytest.raises(ValueError, match=message):
        VLLMEngine(str(model_dir), num_speculative_tokens=8, llm_args={**LLM_ARGS, **kw}, **own)
