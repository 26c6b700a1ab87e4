"""What one would call instead, each prepared, checked and returned as a call to time.

Every function here imports its package itself, so that a missing one is an `ImportError` at that
peer alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace

import torch

Call = Callable[[], object]


def close(got: torch.Tensor, truth: torch.Tensor, tolerance: float) -> None:
    error = float((got.double() - truth.double()).abs().max())
    assert error <= tolerance, f"off by {error}"


def torch_log_softmax(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.float(), -1).gather(-1, ids[:, None])[:, 0]


def torch_logsumexp(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    x = logits.float()
    return x.gather(-1, ids[:, None])[:, 0] - x.logsumexp(-1)


def torch_sample(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A draw by exponential race, and its log-prob."""
    logp = torch.log_softmax(logits.float(), -1)
    ids = (logp.exp() / torch.empty_like(logp).exponential_()).argmax(-1)
    return ids, logp.gather(-1, ids[:, None])[:, 0]


def torch_verify(
    logits: torch.Tensor, drafts: torch.Tensor, draft_logprobs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lenient at 0 on drafts [batch, draft_len]: accepted lengths, next tokens, log-probs of the
    drafts."""
    batch, length = drafts.shape
    logp = torch.log_softmax(logits.float(), -1).view(batch, length + 1, -1)
    p = logp[:, :-1].gather(-1, drafts[..., None])[..., 0]
    accept = torch.rand_like(p).log() <= p - draft_logprobs
    n = accept.long().cumprod(1).sum(1)
    last = logp[torch.arange(batch, device=logits.device), n]
    ids = (last.exp() / torch.empty_like(last).exponential_()).argmax(-1)
    return n, ids, p


@functools.cache  # compiled once for all sizes
def compiled(function: Callable[..., object], dry: bool) -> Callable[..., object]:
    """`torch.compile` of a function, for sizes that change; eager in a dry run, where compiling
    takes minutes."""
    return function if dry else torch.compile(function, dynamic=True)


def liger_logprobs(logits: torch.Tensor, ids: torch.Tensor, truth: torch.Tensor) -> Call:
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    # It takes [batch, length + 1, vocab] and leaves out the last position of each row.
    padded = torch.cat([logits, logits[:1]])[None]

    def call() -> torch.Tensor:
        return fused_selective_log_softmax(padded, ids[None], 1.0, mask=None)

    close(call()[0][: len(truth)], truth, 5e-3)
    return call


def quack_logprobs(logits: torch.Tensor, ids: torch.Tensor, truth: torch.Tensor) -> Call:
    from quack.cross_entropy import cross_entropy

    def call() -> torch.Tensor:
        return cross_entropy(logits, ids, reduction="none")

    close(-call()[: len(truth)], truth, 5e-3)
    return call


def vllm_logprobs(logits: torch.Tensor, ids: torch.Tensor, truth: torch.Tensor) -> Call:
    from vllm.v1.worker.gpu.sample.logprob import compute_token_logprobs

    def call() -> torch.Tensor:
        return compute_token_logprobs(logits, ids[:, None])

    close(call()[: len(truth), 0], truth, 5e-3)
    return call


def draft_distribution(
    logits: torch.Tensor, drafts: torch.Tensor, accepted: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(draft_probs, target_probs), float32 [batch, length (+ 1), vocab], under which `accepted`
    tokens are accepted.

    The draft's distribution is the target's, and beyond the accepted length certain of a token that
    the target all but rules out.
    """
    batch, length = drafts.shape
    target = torch.softmax(logits.float(), -1).view(batch, length + 1, -1)
    draft = target[:, :-1].clone()
    if accepted < length:
        draft[:, accepted:] = 0.0
        draft[:, accepted:].scatter_(2, drafts[:, accepted:, None], 1.0)
    return draft, target


def vllm_rejection(logits: torch.Tensor, drafts: torch.Tensor, accepted: int) -> Call:
    """vLLM's stock sampler of drafts: float32 copy, softmax, accept, recover, and its own draw of
    the bonus token."""
    from vllm.v1.sample.rejection_sampler import rejection_sample

    batch, length = drafts.shape
    vocab = logits.shape[-1]
    draft_probs = draft_distribution(logits, drafts, accepted)[0].reshape(-1, vocab)
    flat = drafts.reshape(-1).int().contiguous()
    ends = torch.arange(1, batch + 1, device=logits.device, dtype=torch.int32) * length
    metadata = SimpleNamespace(
        all_greedy=False, all_random=True, generators={},
        temperature=torch.ones(batch, device=logits.device),
    )  # fmt: skip

    def call() -> torch.Tensor:
        rows = logits.view(batch, length + 1, vocab)
        bonus = torch.softmax(rows[:, -1].float(), -1)
        bonus = (bonus / torch.empty_like(bonus).exponential_()).argmax(-1, keepdim=True)
        target = rows[:, :-1].reshape(-1, vocab).float()
        return rejection_sample(
            flat, [length] * batch, length, ends, draft_probs, target, bonus.int(), metadata
        )

    assert bool(((call() >= 0).sum(1) == accepted + 1).all()), "accepted other lengths"
    return call


def flashinfer_chain(logits: torch.Tensor, drafts: torch.Tensor, accepted: int) -> Call:
    """FlashInfer's kernel on dense probabilities, and the softmax that makes the target's."""
    from flashinfer.sampling import chain_speculative_sampling

    batch, length = drafts.shape
    draft_probs, _ = draft_distribution(logits, drafts, accepted)
    ids = drafts.int().contiguous()

    def call() -> tuple[torch.Tensor, ...]:
        target = torch.softmax(logits.float(), -1).view(batch, length + 1, -1)
        return chain_speculative_sampling(draft_probs, ids, target)

    assert bool(((call()[0] >= 0).sum(1) == accepted + 1).all()), "accepted other lengths"
    return call
