"""Tiny random models and requests for the engine tests."""

from __future__ import annotations

import copy
import itertools

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from spec_rollout.packed import cu_lens_from
from spec_rollout.types import Drafts, RolloutRequests, Rollouts, SamplingParams

VOCAB = 32
STOP = 1
SAMPLING = SamplingParams(max_tokens=40, stop_token_ids=(STOP,))
# No special tokens: `generate` must not stop by itself.
_NO_SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.25,
    **_NO_SPECIAL,
}


def build(name: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A float32 model in evaluation mode."""
    torch.manual_seed(seed)
    if name == "qwen3":  # grouped heads, norms of queries and keys
        config = Qwen3Config(**{**_SHAPE, "num_key_value_heads": 2, "head_dim": 16, **changes})
        return Qwen3ForCausalLM(config).eval()
    if name == "qwen3_sliding":  # one layer of two sees a window
        layers = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
        return build("qwen3", seed, **{**layers, **changes})
    if name == "llama":
        config = LlamaConfig(**{**_SHAPE, "num_key_value_heads": 4, **changes})
        return LlamaForCausalLM(config).eval()
    if name == "mistral_sliding":  # all layers see a window
        config = MistralConfig(
            **{**_SHAPE, "num_key_value_heads": 2, "sliding_window": 8, **changes}
        )
        return MistralForCausalLM(config).eval()
    if name == "gpt2":  # learned positions, other projections
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
        config = GPT2Config(
            **{"vocab_size": VOCAB, "initializer_range": 0.25, **_NO_SPECIAL, **shape, **changes}
        )
        return GPT2LMHeadModel(config).eval()
    raise ValueError(name)


def perturbed(model: PreTrainedModel, scale: float, seed: int = 1) -> PreTrainedModel:
    """The model after a random step of its weights."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)
    return other


def random_requests(batch: int, *, seed: int = 2, longest: int = 20) -> RolloutRequests:
    """Prompts of 1 to `longest` random tokens without drafts."""
    generator = torch.Generator().manual_seed(seed)
    lens = torch.randint(1, longest + 1, (batch,), generator=generator)
    ids = torch.randint(2, VOCAB, (int(lens.sum()),), generator=generator, dtype=torch.int32)
    keys = torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator)
    return RolloutRequests(ids, cu_lens_from(lens), keys, Drafts.none(batch))


def with_drafts(requests: RolloutRequests, drafts: Drafts) -> RolloutRequests:
    return RolloutRequests(requests.prompt_ids, requests.cu_prompt_lens, requests.keys, drafts)


def first_rows(requests: RolloutRequests, count: int) -> RolloutRequests:
    """The first `count` requests with their drafts."""
    drafts = requests.drafts
    num_prompt_tokens, num_draft_tokens = requests.cu_prompt_lens[count], drafts.cu_lens[count]
    return RolloutRequests(
        requests.prompt_ids[:num_prompt_tokens],
        requests.cu_prompt_lens[: count + 1],
        requests.keys[:count],
        Drafts(
            drafts.token_ids[:num_draft_tokens],
            drafts.cu_lens[: count + 1],
            drafts.logprobs[:num_draft_tokens],
            drafts.finished[:count],
        ),
    )


def with_keys(requests: RolloutRequests, seed: int) -> RolloutRequests:
    """The same requests with other noise."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(-(2**63), 2**63 - 1, (requests.batch,), generator=generator)
    return RolloutRequests(requests.prompt_ids, requests.cu_prompt_lens, keys, requests.drafts)


def drafts_of(rollouts: Rollouts) -> Drafts:
    """Responses as the next call's drafts."""
    return Drafts(
        token_ids=rollouts.response_ids,
        cu_lens=rollouts.cu_response_lens,
        logprobs=rollouts.logprobs,
        finished=rollouts.finish_reasons == 0,
    )


def draft_rows(rows: list[list[int]], logprob: float | None = -1.0) -> Drafts:
    """Drafts from lists, every token with the same log-prob."""
    tokens = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
    return Drafts(
        token_ids=tokens,
        cu_lens=cu_lens_from(torch.tensor([len(row) for row in rows])),
        logprobs=None if logprob is None else torch.full(tokens.shape, logprob),
        finished=torch.tensor([bool(row) and row[-1] == STOP for row in rows]),
    )


def responses(rollouts: Rollouts) -> list[list[int]]:
    cu = rollouts.cu_response_lens.tolist()
    ids = rollouts.response_ids.tolist()
    return [ids[a:b] for a, b in itertools.pairwise(cu)]


def prompts(requests: RolloutRequests) -> list[list[int]]:
    cu = requests.cu_prompt_lens.tolist()
    ids = requests.prompt_ids.tolist()
    return [ids[a:b] for a, b in itertools.pairwise(cu)]


def assert_same(a: Rollouts, b: Rollouts) -> None:
    """Tokens, log-probs (every bit) and reasons agree."""
    assert responses(a) == responses(b)
    assert torch.equal(a.logprobs, b.logprobs)
    assert torch.equal(a.finish_reasons, b.finish_reasons)


@torch.no_grad()
def full_logprobs(
    model: PreTrainedModel, prompt: list[int], response: list[int], temperature: float = 1.0
) -> torch.Tensor:
    """Log-probs of the response by one plain forward over prompt and response."""
    ids = torch.tensor([prompt + response], device=model.device)
    logits = model(ids).logits[0].double().cpu() / temperature
    rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return rows.gather(1, torch.tensor(response)[:, None])[:, 0].float()
