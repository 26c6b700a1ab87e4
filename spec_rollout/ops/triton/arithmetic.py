"""Noise and float32 arithmetic of the Triton kernels: the same bits as
csrc/include/spec_rollout/{philox,numerics,logits}.h.

Kernels that use these are launched with `enable_fp_fusion=False`, so that a product and a sum are
contracted only where `tl.fma` says so, as on the other back ends.
"""

from __future__ import annotations

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))
FLT_MAX = tl.constexpr(3.4028234663852886e38)
MAX_GUMBEL = tl.constexpr(22.9)
# Neighbouring tokens whose smallest exponential is drawn first, as in philox.h.
NOISE_GROUP = tl.constexpr(8)
_STREAM_ACCEPT = tl.constexpr(0)
_STREAM_GUMBEL = tl.constexpr(1)
_STREAM_GROUP = tl.constexpr(2)
_LOG2_E = tl.constexpr(1.44269504)


@triton.jit
def softmax_exp(x):
    """e^x where the exact bits do not matter: terms of a log-sum-exp."""
    return tl.exp2(x * _LOG2_E)


@triton.jit
def exact_log(x):
    """Natural log of positive normal floats, by the polynomial and the order of operations of
    `exact_log` in numerics.h."""
    bits = x.to(tl.int32, bitcast=True) - 0x3F3504F3
    e = (bits >> 23).to(tl.float32)
    m = ((bits & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    f = m - 1.0
    z = f * f
    p = tl.full(x.shape, 7.0376836292e-2, tl.float32)
    p = tl.fma(p, f, tl.full(x.shape, -1.1514610310e-1, tl.float32))
    p = tl.fma(p, f, tl.full(x.shape, 1.1676998740e-1, tl.float32))
    p = tl.fma(p, f, tl.full(x.shape, -1.2420140846e-1, tl.float32))
    p = tl.fma(p, f, tl.full(x.shape, 1.4249322787e-1, tl.float32))
    p = tl.fma(p, f, tl.full(x.shape, -1.6668057665e-1, tl.float32))
    p = tl.fma(p, f, tl.full(x.shape, 2.0000714765e-1, tl.float32))
    p = tl.fma(p, f, tl.full(x.shape, -2.4999993993e-1, tl.float32))
    p = tl.fma(p, f, tl.full(x.shape, 3.3333331174e-1, tl.float32))
    y = p * f * z
    y = tl.fma(e, tl.full(x.shape, -2.12194440e-4, tl.float32), y)
    y = tl.fma(z, tl.full(x.shape, -0.5, tl.float32), y)
    y = y + f
    return tl.fma(e, tl.full(x.shape, 0.693359375, tl.float32), y)


@triton.jit
def exact_exp(x):
    """e^x for x <= 0, 0 below -86, as `exact_exp` in logits.h."""
    one = tl.full(x.shape, 1.0, tl.float32)
    inside = tl.maximum(x, -86.0)
    shifted = tl.fma(inside, one * 1.44269504, one * 12582912.0)
    n = shifted - 12582912.0
    f = tl.fma(n, one * -0.693359375, inside)
    f = tl.fma(n, one * 2.12194440e-4, f)
    p = one * 1.9875691500e-4
    p = tl.fma(p, f, one * 1.3981999507e-3)
    p = tl.fma(p, f, one * 8.3334519073e-3)
    p = tl.fma(p, f, one * 4.1665795894e-2)
    p = tl.fma(p, f, one * 1.6666665459e-1)
    p = tl.fma(p, f, one * 5.0000001201e-1)
    p = tl.fma(p * f, f, f) + 1.0
    power = shifted.to(tl.int32, bitcast=True) << 23
    result = (p.to(tl.int32, bitcast=True) + power).to(tl.float32, bitcast=True)
    return tl.where(x >= -86.0, result, 0.0)


@triton.jit
def uniform_from_bits(bits):
    """Uniform in (0, 1]."""
    # The product by a power of two is exact: the sum rounds once, as the fused operation of
    # philox.h.
    return bits.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10


@triton.jit
def _group_uniform_from_bits(group_bits):
    """Uniform in (0, 1] of a group's smallest exponential: of the bits that do not name its
    leader."""
    return (group_bits >> 3).to(tl.float32) * 1.862645149230957e-09 + 9.313225746154785e-10


@triton.jit
def _exponential_from_uniform(v):
    """Standard exponential -ln(1 - v), with full relative resolution for small values."""
    v = tl.minimum(v, 0.999999940395355224609375)
    w = 1.0 - v
    return -(exact_log(w) + ((1.0 - w) - v))


@triton.jit
def gumbel_from_bits(group_bits, bits, places):
    """Standard Gumbel noise, in (-2.94, 22.88).

    Args:
        group_bits: The words of the tokens' groups; broadcast to the shape of `bits`.
        bits: The tokens' own words.
        places: Of the tokens in their groups, 0 to 7; broadcast likewise.
    """
    least = _exponential_from_uniform(_group_uniform_from_bits(group_bits)) * 0.125
    above = _exponential_from_uniform(uniform_from_bits(bits))
    leads = (group_bits & (NOISE_GROUP - 1)) == places.to(tl.uint32)
    return -exact_log(tl.where(leads, least, least + above))


@triton.jit
def group_bound(group_bits):
    """A number that no noise of a group's tokens is above, without logarithms: `group_bound` in
    logits.h."""
    log2_v = _group_uniform_from_bits(group_bits).to(tl.int32, bitcast=True).to(tl.float32)
    slope = tl.full(group_bits.shape, -8.262958317573066e-08, tl.float32)
    return tl.fma(log2_v, slope, tl.full(group_bits.shape, 90.10923767089844, tl.float32))


@triton.jit
def pick(word, a, b, c, d):
    """One of four words."""
    return tl.where(word == 0, a, tl.where(word == 1, b, tl.where(word == 2, c, d)))


@triton.jit
def _philox(key, position, calls, STREAM: tl.constexpr):
    """The four words of each of `calls` of a stream at a response position."""
    zero = calls.to(tl.uint32) * 0
    low = position.to(tl.uint32) + zero
    high = (position >> 32).to(tl.uint32) + zero
    return tl.philox(key, low, calls.to(tl.uint32), high, zero + STREAM)


@triton.jit
def gumbel_bits(key, position, quads):
    """Random bits of tokens 4 * quads + (0, 1, 2, 3) at a response position; a tuple of four.

    Args:
        key: Noise key, int64 scalar.
        position: int64 scalar.
        quads: int32 block.
    """
    return _philox(key, position, quads, _STREAM_GUMBEL)


@triton.jit
def group_bits(key, position, groups):
    """Random bits of groups of tokens at a response position, uint32 in the shape of `groups`.

    Each element makes a call for its word alone: words of one call for four would have to move
    between threads.
    """
    a, b, c, d = _philox(key, position, groups >> 2, _STREAM_GROUP)
    return pick(groups & 3, a, b, c, d)


@triton.jit
def gumbel_block(key, position, first_quad, ROWS: tl.constexpr, VEC: tl.constexpr):
    """Random bits of ROWS * VEC tokens in order, uint32 [ROWS, VEC]; one Philox call serves four of
    them."""
    QUADS: tl.constexpr = VEC // 4
    quads = first_quad + tl.arange(0, ROWS)[:, None] * QUADS + tl.arange(0, QUADS)[None, :]
    a, b, c, d = gumbel_bits(key, position, quads)
    return tl.join(tl.join(a, c), tl.join(b, d)).reshape([ROWS, VEC])


@triton.jit
def group_block(key, position, first_token, ROWS: tl.constexpr, VEC: tl.constexpr):
    """Random bits of the groups of ROWS * VEC tokens in order, uint32 [ROWS, 1]: a row of a block
    lies in one group.

    `first_token` is a multiple of VEC, and VEC no more than a group.
    """
    tl.static_assert(VEC <= NOISE_GROUP)
    tokens = first_token + tl.arange(0, ROWS)[:, None] * VEC
    return group_bits(key, position, tokens // NOISE_GROUP)


@triton.jit
def gumbel(key, position, token):
    """Gumbel noise of one token; scalars."""
    a, b, c, d = gumbel_bits(key, position, (token >> 2).to(tl.int32))
    group = group_bits(key, position, (token // NOISE_GROUP).to(tl.int32))
    return gumbel_from_bits(group, pick(token & 3, a, b, c, d), token % NOISE_GROUP)


@triton.jit
def accept_log_uniform(key, position):
    """ln u of the accept test at a response position; scalars."""
    quad = position >> 2
    zero = quad.to(tl.uint32) * 0
    low = quad.to(tl.uint32)
    high = (quad >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(key, low, zero, high, zero + _STREAM_ACCEPT)
    return exact_log(uniform_from_bits(pick(position & 3, a, b, c, d)))
