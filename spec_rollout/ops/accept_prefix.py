"""Accepted prefix lengths from log-probabilities."""

from __future__ import annotations

import torch

from spec_rollout._native import _C, num_threads
from spec_rollout.acceptance import AcceptanceRule, RuleKind
from spec_rollout.ops._faults import refuse
from spec_rollout.ops._registry import register_op
from spec_rollout.ops._status import after_launch, status_word


def accept_prefix(
    draft_logprobs: torch.Tensor | None,
    target_logprobs: torch.Tensor,
    *,
    rule: AcceptanceRule,
    keys: torch.Tensor,
    cu_draft_lens: torch.Tensor | None = None,
    draft_lens: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Length of the accepted prefix of each draft.

    Accepts draft token i while ln u_i <= scale * (log_lenience + target_logprobs_i -
    draft_logprobs_i) (SPEC-RL, arXiv 2509.23232, eq. 4), or, under `OneHot`, while ln u_i <=
    target_logprobs_i. u_i is uniform in (0, 1], a function of the row's key and the token's
    position alone. A row is not read past the first rejection (but for the vector it is in).

    Drafts are packed (`cu_draft_lens`) or padded (`draft_lens`).

    Args:
        draft_logprobs: Log-probability of each draft token under the policy that drew it.
            [num_draft_tokens], or [batch, max_draft_len] with a contiguous last dimension; float32.
            None if the rule does not read it.
        target_logprobs: The same under the current policy. Same shape, float32. -inf: the token
            cannot be drawn.
        rule: `Lenient`, `OneHot` or a baseline (which keep all of the draft: cut it first with
            `rule.cut_lens`).
        keys: Noise keys. [batch], int64.
        cu_draft_lens: Packed: row r is tokens cu[r]:cu[r + 1]. [batch + 1], int32 or int64, from 0,
            non-decreasing.
        draft_lens: Padded: tokens in each row. [batch], int32 or int64.
        positions: Response position of each row's first token; None for 0. [batch], int32 or int64.

    Returns:
        accepted_lens. [batch], int32.

    Raises:
        ValueError: naming the argument, what was expected and what was given.
    """
    try:
        if rule.kind is RuleKind.COUPLED:
            raise ValueError(
                "rule: expected a rule that tests log-probabilities, got Coupled "
                "(use verify_prefix)"
            )
        if (cu_draft_lens is None) == (draft_lens is None):
            given = "neither" if cu_draft_lens is None else "both"
            raise ValueError(
                f"cu_draft_lens, draft_lens: expected exactly one of them, got {given}"
            )
        if rule.needs_draft_logprobs and draft_logprobs is None:
            raise ValueError(
                f"draft_logprobs: expected a tensor for {type(rule).__name__}, got None"
            )
        kind, log_lenience, scale, min_target_prob = rule.kernel_params
        return _accept_prefix(
            draft_logprobs if rule.needs_draft_logprobs else None,
            target_logprobs,
            draft_lens,
            cu_draft_lens,
            keys,
            positions,
            kind,
            log_lenience,
            scale,
            min_target_prob,
        )
    except Exception as error:
        refuse(error, accept_prefix, locals())
        raise


def _accept_prefix_fake(
    draft_logprobs, target_logprobs, draft_lens, cu_draft_lens, keys, positions, *rule
):
    return keys.new_empty(keys.shape, dtype=torch.int32)


@register_op(
    "accept_prefix(Tensor? draft_logprobs, Tensor target_logprobs, Tensor? draft_lens, "
    "Tensor? cu_draft_lens, Tensor keys, Tensor? positions, int rule_kind, float log_lenience, "
    "float scale, float min_target_prob) -> Tensor",
    fake=_accept_prefix_fake,
)
def _accept_prefix(
    draft_logprobs,
    target_logprobs,
    draft_lens,
    cu_draft_lens,
    keys,
    positions,
    rule_kind,
    log_lenience,
    scale,
    min_target_prob,
):
    accepted_lens = torch.empty(keys.numel(), dtype=torch.int32, device=keys.device)
    _C.accept_prefix(
        draft_logprobs,
        target_logprobs,
        draft_lens,
        cu_draft_lens,
        keys,
        positions,
        (rule_kind, log_lenience, scale, min_target_prob),
        accepted_lens,
        status_word(target_logprobs),
        num_threads(),
    )
    after_launch(target_logprobs)
    return accepted_lens
