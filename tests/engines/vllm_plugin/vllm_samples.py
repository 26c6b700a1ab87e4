"""Tiny models, engines and requests for the tests of the vLLM plugin."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spec_rollout.keys import noise_keys, prompt_key
from spec_rollout.packed import cu_lens_from
from spec_rollout.types import Drafts, FinishReason, RolloutRequests, Rollouts

VOCAB = 64
EOS = 2
LLM_ARGS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 2048,
    "block_size": 32,
    "num_gpu_blocks_override": 256,
    "seed": 0,
}


def make_model(folder: Path, *, seed: int = 0, **shape: int) -> Any:
    """A random float32 Qwen3, saved to `folder`; its preferences are visible, and no certainties."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 512,
    }
    config = Qwen3Config(
        **{**sizes, **shape},
        tie_word_embeddings=True,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config).float().eval()
    model.save_pretrained(folder)
    return model


def random_prompts(count: int, seed: int = 0, longest: int = 40) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [
        rng.integers(3, VOCAB, size=rng.integers(1, longest + 1)).astype(np.int32)
        for _ in range(count)
    ]


def make_requests(
    prompts: Sequence[np.ndarray], drafts: Drafts | None = None, *, seed: int = 0
) -> RolloutRequests:
    """Sample index = row, so that equal prompts get different noise."""
    batch = len(prompts)
    return RolloutRequests(
        prompt_ids=torch.from_numpy(np.concatenate(prompts)),
        cu_prompt_lens=cu_lens_from(torch.tensor([p.size for p in prompts])),
        keys=noise_keys(seed, 0, [prompt_key(p) for p in prompts], np.arange(batch)),
        drafts=Drafts.none(batch) if drafts is None else drafts,
    )


def pack_drafts(rows: Sequence[Sequence[int]], logprobs: float | None = 0.0) -> Drafts:
    """Drafts of the given tokens, all with the same log-prob."""
    ids = [np.asarray(row, np.int32) for row in rows]
    flat = torch.from_numpy(np.concatenate([np.empty(0, np.int32), *ids]))
    return Drafts(
        token_ids=flat,
        cu_lens=cu_lens_from(torch.tensor([row.size for row in ids])),
        logprobs=None if logprobs is None else torch.full(flat.shape, logprobs),
        finished=torch.tensor([bool(row.size and row[-1] == EOS) for row in ids]),
    )


def drafts_of(rollouts: Rollouts) -> Drafts:
    return Drafts(
        rollouts.response_ids,
        rollouts.cu_response_lens,
        rollouts.logprobs,
        rollouts.finish_reasons == FinishReason.STOP,
    )


def proposer_in(engine: Any) -> Any:
    """The proposer of an engine's only worker, in this process."""
    from spec_rollout.engines.vllm.compat import proposer_of

    core = engine.llm.llm_engine.engine_core.engine_core
    return proposer_of(core.model_executor.driver_worker.worker)


def even_steps(worker: Any) -> None:
    """Every step of a worker takes as long: what is proposed does not depend on the machine.

    To be sent by `collective_rpc`, where the worker is in another process.
    """
    from spec_rollout.engines.vllm.compat import proposer_of

    readings = itertools.count(0.0, 2.0**-10)
    proposer_of(worker).sampler.times.clock = lambda: next(readings)


def rows_of(rollouts: Rollouts) -> list[list[int]]:
    cu = rollouts.cu_response_lens.tolist()
    flat = rollouts.response_ids.tolist()
    return [flat[a:b] for a, b in pairwise(cu)]


def corrupted(rows: Sequence[Sequence[int]], seed: int = 0) -> list[list[int]]:
    """Each row with one token changed (somewhere) and none, some or many tokens appended or cut."""
    rng = np.random.default_rng(seed)
    out = []
    for row in rows:
        row = list(row)
        where = int(rng.integers(0, len(row)))
        row[where] = 3 + (row[where] + int(rng.integers(1, VOCAB - 3))) % (VOCAB - 3)
        if rng.random() < 0.3:
            row = row[: int(rng.integers(0, len(row) + 1))]
        elif rng.random() < 0.3:
            row += rng.integers(3, VOCAB, size=30).tolist()
        out.append(row)
    return out


def mixed_drafts(rows: Sequence[Sequence[int]], seed: int = 0) -> list[list[int]]:
    """Drafts of every kind for responses `rows`.

    Right, wrong somewhere, cut, empty, one token, EOS inside, too long.
    """
    rng = np.random.default_rng(seed)
    wrong = corrupted(rows, seed)
    kinds = (
        lambda r: list(rows[r]),
        lambda r: wrong[r],
        lambda r: [],
        lambda r: list(rows[r][:1]),
        lambda r: [rows[r][0] % (VOCAB - 3) + 3],
        lambda r: list(rows[r][: len(rows[r]) // 2]),
        lambda r: [*rows[r][: len(rows[r]) // 2], EOS, 5, 6, 7],
        lambda r: list(rows[r]) + rng.integers(3, VOCAB, size=400).tolist(),
        lambda r: [EOS],
    )
    return [kinds[r % len(kinds)](r) for r in range(len(rows))]
