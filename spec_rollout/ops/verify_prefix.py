"""Verification of drafts against the target's logits, and the token after each accepted prefix."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from spec_rollout._native import _C, num_threads
from spec_rollout.acceptance import AcceptanceRule
from spec_rollout.ops._faults import refuse
from spec_rollout.ops._impl import implementation, triton_module
from spec_rollout.ops._registry import register_op
from spec_rollout.ops._sampling import split_sampling
from spec_rollout.ops._status import after_launch, after_triton, status_word


class VerifyResult(NamedTuple):
    """What `verify_prefix` returns. The three may be parts of one allocation.

    Attributes:
        accepted_lens: Draft tokens accepted in each row. [batch], int32.
        next_token_ids: The token after the accepted prefix: drawn in place of the first rejected
            token, or from the bonus logits after a draft that was accepted whole; -1 where there
            are none. [batch], int32.
        logprobs: Per logits row, natural log, sampling distribution: of the draft token where it
            was accepted, of the next token at the row after; NaN where nothing was decided.
            [num_logits_rows], float32.
    """

    accepted_lens: torch.Tensor
    next_token_ids: torch.Tensor
    logprobs: torch.Tensor


def verify_prefix(
    logits: torch.Tensor,
    draft_ids: torch.Tensor,
    cu_draft_lens: torch.Tensor,
    *,
    rule: AcceptanceRule,
    keys: torch.Tensor,
    positions: torch.Tensor | None = None,
    draft_logprobs: torch.Tensor | None = None,
    cu_logits_lens: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    top_k: int | torch.Tensor = 0,
    top_p: float | torch.Tensor = 1.0,
    impl: Literal["native", "triton"] = "native",
) -> VerifyResult:
    """Tests drafts token by token and draws the token after each accepted prefix.

    With p the sampling distribution of a logits row (see `sample_tokens`), y the drafted token, u
    and g the noise of (key, position), a draft token is accepted

    - under `Lenient` iff ln u <= scale * (log_lenience + ln p_y - ln q_y), q_y from
      `draft_logprobs` (SPEC-RL, arXiv 2509.23232, eq. 4); after a rejection the token is drawn from
      p;
    - under `Coupled` iff y = argmax_v(logits_v / temperature + g_v), `log_lenience` added for v =
      y; after a rejection the token is that argmax. At log_lenience 0 the result is what
      `sample_tokens` gives, whatever the draft;
    - under `OneHot` iff ln u <= ln p_y; after a rejection the token is drawn from p without y
      (Leviathan et al., 2023).

    A decision depends on the key and the response position alone: a draft verified in chunks (with
    `positions` moved on) gives the same tokens. Logits stay in their dtype. On CPU each row comes
    from memory once, and rows after a draft's first rejection are not read; on CUDA a few of these
    may be, and the row a token is drawn from is read again.

    Args:
        logits: One row per draft token, predicting it, and optionally one more (the bonus row) per
            draft. [num_logits_rows, vocab]; float32, float16 or bfloat16; the last dimension
            contiguous.
        draft_ids: Packed draft tokens. [num_draft_tokens], int32 or int64, in [0, vocab).
        cu_draft_lens: Draft r is tokens cu[r]:cu[r + 1]. [batch + 1], int32 or int64, from 0,
            non-decreasing.
        rule: The acceptance rule. Baselines keep all of the draft: cut it first with
            `rule.cut_lens`.
        keys: Noise keys (`spec_rollout.keys.noise_keys`). [batch], int64.
        positions: Response position of each draft's first token, 0-based; None for 0. [batch],
            int32 or int64.
        draft_logprobs: Natural log, of the drafted tokens under the policy that drew them.
            [num_draft_tokens], float32. Needed by `Lenient` with a finite log_lenience; not read by
            other rules.
        cu_logits_lens: Row r's logits are rows cu[r]:cu[r + 1], as many as its draft tokens or one
            more. None: one more everywhere. [batch + 1], int32 or int64.
        temperature: Positive; or 0, greedy: a draft token is accepted iff it is the argmax of the
            logits, under every rule (log_lenience = inf still accepts all, -inf nothing). A number,
            or [batch] float32.
        top_k: 0 is off. A number, or [batch] int32 or int64.
        top_p: In (0, 1]; 1 is off. A number, or [batch] float32. Vocabularies up to 2**23 if used.
        impl: "native" (C++ and CUDA) or "triton" (CUDA tensors; on CPU only in Triton's
            interpreter, for tests). Both take the same decisions from the same noise.

    Returns:
        accepted_lens [batch] int32, next_token_ids [batch] int32, logprobs [num_logits_rows]
        float32.

    Raises:
        ValueError: naming the argument, what was expected and what was given: shapes, dtypes,
            devices, parameters out of range, logits or a temperature that require a gradient
            (where torch keeps gradients: there is no derivative), and, on CPU (on CUDA: by
            `check_status`), offsets, ids outside the vocabulary, NaN or +inf logits and rows
            without a finite logit (in rows that are read), NaN log-probs.
        ImportError: if impl is "triton" and triton is not installed.
    """
    try:
        op = _verify_prefix if impl == "native" else implementation(_IMPLEMENTATIONS, impl)
        needs_draft_logprobs = rule.needs_draft_logprobs
        if needs_draft_logprobs and draft_logprobs is None:
            raise ValueError(
                f"draft_logprobs: expected a tensor for {type(rule).__name__}, got None"
            )
        kind, log_lenience, scale, min_target_prob = rule.kernel_params
        return VerifyResult._make(
            op(
                logits,
                draft_ids,
                cu_draft_lens,
                draft_logprobs if needs_draft_logprobs else None,
                cu_logits_lens,
                keys,
                positions,
                *split_sampling(temperature, top_k, top_p),
                kind,
                log_lenience,
                scale,
                min_target_prob,
            )
        )
    except Exception as error:
        refuse(error, verify_prefix, locals())
        raise


_INT32 = torch.empty(0, dtype=torch.int32)


def _verify_prefix_fake(
    logits, draft_ids, cu_draft_lens, draft_logprobs, cu_logits_lens, keys, *args
):
    return (
        logits.new_empty(keys.shape, dtype=torch.int32),
        logits.new_empty(keys.shape, dtype=torch.int32),
        logits.new_empty(logits.shape[:1], dtype=torch.float32),
    )


_SCHEMA = (
    "(Tensor logits, Tensor draft_ids, Tensor cu_draft_lens, Tensor? draft_logprobs, "
    "Tensor? cu_logits_lens, Tensor keys, Tensor? positions, Tensor? temperatures, float "
    "temperature, "
    "Tensor? top_ks, int top_k, Tensor? top_ps, float top_p, int rule_kind, float log_lenience, "
    "float scale, "
    "float min_target_prob) -> (Tensor, Tensor, Tensor)"
)


def _verify_prefix_direct(*args):
    """One allocation for all outputs and the workspace, and one call for everything."""
    logits = args[0]
    status = status_word(logits)
    result = _C.new_verify_prefix(
        *args, _INT32 if status is None else status, status, num_threads()
    )
    after_launch(logits)
    return result


# Of draft_logprobs only a decision is made.
_DIFFERENTIABLE = {"logits": 0, "temperature": 7}


@register_op(
    "verify_prefix" + _SCHEMA,
    fake=_verify_prefix_fake,
    direct=_verify_prefix_direct,
    differentiable=_DIFFERENTIABLE,
)
def _verify_prefix(*args):
    *inputs, kind, log_lenience, scale, min_target_prob = args
    logits, keys = inputs[0], inputs[5]
    device, batch = logits.device, keys.numel()
    workspace = None
    if logits.is_cuda:
        num_bytes = _C.verify_prefix_workspace_bytes(*logits.shape, batch)
        workspace = torch.empty(num_bytes // 4, dtype=torch.int32, device=device)
    accepted_lens, next_token_ids = (
        torch.empty(batch, dtype=torch.int32, device=device) for _ in range(2)
    )
    logprobs = torch.empty(logits.shape[0], dtype=torch.float32, device=device)
    _C.verify_prefix(
        *inputs,
        (kind, log_lenience, scale, min_target_prob),
        accepted_lens,
        next_token_ids,
        logprobs,
        workspace,
        status_word(logits),
        num_threads(),
    )
    after_launch(logits)
    return accepted_lens, next_token_ids, logprobs


@register_op(
    "verify_prefix_triton" + _SCHEMA, fake=_verify_prefix_fake, differentiable=_DIFFERENTIABLE
)
def _verify_prefix_triton(*args):
    module = triton_module("verify_prefix")
    *inputs, rule_kind, log_lenience, scale, min_target_prob = args
    rule = (rule_kind, log_lenience, scale, min_target_prob)
    _C.check_verify_prefix(*inputs, rule)
    result = module.verify_prefix(*inputs, *rule)
    after_triton(inputs[0])
    return result


_IMPLEMENTATIONS = {"native": _verify_prefix, "triton": _verify_prefix_triton}
