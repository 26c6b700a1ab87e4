"""vLLM gets the requests first that may take longest; responses come back in the caller's order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from vllm_samples import EOS, drafts_of, make_requests, random_prompts

from spec_rollout.acceptance import Coupled, NoReuse
from spec_rollout.types import Drafts, SamplingParams

SAMPLING = SamplingParams(max_tokens=60, stop_token_ids=(EOS,))


def test_the_longest_are_submitted_first(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = make_requests(random_prompts(20, seed=5))
    plain = engine.rollout(requests, SAMPLING, NoReuse())
    lens = plain.response_lens.to(torch.int64)
    assert lens.unique().numel() > 3
    submitted: list[list[int]] = []
    submit = engine.submit

    def noted(prompts: list[dict[str, list[int]]], params: Any) -> list[Any]:
        submitted.extend(prompt["prompt_token_ids"] for prompt in prompts)
        return submit(prompts, params)

    monkeypatch.setattr(engine, "submit", noted)
    cu = requests.cu_prompt_lens.tolist()
    for rule, given in ((NoReuse(), Drafts.none(20)), (Coupled(), drafts_of(plain))):
        submitted.clear()
        told = engine.rollout(replace(requests, drafts=given, expected_lens=lens), SAMPLING, rule)
        assert torch.equal(told.response_ids, plain.response_ids)
        assert torch.equal(told.cu_response_lens, plain.cu_response_lens)
        assert torch.allclose(told.logprobs, plain.logprobs, atol=1e-5)
        order = (-lens).argsort(stable=True).tolist()
        assert order != list(range(20))
        ids = requests.prompt_ids.tolist()
        assert submitted == [ids[cu[row] : cu[row + 1]] for row in order]
