"""Weight updates: the new policy is sampled from, and drafts of the old one are tested by it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm_samples import (
    EOS,
    LLM_ARGS,
    drafts_of,
    make_model,
    make_requests,
    random_prompts,
    rows_of,
)

from spec_rollout.acceptance import Coupled, Lenient
from spec_rollout.types import SamplingParams

PROMPTS = random_prompts(12, seed=31)
SAMPLING = SamplingParams(max_tokens=30, stop_token_ids=(EOS,))


@pytest.fixture
def engine_and_models(tmp_path: Path, vllm_installed: None) -> Any:
    from spec_rollout.engines.vllm import VLLMEngine

    old = make_model(tmp_path / "old", seed=0)
    new = make_model(tmp_path / "new", seed=0)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in new.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    new.save_pretrained(tmp_path / "new")
    return [VLLMEngine(str(tmp_path / n), llm_args=LLM_ARGS) for n in ("old", "new")], old, new


def test_updated_engine_is_an_engine_with_those_weights(engine_and_models: Any) -> None:
    (engine, fresh), old, new = engine_and_models
    requests = make_requests(PROMPTS)
    before = engine.rollout(requests, SAMPLING, Coupled())
    expected = fresh.rollout(requests, SAMPLING, Coupled())
    assert rows_of(before) != rows_of(expected)
    assert before.policy_version == 0

    engine.update_weights(new.named_parameters())
    after = engine.rollout(requests, SAMPLING, Coupled())
    assert after.policy_version == 1
    assert rows_of(after) == rows_of(expected)
    torch.testing.assert_close(after.logprobs, expected.logprobs, atol=2e-5, rtol=0)

    # Old rollouts as drafts: the new policy decides, and the old tokens change nothing.
    reused = engine.rollout(make_requests(PROMPTS, drafts_of(before)), SAMPLING, Coupled())
    assert rows_of(reused) == rows_of(expected)
    assert 0 < reused.stats.num_reused_tokens < before.stats.num_response_tokens
    lenient = engine.rollout(make_requests(PROMPTS, drafts_of(before), seed=1), SAMPLING, Lenient())
    assert 0 < lenient.stats.num_reused_tokens < before.stats.num_response_tokens

    engine.update_weights(old.named_parameters())
    assert rows_of(engine.rollout(requests, SAMPLING, Coupled())) == rows_of(before)


def test_tensors_are_handed_over_within_a_process_only(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = [("a", torch.arange(6.0).view(2, 3)[:, 1:])]
    assert next(engine._buckets(weights))[0][1] is weights[0][1]
    core = engine.llm.llm_engine.engine_core.engine_core
    monkeypatch.setattr(core, "model_executor", SimpleNamespace())  # with workers elsewhere
    (_, (dtype, shape, data)) = next(engine._buckets(weights))[0]
    assert (dtype, shape) == ("float32", [2, 2])
    assert torch.frombuffer(bytearray(data), dtype=torch.float32).tolist() == [1.0, 2.0, 4.0, 5.0]
