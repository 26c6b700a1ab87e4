"""A Triton kernel that writes out the noise of spec_rollout.ops.triton; imported by tests where triton is installed."""

from __future__ import annotations

import triton
import triton.language as tl

from spec_rollout.ops.triton.arithmetic import (
    accept_log_uniform,
    gumbel_block,
    gumbel_bound,
    gumbel_from_bits,
)


@triton.jit
def noise_kernel(keys, positions, bits, values, bounds, uniforms):
    """Of tokens 0 to 1023 of each row: random bits, noise, its bound; and ln u of the accept test."""
    r = tl.program_id(0)
    key, position = tl.load(keys + r), tl.load(positions + r)
    at = r * 1024 + tl.arange(0, 128)[:, None] * 8 + tl.arange(0, 8)[None, :]
    block = gumbel_block(key, position, 0, 128, 8)
    tl.store(bits + at, block.to(tl.int64))
    tl.store(values + at, gumbel_from_bits(block))
    tl.store(bounds + at, gumbel_bound(block))
    tl.store(uniforms + r, accept_log_uniform(key, position))
