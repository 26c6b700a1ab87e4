"""Losses over packed response tokens, as pure functions.

Sums over micro-batches give the loss of the whole minibatch: the weights of the tokens carry its
normalisation.
"""

from __future__ import annotations

import torch

from spec_rollout.train.algorithms.base import LossInputs, LossOutputs

_MAX_LOG_RATIO = 20.0
_ENTROPY_ELEMENTS = 1 << 24


def token_weights(response_lens: torch.Tensor, aggregation: str, max_tokens: int) -> torch.Tensor:
    """Weight of each token in a minibatch's loss; they sum to 1, of "constant" to less.

    Args:
        response_lens: Of all responses of the minibatch. [batch], integer, at least 1 each.
        aggregation: "token_mean": each token counts the same. "seq_mean": each response does (its
            tokens share). "constant": each token counts 1 / (responses * max_tokens).
        max_tokens: Longest response allowed.

    Returns:
        One weight per response; its tokens all have it. [batch], float32.
    """
    lens = response_lens.double()
    if aggregation == "token_mean":
        return (torch.ones_like(lens) / lens.sum()).float()
    if aggregation == "seq_mean":
        return (1.0 / (lens * lens.numel())).float()
    if aggregation == "constant":
        return torch.full_like(lens, 1.0 / (max_tokens * lens.numel())).float()
    raise ValueError(f"aggregation: expected token_mean, seq_mean or constant, got {aggregation!r}")


def k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """Estimate of a KL divergence that is never negative (Schulman, 2020).

    e^x - 1 - x for x = ln(other / sampled-from).
    """
    return torch.expm1(log_ratio) - log_ratio


def policy_loss(
    inputs: LossInputs, *, clip_low: float = 0.2, clip_high: float = 0.2, kl_coef: float = 0.0
) -> LossOutputs:
    """The clipped policy loss with a KL term.

        sum_t w_t * (-min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t) + kl_coef * k3_t)

    with r = new / old, and the min times `importance` where that is given: the objective of PPO
    (Schulman et al., 2017) with the two clip ranges of DAPO (arXiv 2503.14476) and GRPO's KL term
    (arXiv 2402.03300, eq. 4).

    Args:
        inputs: `ref_logprobs` is required if `kl_coef` > 0.
        clip_low, clip_high: Distances of the clip range from 1.
        kl_coef: Weight of the KL to the reference.

    Returns:
        Sums: `approx_kl`, the k3 estimate of KL(old || new); `clip_fraction`, tokens whose gradient
        the clip removes; with a reference `kl`, the k3 estimate of KL(new || reference).

    Raises:
        ValueError: if sizes differ, or the reference is missing.
    """
    logprobs, advantages, ref_logprobs = inputs.logprobs, inputs.advantages, inputs.ref_logprobs
    for name in ("old_logprobs", "advantages", "weights", "importance"):
        value = getattr(inputs, name)
        if value is not None and value.shape != logprobs.shape:
            raise ValueError(
                f"{name}: expected shape {list(logprobs.shape)} (logprobs), got {list(value.shape)}"
            )
    if kl_coef > 0 and (ref_logprobs is None or ref_logprobs.shape != logprobs.shape):
        got = None if ref_logprobs is None else list(ref_logprobs.shape)
        raise ValueError(
            f"ref_logprobs: expected shape {list(logprobs.shape)} with kl_coef > 0, got {got}"
        )
    # A ratio that overflows would turn the gradient of a clipped token into 0 * inf.
    log_ratio = (logprobs - inputs.old_logprobs).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    plain = ratio * advantages
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    per_token = -torch.minimum(plain, clipped)
    if inputs.importance is not None:
        per_token = per_token * inputs.importance
    sums: dict[str, torch.Tensor] = {}
    if ref_logprobs is not None:
        ref_kl = k3(ref_logprobs - logprobs)
        sums["kl"] = ref_kl.detach().sum()
        if kl_coef > 0:
            per_token = per_token + kl_coef * ref_kl
    with torch.no_grad():
        sums["clip_fraction"] = (clipped < plain).sum()
        sums["approx_kl"] = k3(log_ratio).sum()
    return LossOutputs((inputs.weights * per_token).sum(), sums)


def value_loss(inputs: LossInputs, *, clip: float = 0.5) -> LossOutputs:
    """The clipped value loss of PPO.

        sum_t w_t * 0.5 * max((V_t - R_t)^2, (V'_t - R_t)^2),   V' = clip(V, V_old +- clip)

    A value that moved farther than `clip` has no gradient where the move went towards the return.

    Args:
        inputs: `values`, `old_values` and `returns` are required.
        clip: Farthest move from the old value.

    Returns:
        Sums: `value_loss`, before its weight; `value_clip_fraction`, tokens whose gradient the clip
        removes.

    Raises:
        ValueError: if one of the three is missing or of another size.
    """
    values, old_values, returns = inputs.values, inputs.old_values, inputs.returns
    shape = inputs.logprobs.shape
    if values is None or old_values is None or returns is None:
        raise ValueError("values, old_values, returns: expected all three, got None")
    for name, given in (("values", values), ("old_values", old_values), ("returns", returns)):
        if given.shape != shape:
            raise ValueError(
                f"{name}: expected shape {list(shape)} (logprobs), got {list(given.shape)}"
            )
    clipped = torch.clamp(values, old_values - clip, old_values + clip)
    plain_error, clipped_error = (values - returns).square(), (clipped - returns).square()
    per_token = 0.5 * torch.maximum(plain_error, clipped_error)
    return LossOutputs(
        (inputs.weights * per_token).sum(),
        {
            "value_loss": per_token.detach().sum(),
            "value_clip_fraction": (clipped_error > plain_error).sum(),
        },
    )


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
