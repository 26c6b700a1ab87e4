"""Reference of `spec_rollout.ops.accept_prefix`: the padded, masked way."""

from __future__ import annotations

import math

import torch

from spec_rollout.acceptance import AcceptanceRule, Lenient, OneHot
from spec_rollout.ops.reference.noise import accept_uniforms


def accept_mask(
    draft_logprobs: torch.Tensor | None,
    target_logprobs: torch.Tensor,
    uniforms: torch.Tensor,
    rule: AcceptanceRule,
) -> torch.Tensor:
    """The decision at every token, whatever came before; all arguments broadcast together."""
    p = target_logprobs.double()
    if isinstance(rule, OneHot):
        return uniforms.log() <= p
    if not isinstance(rule, Lenient):  # baselines keep what they were cut to
        return torch.ones_like(p, dtype=torch.bool) & (rule.kernel_params[1] > 0)
    log_lenience = rule.kernel_params[1]
    if math.isinf(log_lenience):
        return torch.full_like(p, log_lenience > 0, dtype=torch.bool)
    assert draft_logprobs is not None
    ratio = torch.where(p.isneginf(), p, p - draft_logprobs.double())
    accept = uniforms.log() <= rule.scale * (ratio + log_lenience)
    return accept & (p.exp() > rule.min_target_prob)


def accept_prefix(
    draft_logprobs: torch.Tensor | None,
    target_logprobs: torch.Tensor,
    draft_lens: torch.Tensor,
    *,
    rule: AcceptanceRule,
    keys: torch.Tensor,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """[batch, max_len] padded log-probs and [batch] lengths -> accepted_lens [batch], int32."""
    batch, width = target_logprobs.shape
    columns = torch.arange(width, device=keys.device)[None, :]
    start = torch.zeros(batch, dtype=torch.int64) if positions is None else positions.long()
    uniforms = accept_uniforms(keys[:, None], start.to(keys.device)[:, None] + columns)
    accept = accept_mask(draft_logprobs, target_logprobs, uniforms, rule)
    accept &= columns < draft_lens[:, None]
    return accept.long().cumprod(dim=1).sum(dim=1).int()
