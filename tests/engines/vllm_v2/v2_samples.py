"""A tiny model, requests and what they gave, for the tests on Model Runner V2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from spec_rollout.acceptance import AcceptanceRule, Coupled
from spec_rollout.engines.vllm import ReuseRequest, extra_args

VOCAB = 64
EOS = 2
LLM_ARGS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "max_model_len": 128,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 256,
    "block_size": 32,
    "num_gpu_blocks_override": 64,
    "seed": 0,
    "disable_log_stats": True,
    "async_scheduling": False,
}


class Given(NamedTuple):
    """Responses: tokens, their log-probs, and why each ended."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    reasons: list[str]


def make_model(folder: Path) -> None:
    """A random float32 Qwen3 with visible preferences, and no certainties."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    Qwen3ForCausalLM(config).float().eval().save_pretrained(folder)


def random_prompts(lens: Sequence[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCAB, size=n).tolist() for n in lens]


def params(seed: int | None, **kw: Any) -> Any:
    """vLLM's SamplingParams."""
    from vllm import SamplingParams

    args = {"temperature": 1.0, "max_tokens": 12, "ignore_eos": True, **kw}
    return SamplingParams(seed=seed, detokenize=False, logprobs=0, **args)


def drafted(
    base: Any,
    draft: Sequence[int],
    rule: AcceptanceRule | None = None,
    *,
    key: int = 5,
    logprobs: np.ndarray | None = None,
) -> Any:
    """The same parameters with a draft."""
    request = ReuseRequest(
        key, Coupled() if rule is None else rule, np.array(draft, np.int32), logprobs
    )
    out = base.clone()
    out.extra_args = extra_args(request)
    return out


def generate(
    llm: Any, prompts: Sequence[Sequence[int]], sampling: Sequence[Any], **kw: Any
) -> Given:
    """`kw`: further arguments of `LLM.generate`."""
    outputs = llm.generate(
        [{"prompt_token_ids": list(p)} for p in prompts], list(sampling), use_tqdm=False, **kw
    )
    completions = [c for output in outputs for c in output.outputs]
    tokens = [list(c.token_ids) for c in completions]
    logprobs = [
        [at[token].logprob for at, token in zip(c.logprobs, c.token_ids, strict=True)]
        for c in completions
    ]
    return Given(tokens, logprobs, [c.finish_reason for c in completions])


def assert_same(found: Given, expected: Given) -> None:
    """Token for token; log-probs to the last bits, which depend on the rows of a product."""
    assert found.tokens == expected.tokens
    assert found.reasons == expected.reasons
    for a, b in zip(found.logprobs, expected.logprobs, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def wrong_at(tokens: Sequence[int], index: int) -> list[int]:
    """The same with another token there."""
    out = list(tokens)
    out[index] = 3 + (out[index] - 2) % (VOCAB - 3)
    return out


def mixed_drafts(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Of every kind: whole, wrong from the start, in the middle and late, none, too long, cut."""
    kinds = (
        lambda r: list(r),
        lambda r: wrong_at(r, 0),
        lambda r: wrong_at(r, len(r) // 2),
        lambda r: [],
        lambda r: [*r, 7, 7, 7, 7],
        lambda r: wrong_at(r, len(r) - 2),
        lambda r: list(r[: len(r) // 2]),
    )
    return [kinds[i % len(kinds)](row) for i, row in enumerate(rows)]


def core_of(llm: Any) -> Any:
    """The engine core, in this process."""
    return llm.llm_engine.engine_core.engine_core


def metrics_of(llm: Any) -> Any:
    """The worker's counters since the last call."""
    from spec_rollout.engines.vllm.metrics import ReuseMetrics

    (values,) = llm.collective_rpc("spec_rollout_metrics", args=(True,))
    return ReuseMetrics.from_dict(values)


def streamed(llm: Any, chunks: Sequence[tuple[Sequence[int], Any]]) -> list[list[int]]:
    """What each piece of a prompt gives that comes in pieces.

    As `AsyncLLM.generate` has them come of an async generator.
    """
    engine, client, given = llm.llm_engine, llm.llm_engine.engine_core, []
    for prompt, sampling in chunks:
        request = engine.input_processor.process_inputs(
            "session",
            {"prompt_token_ids": list(prompt)},
            sampling,
            engine.get_supported_tasks(),
            resumable=True,
        )
        client.add_request(request)
        tokens: list[int] = []
        is_over = False
        while not is_over:
            for output in client.get_output().outputs:
                tokens += output.new_token_ids
                is_over = output.finish_reason is not None
        given.append(tokens)
    client.abort_requests(["session"])
    for _ in range(3):
        client.get_output()
    return given
