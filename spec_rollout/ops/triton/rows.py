"""What a Triton program does with one row of logits: sums, filter thresholds, draws. Same decisions
as csrc/cuda/target_row.cuh: they share the arithmetic.

A block of a row is [ROWS, VEC] with VEC elements to 16 bytes, so that a thread's loads are 128 bits
wide and its share of a reduction along VEC needs no other thread. `BLOCK` = ROWS * VEC.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spec_rollout.ops.triton.arithmetic import (
    FLT_MAX,
    INF,
    MAX_GUMBEL,
    NOISE_GROUP,
    exact_exp,
    group_block,
    group_bound,
    gumbel_block,
    gumbel_from_bits,
    softmax_exp,
)

NO_TOKEN = tl.constexpr(2147483647)
_MAX_FILTER_VOCAB = tl.constexpr(1 << 23)
# Bits of the status word (spec_rollout/ops/_status.py).
BAD_OFFSETS = tl.constexpr(1)
BAD_TOKEN_ID = tl.constexpr(2)
BAD_LOGITS = tl.constexpr(4)
NAN_LOGPROB = tl.constexpr(8)
BAD_SAMPLING = tl.constexpr(32)
# How rows are drawn: none greedily, all of them, or as each row's temperature says.
NEVER = tl.constexpr(0)
ALWAYS = tl.constexpr(1)
PER_ROW = tl.constexpr(2)


@triton.jit
def raise_status(status, condition, bit):
    if condition:
        tl.atomic_or(status, bit)


@triton.jit
def load_block(row, start, vocab, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """(ids, raw logits), each [BLOCK // VEC, VEC]; -inf past the end of the row."""
    ids = start + tl.arange(0, BLOCK // VEC)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    return ids, tl.load(row + ids, mask=ids < vocab, other=-INF)


@triton.jit
def add_to_sum(top, total, x):
    """Takes x [ROWS, VEC] into the running (max, sum of e^(x - max)) of each row of the block,
    [ROWS] each."""
    new = tl.maximum(top, tl.max(x, 1))
    total = total * softmax_exp(top - new) + tl.sum(softmax_exp(x - new[:, None]), 1)
    return new, total


@triton.jit
def finish_sum(top, total):
    """The (max, sum) of a row of logits from those of the block's rows; the sum is NaN if a logit
    is NaN or +inf."""
    highest = tl.max(top, 0)
    return highest, tl.sum(total * softmax_exp(top - highest), 0)


@triton.jit
def logprob_of(x, top, total):
    """Log-prob of x under (top, total), as on the CPU."""
    difference = x.to(tl.float64) - top.to(tl.float64)
    return (difference - tl.log(total.to(tl.float64))).to(tl.float32)


@triton.jit
def row_sum(row, vocab, inv_temperature, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """(max, sum) of a row in one read."""
    top = tl.full([BLOCK // VEC], -FLT_MAX, tl.float32)
    total = tl.zeros([BLOCK // VEC], tl.float32)
    for start in range(0, vocab, BLOCK):
        _ids, raw = load_block(row, start, vocab, BLOCK, VEC)
        top, total = add_to_sum(top, total, raw.to(tl.float32) * inv_temperature)
    return finish_sum(top, total)


@triton.jit
def sampling_of(
    r, vocab, temperatures, inv_temperature, top_ks, top_k, top_ps, top_p, status,
    GREEDY: tl.constexpr,
):  # fmt: skip
    """(1 / temperature, greedy, top_k or 0, top_p) of a row; values out of range are reported and
    replaced."""
    good = tl.full([], 1, tl.int1)
    greedy = tl.full([], GREEDY == ALWAYS, tl.int1)
    inv = tl.full([], 1.0, tl.float32) * inv_temperature
    k = tl.full([], 0, tl.int64) + top_k
    p = tl.full([], 1.0, tl.float32) * top_p
    if temperatures is not None:
        t = tl.load(temperatures + r)
        good = good & (t >= 0.0) & (t < INF)
        greedy = t == 0.0
        inv = tl.where(t > 0.0, tl.div_rn(tl.full([], 1.0, tl.float32), t), 1.0)
    if top_ks is not None:
        k = tl.load(top_ks + r).to(tl.int64)
        good = good & (k >= 0)
    if top_ps is not None:
        p = tl.load(top_ps + r)
        good = good & (p > 0.0) & (p <= 1.0)
    good = good & ((p == 1.0) | (vocab <= _MAX_FILTER_VOCAB))
    raise_status(status, good == 0, BAD_SAMPLING)
    greedy = greedy & good
    # A filter could not change a greedy row's argmax, and its log-probs are those without.
    filtered = good & (greedy == 0)
    inv = tl.where(good & (greedy == 0), inv, 1.0)
    k = tl.where(filtered & (k < vocab), k, 0)
    return inv, greedy, k, tl.where(filtered, p, 1.0)


@triton.jit
def _keys(raw, BITS: tl.constexpr):
    """int64 in the order of the logits."""
    sign: tl.constexpr = 1 << (BITS - 1)
    mask: tl.constexpr = (1 << BITS) - 1
    if BITS == 32:
        bits = raw.to(tl.uint32, bitcast=True).to(tl.int64)
    else:
        bits = raw.to(tl.uint16, bitcast=True).to(tl.int64)
    return tl.where((bits & sign) != 0, mask - bits, bits | sign)


@triton.jit
def _value_of_key(row, key, inv_temperature, BITS: tl.constexpr):
    sign: tl.constexpr = 1 << (BITS - 1)
    mask: tl.constexpr = (1 << BITS) - 1
    bits = tl.where((key & sign) != 0, key - sign, mask - key)
    if BITS == 32:
        raw = bits.to(tl.uint32).to(row.dtype.element_ty, bitcast=True)
    else:
        raw = bits.to(tl.uint16).to(row.dtype.element_ty, bitcast=True)
    return raw.to(tl.float32) * inv_temperature


@triton.jit
def _weights(x, kept, highest, WEIGHTED: tl.constexpr):
    """1 per token (top-k), or its probability in fixed point (top-p): integer sums do not depend on
    their order."""
    if WEIGHTED:
        fixed = (exact_exp(tl.minimum(x - highest, 0.0)) * 1099511627776.0).to(tl.int64)
        return tl.where(x >= kept, fixed, 0)
    else:
        return tl.full(x.shape, 1, tl.int64)


@triton.jit
def _select(
    row, vocab, inv_temperature, target, kept, highest,
    WEIGHTED: tl.constexpr, BITS: tl.constexpr, INF_BITS: tl.constexpr,
    BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The largest x with the weights of x_v >= x at least `target`, by bisection on the keys into
    four parts a pass."""
    sign: tl.constexpr = 1 << (BITS - 1)
    low = tl.full([], sign - INF_BITS, tl.int64)  # the key after that of -inf
    high = tl.full([], sign + INF_BITS, tl.int64)  # that of +inf
    above = tl.full([], 0, tl.int64)
    while high - low > 1:
        quarter = tl.maximum((high - low) // 4, 1)
        first, second, third = low + quarter, low + 2 * quarter, low + 3 * quarter
        sum1 = tl.zeros([BLOCK // VEC], tl.int64)
        sum2 = tl.zeros([BLOCK // VEC], tl.int64)
        sum3 = tl.zeros([BLOCK // VEC], tl.int64)
        for start in range(0, vocab, BLOCK):
            _ids, raw = load_block(row, start, vocab, BLOCK, VEC)
            key = _keys(raw, BITS)
            weight = _weights(raw.to(tl.float32) * inv_temperature, kept, highest, WEIGHTED)
            weight = tl.where(key < high, weight, 0)
            sum1 += tl.sum(tl.where(key >= first, weight, 0), 1)
            sum2 += tl.sum(tl.where(key >= second, weight, 0), 1)
            sum3 += tl.sum(tl.where(key >= third, weight, 0), 1)
        above1 = above + tl.sum(sum1, 0)
        above2 = above + tl.sum(sum2, 0)
        above3 = above + tl.sum(sum3, 0)
        reach1 = (first < high) & (above1 >= target)
        reach2 = reach1 & (second < high) & (above2 >= target)
        reach3 = reach2 & (third < high) & (above3 >= target)
        # The first pivot that does not reach the target bounds the next pass.
        pivot = tl.where(reach2, third, tl.where(reach1, second, first))
        above_pivot = tl.where(reach2, above3, tl.where(reach1, above2, above1))
        low = tl.where(reach3, third, tl.where(reach2, second, tl.where(reach1, first, low)))
        bounds = (reach3 == 0) & (pivot < high)
        above = tl.where(bounds, above_pivot, above)
        high = tl.where(bounds, pivot, high)
    return _value_of_key(row, low, inv_temperature, BITS)


@triton.jit
def filter_threshold(
    row, vocab, inv_temperature, top_k, top_p,
    BITS: tl.constexpr, INF_BITS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Threshold on x of the tokens that top-k, then top-p keep; -FLT_MAX keeps all that can be
    drawn."""
    threshold = tl.full([], -FLT_MAX, tl.float32)
    if top_k > 0:
        threshold = tl.maximum(
            threshold,
            _select(
                row, vocab, inv_temperature, top_k, threshold, threshold,
                False, BITS, INF_BITS, BLOCK, VEC,
            ),
        )  # fmt: skip
    if top_p < 1.0:
        top = tl.full([BLOCK // VEC], -FLT_MAX, tl.float32)
        for start in range(0, vocab, BLOCK):
            _ids, raw = load_block(row, start, vocab, BLOCK, VEC)
            top = tl.maximum(top, tl.max(raw.to(tl.float32) * inv_temperature, 1))
        highest = tl.max(top, 0)
        sums = tl.zeros([BLOCK // VEC], tl.int64)
        for start in range(0, vocab, BLOCK):
            _ids, raw = load_block(row, start, vocab, BLOCK, VEC)
            x = raw.to(tl.float32) * inv_temperature
            sums += tl.sum(_weights(x, threshold, highest, True), 1)
        total = tl.sum(sums, 0)
        target = tl.ceil(total.to(tl.float64) * top_p.to(tl.float64)).to(tl.int64)
        target = tl.minimum(tl.maximum(target, 1), total)
        threshold = tl.maximum(
            threshold,
            _select(
                row, vocab, inv_temperature, target, threshold, highest,
                True, BITS, INF_BITS, BLOCK, VEC,
            ),
        )  # fmt: skip
    return threshold


@triton.jit
def _take_best(score, ids, best_score, best_id):
    """(best_score, best_id) after the candidates of a block; of equal scores the lowest id, -inf is
    none."""
    highest = tl.max(tl.max(score, 1), 0)
    winner = tl.where((score == highest) & (score > -INF), ids, NO_TOKEN)
    winner = tl.min(tl.min(winner, 1), 0)
    better = (highest > best_score) | ((highest == best_score) & (winner < best_id))
    better = better & (winner != NO_TOKEN)
    return tl.where(better, highest, best_score), tl.where(better, winner, best_id)


@triton.jit
def sum_and_draw(
    row, vocab, inv_temperature, threshold, key, position, excluded, best_score, best_id,
    NOISY: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """(max, sum, best_score, best_id) over the tokens with x >= threshold, in one read of the row.

    The best starts from the arguments and is taken over all tokens but `excluded`, of x plus Gumbel
    noise if `NOISY`, of x otherwise. No token: `best_id` is `NO_TOKEN`.
    """
    top = tl.full([BLOCK // VEC], -FLT_MAX, tl.float32)
    total = tl.zeros([BLOCK // VEC], tl.float32)
    for start in range(0, vocab, BLOCK):
        ids, raw = load_block(row, start, vocab, BLOCK, VEC)
        x = raw.to(tl.float32) * inv_temperature
        x = tl.where(x < threshold, -INF, x)  # NaN stays, to be reported
        top, total = add_to_sum(top, total, x)
        candidate = (x >= threshold) & (ids != excluded)
        if NOISY:
            # Noise is needed where it can change the argmax. The words of groups say where that is:
            # rarely anywhere in a block once the first blocks are done. Only then are there words
            # of tokens, and logarithms.
            possible = tl.max(tl.max(tl.where(candidate, x, -INF), 1), 0)
            if possible + MAX_GUMBEL >= best_score:
                group_bits = group_block(key, position, start, BLOCK // VEC, VEC)
                may_win = candidate & (x + group_bound(group_bits) >= best_score)
                if tl.max(tl.max(may_win.to(tl.int32), 1), 0) != 0:
                    bits = gumbel_block(key, position, start // 4, BLOCK // VEC, VEC)
                    noise = gumbel_from_bits(group_bits, bits, ids % NOISE_GROUP)
                    score = tl.where(may_win, x + noise, -INF)
                    best_score, best_id = _take_best(score, ids, best_score, best_id)
        else:
            score = tl.where(candidate, x, -INF)
            best_score, best_id = _take_best(score, ids, best_score, best_id)
    highest, sum_of_row = finish_sum(top, total)
    return highest, sum_of_row, best_score, best_id
