"""Draws of tokens under keyed noise."""

from __future__ import annotations

from typing import NamedTuple

import torch

from spec_rollout._native import _C, num_threads
from spec_rollout.ops._faults import refuse
from spec_rollout.ops._registry import register_op
from spec_rollout.ops._sampling import split_sampling
from spec_rollout.ops._status import after_launch, status_word


class SampleResult(NamedTuple):
    """What `sample_tokens` returns.

    Attributes:
        token_ids: [batch], int32.
        logprobs: Natural log of each token's probability under the sampling distribution. [batch],
            float32.
    """

    token_ids: torch.Tensor
    logprobs: torch.Tensor


def sample_tokens(
    logits: torch.Tensor,
    *,
    keys: torch.Tensor,
    positions: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    top_k: int | torch.Tensor = 0,
    top_p: float | torch.Tensor = 1.0,
) -> SampleResult:
    """Draws one token per row: argmax_v(logits_v / temperature + g(key, position, v)), g standard
    Gumbel noise.

    The noise is a function of the row's key, the position and the token id alone (Philox4x32-10),
    so a draw does not depend on batch order, batch size or device, and `verify_prefix` at the same
    key and position draws the same token. Equal scores: the lowest id.

    The sampling distribution: logits / temperature; of these the `top_k` largest; of these the
    smallest set of largest ones whose renormalised probability reaches `top_p`. Ties with the last
    kept logit are kept. Log-probs are those of the renormalised kept set.

    Args:
        logits: [batch, vocab]; float32, float16 or bfloat16; the last dimension contiguous, rows
            any stride apart.
        keys: Noise keys (`spec_rollout.keys.noise_keys`). [batch], int64.
        positions: Response position of the token to draw, 0-based. [batch], int32 or int64.
        temperature: Positive; or 0, greedy: the argmax of the logits, without noise or filter, with
            the log-probs of temperature 1. A number, or [batch] float32.
        top_k: 0 is off. A number, or [batch] int32 or int64.
        top_p: In (0, 1]; 1 is off. A number, or [batch] float32. Vocabularies up to 2**23 if used.

    Returns:
        token_ids [batch] int32 and logprobs [batch] float32.

    Raises:
        ValueError: naming the argument, what was expected and what was given: shapes, dtypes,
            devices, parameters out of range, logits or a temperature that require a gradient
            (where torch keeps gradients: there is no derivative), and, on CPU (on CUDA: by
            `check_status`), NaN or +inf logits, rows without a finite logit.
    """
    try:
        return SampleResult(
            *_sample_tokens(
                logits,
                keys,
                positions,
                *split_sampling(temperature, top_k, top_p),
            )
        )
    except Exception as error:
        refuse(error, sample_tokens, locals())
        raise


def _sample_tokens_fake(logits, keys, *args):
    return (
        logits.new_empty(keys.shape, dtype=torch.int32),
        logits.new_empty(keys.shape, dtype=torch.float32),
    )


@register_op(
    "sample_tokens(Tensor logits, Tensor keys, Tensor positions, Tensor? temperatures, float "
    "temperature, "
    "Tensor? top_ks, int top_k, Tensor? top_ps, float top_p) -> (Tensor, Tensor)",
    fake=_sample_tokens_fake,
    differentiable={"logits": 0, "temperature": 3},
)
def _sample_tokens(
    logits, keys, positions, temperatures, temperature, top_ks, top_k, top_ps, top_p
):
    token_ids = torch.empty(keys.numel(), dtype=torch.int32, device=logits.device)
    logprobs = torch.empty(keys.numel(), dtype=torch.float32, device=logits.device)
    _C.sample_tokens(
        logits,
        keys,
        positions,
        temperatures,
        temperature,
        top_ks,
        top_k,
        top_ps,
        top_p,
        token_ids,
        logprobs,
        status_word(logits),
        num_threads(),
    )
    after_launch(logits)
    return token_ids, logprobs
