"""Log-probabilities of given tokens, straight from the logits."""

from __future__ import annotations

from typing import Literal

import torch

from spec_rollout._native import _C, num_threads
from spec_rollout.ops._faults import refuse
from spec_rollout.ops._impl import implementation, triton_module
from spec_rollout.ops._registry import register_op
from spec_rollout.ops._sampling import split_temperature
from spec_rollout.ops._status import after_launch, after_triton, status_word


def token_logprobs(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    *,
    impl: Literal["native", "triton"] = "native",
) -> torch.Tensor:
    """Log-probability of one token per row: log_softmax(logits / temperature)[row, token_ids[row]].

    Each row of logits is read once, in its own dtype; sums are float32 or better and nothing the
    size of the logits is allocated. There is no derivative: a loss takes its log-probs elsewhere.

    Args:
        logits: [num_tokens, vocab]; float32, float16 or bfloat16; the last dimension contiguous,
            rows any stride apart. -inf is a token that cannot be drawn.
        token_ids: [num_tokens], int32 or int64, in [0, vocab).
        temperature: Positive, or 0 (greedy decoding, whose log-probs are those of temperature 1). A
            number, or a tensor [num_tokens], float32.
        impl: "native" (C++ and CUDA) or "triton" (CUDA tensors; on CPU only in Triton's
            interpreter, for tests).

    Returns:
        Natural log, -inf for a token that cannot be drawn. [num_tokens], float32.

    Raises:
        ValueError: naming the argument, what was expected and what was given: shapes, dtypes,
            devices, logits or a temperature that require a gradient (where torch keeps gradients),
            and, on CPU (on CUDA: by `check_status`), ids outside the vocabulary, NaN or +inf
            logits, rows without a finite logit.
        ImportError: if impl is "triton" and triton is not installed.
    """
    try:
        op = implementation(_IMPLEMENTATIONS, impl)
        return op(logits, token_ids, *split_temperature(temperature))
    except Exception as error:
        refuse(error, token_logprobs, locals())
        raise


_DIFFERENTIABLE = {"logits": 0, "temperature": 2}


def _token_logprobs_fake(logits, token_ids, temperatures, temperature):
    return logits.new_empty(token_ids.shape, dtype=torch.float32)


@register_op(
    "token_logprobs(Tensor logits, Tensor token_ids, Tensor? temperatures, float temperature) -> "
    "Tensor",
    fake=_token_logprobs_fake,
    differentiable=_DIFFERENTIABLE,
)
def _token_logprobs(logits, token_ids, temperatures, temperature):
    logprobs = torch.empty(token_ids.numel(), dtype=torch.float32, device=logits.device)
    _C.token_logprobs(
        logits,
        token_ids,
        temperatures,
        temperature,
        logprobs,
        status_word(logits),
        num_threads(),
    )
    after_launch(logits)
    return logprobs


@register_op(
    "token_logprobs_triton(Tensor logits, Tensor token_ids, Tensor? temperatures, float "
    "temperature) -> Tensor",
    fake=_token_logprobs_fake,
    differentiable=_DIFFERENTIABLE,
)
def _token_logprobs_triton(logits, token_ids, temperatures, temperature):
    module = triton_module("token_logprobs")
    _C.check_token_logprobs(logits, token_ids, temperatures, temperature)
    logprobs = module.token_logprobs(logits, token_ids, temperatures, temperature)
    after_triton(logits)
    return logprobs


_IMPLEMENTATIONS = {"native": _token_logprobs, "triton": _token_logprobs_triton}
