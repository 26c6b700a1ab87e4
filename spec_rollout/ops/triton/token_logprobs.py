"""`token_logprobs` in Triton: one program per row, one read of the row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spec_rollout.ops.triton.launch import inverse, launch_shape, on_device, status_word_of
from spec_rollout.ops.triton.rows import (
    BAD_LOGITS,
    BAD_SAMPLING,
    BAD_TOKEN_ID,
    INF,
    logprob_of,
    raise_status,
    row_sum,
)


@triton.jit
def token_logprobs_kernel(
    logits, row_stride, vocab, token_ids, temperatures, inv_temperature, logprobs, status,
    BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    inv = tl.full([], 1.0, tl.float32) * inv_temperature
    if temperatures is not None:
        t = tl.load(temperatures + r)
        raise_status(status, ((t >= 0.0) & (t < INF)) == 0, BAD_SAMPLING)
        inv = tl.where(t > 0.0, tl.div_rn(tl.full([], 1.0, tl.float32), t), 1.0)
    row = logits + r * row_stride
    top, total = row_sum(row, vocab, inv, BLOCK, VEC)
    token = tl.load(token_ids + r).to(tl.int64)
    known = (token >= 0) & (token < vocab)
    x = tl.load(row + token, mask=known, other=0.0).to(tl.float32) * inv
    raise_status(status, known == 0, BAD_TOKEN_ID)
    raise_status(status, (total >= 0.5) == 0, BAD_LOGITS)
    tl.store(logprobs + r, tl.where(known, logprob_of(x, top, total), float("nan")))


def token_logprobs(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    temperatures: torch.Tensor | None,
    temperature: float,
) -> torch.Tensor:
    """Contract and errors of `spec_rollout.ops.token_logprobs`; shapes and dtypes have been
    checked."""
    rows, vocab = logits.shape
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows == 0:
        return logprobs
    shape = launch_shape(logits, elements_per_thread=32)
    with on_device(logits, token_logprobs_kernel):
        token_logprobs_kernel[(rows,)](
            logits, logits.stride(0), vocab, token_ids, temperatures, inverse(temperature),
            logprobs, status_word_of(logits),
            BLOCK=shape.block, VEC=shape.vec, num_warps=shape.num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    return logprobs
