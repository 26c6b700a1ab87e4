"""The clipped policy loss over packed response tokens, as pure functions.

Sums over micro-batches give the loss of the whole minibatch: the weights of the tokens carry its
normalisation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

_MAX_LOG_RATIO = 20.0
_ENTROPY_ELEMENTS = 1 << 24


class LossOutput(NamedTuple):
    """Loss of the tokens given, and sums over them from which means over any number of
    micro-batches follow.

    Attributes:
        loss: Scalar, differentiable.
        num_clipped: Tokens whose gradient the clip removes. Scalar.
        kl_sum: Sum of the k3 estimate of KL(old || new) over tokens. Scalar.
        ref_kl_sum: Sum of the k3 estimate of KL(new || reference); 0 without a reference. Scalar.
    """

    loss: torch.Tensor
    num_clipped: torch.Tensor
    kl_sum: torch.Tensor
    ref_kl_sum: torch.Tensor


def token_weights(response_lens: torch.Tensor, aggregation: str) -> torch.Tensor:
    """Weight of each token in a minibatch's loss; they sum to 1.

    Args:
        response_lens: Of all responses of the minibatch. [batch], integer, at least 1 each.
        aggregation: "token_mean": each token counts the same. "seq_mean": each response does (its
            tokens share).

    Returns:
        One weight per response; its tokens all have it. [batch], float32.
    """
    lens = response_lens.double()
    if aggregation == "token_mean":
        return (torch.ones_like(lens) / lens.sum()).float()
    if aggregation == "seq_mean":
        return (1.0 / (lens * lens.numel())).float()
    raise ValueError(f"aggregation: expected token_mean or seq_mean, got {aggregation!r}")


def k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """Estimate e^x - 1 - x of a KL divergence from x = ln(other / sampled-from), never negative
    (Schulman, 2020)."""
    return torch.expm1(log_ratio) - log_ratio


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ref_logprobs: torch.Tensor | None = None,
    kl_coef: float = 0.0,
) -> LossOutput:
    """sum_t w_t * (-min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t) + kl_coef * k3_t), r =
    new / old.

    The clipped objective of PPO (Schulman et al., 2017) with the two clip ranges of DAPO (arXiv
    2503.14476) and GRPO's KL term (arXiv 2402.03300, eq. 4).

    Args:
        logprobs: Of the response tokens under the policy being trained. [num_tokens], float32,
            differentiable.
        old_logprobs: Under the policy that drew them. [num_tokens], float32.
        advantages: [num_tokens], float32.
        weights: See `token_weights`. [num_tokens], float32.
        clip_low, clip_high: Distances of the clip range from 1.
        ref_logprobs: Under the reference. [num_tokens], float32; required if `kl_coef` > 0.

    Raises:
        ValueError: if sizes differ, or the reference is missing.
    """
    for name, value in (
        ("old_logprobs", old_logprobs),
        ("advantages", advantages),
        ("weights", weights),
    ):
        if value.shape != logprobs.shape:
            raise ValueError(
                f"{name}: expected shape {list(logprobs.shape)} (logprobs), got {list(value.shape)}"
            )
    if kl_coef > 0 and (ref_logprobs is None or ref_logprobs.shape != logprobs.shape):
        got = None if ref_logprobs is None else list(ref_logprobs.shape)
        raise ValueError(
            f"ref_logprobs: expected shape {list(logprobs.shape)} with kl_coef > 0, got {got}"
        )
    # A ratio that overflows would turn the gradient of a clipped token into 0 * inf.
    log_ratio = (logprobs - old_logprobs).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    plain = ratio * advantages
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    per_token = -torch.minimum(plain, clipped)
    ref_kl_sum = logprobs.new_zeros(())
    if ref_logprobs is not None:
        ref_kl = k3(ref_logprobs - logprobs)
        ref_kl_sum = ref_kl.detach().sum()
        if kl_coef > 0:
            per_token = per_token + kl_coef * ref_kl
    with torch.no_grad():
        num_clipped = (clipped < plain).sum()
        kl_sum = k3(log_ratio).sum()
    return LossOutput((weights * per_token).sum(), num_clipped, kl_sum, ref_kl_sum)


def logprobs_and_entropy(
    logits: torch.Tensor, token_ids: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the tokens (differentiable) and the entropy at each position (not), in nats.

    Args:
        logits: [num_tokens, vocab], any floating type; the arithmetic is float32.
        token_ids: [num_tokens], int64.
        temperature: Of the sampling distribution, positive.

    Returns:
        logprobs [num_tokens], float32; entropy [num_tokens], float32.
    """
    logits = logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    logp = torch.log_softmax(logits, dim=-1)
    # In slices: whole, its temporaries would be the largest tensors of a training step.
    rows = max(1, _ENTROPY_ELEMENTS // logp.shape[-1])
    entropy = torch.cat([_entropy(part) for part in logp.detach().split(rows)])
    return logp.gather(-1, token_ids[:, None]).squeeze(-1), entropy


def _entropy(logp: torch.Tensor) -> torch.Tensor:
    # A masked token has p = 0 and ln p = -inf, whose product would be NaN.
    return -(logp.exp() * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(-1)
