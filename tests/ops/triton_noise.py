"""A Triton kernel that writes out the noise of spec_rollout.ops.triton; imported by tests where
triton is installed."""

from __future__ import annotations

import triton
import triton.language as tl

from spec_rollout.ops.triton.arithmetic import (
    NOISE_GROUP,
    accept_log_uniform,
    group_block,
    group_bound,
    gumbel,
    gumbel_block,
    gumbel_from_bits,
)


@triton.jit
def noise_kernel(
    keys, positions, group_words, words, values, bounds, picks, uniforms, VEC: tl.constexpr
):
    """Of tokens 0 to 1023 of each row, in blocks of 256: random bits of their groups and their own,
    noise, its bound. Also the noise of every 37th token by itself, and ln u of the accept test."""
    ROWS: tl.constexpr = 256 // VEC
    r = tl.program_id(0)
    key, position = tl.load(keys + r), tl.load(positions + r)
    zero = tl.zeros([ROWS, VEC], tl.int32)
    for start in range(0, 1024, 256):
        ids = start + tl.arange(0, ROWS)[:, None] * VEC + tl.arange(0, VEC)[None, :]
        group_bits = group_block(key, position, start, ROWS, VEC)
        bits = gumbel_block(key, position, start // 4, ROWS, VEC)
        at = r * 1024 + ids
        tl.store(group_words + at, group_bits.to(tl.int64) + zero)
        tl.store(words + at, bits.to(tl.int64))
        tl.store(values + at, gumbel_from_bits(group_bits, bits, ids % NOISE_GROUP))
        tl.store(bounds + at, group_bound(group_bits) + zero.to(tl.float32))
    for token in range(0, 1024, 37):
        tl.store(picks + r * 1024 + token, gumbel(key, position, tl.full([], token, tl.int64)))
    tl.store(uniforms + r, accept_log_uniform(key, position))
