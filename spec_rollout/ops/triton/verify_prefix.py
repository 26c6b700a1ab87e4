"""`verify_prefix` in Triton: two kernels that divide the work as those of
csrc/cuda/verify_prefix.cu do.

The first tests draft tokens, `splits` programs per draft, each every splits-th token in order, and
stops once an earlier one was rejected. The second, a program per draft, draws the token that
follows, unless the test has drawn it already (coupled and greedy rows: their test is the draw).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from spec_rollout.ops.triton.arithmetic import INF, accept_log_uniform, gumbel
from spec_rollout.ops.triton.launch import (
    float32,
    inverse,
    launch_shape,
    on_device,
    status_word_of,
)
from spec_rollout.ops.triton.rows import (
    ALWAYS,
    BAD_LOGITS,
    BAD_OFFSETS,
    BAD_TOKEN_ID,
    FLT_MAX,
    NAN_LOGPROB,
    NEVER,
    NO_TOKEN,
    PER_ROW,
    filter_threshold,
    logprob_of,
    raise_status,
    row_sum,
    sampling_of,
    sum_and_draw,
)

# `RuleKind` of spec_rollout/acceptance.py.
_COUPLED = tl.constexpr(1)
_ONE_HOT = tl.constexpr(2)
_NO_REJECTION = 2**31 - 1
_TAIL = tl.constexpr(128)


@triton.jit
def _draft_of(r, batch, cu_draft_lens, cu_logits_lens, num_draft_tokens, num_rows, status):
    """(first token, tokens, first logits row, logits rows) of a draft; empty, and reported, if
    offsets are unusable."""
    begin = tl.load(cu_draft_lens + r).to(tl.int64)
    length = tl.load(cu_draft_lens + r + 1).to(tl.int64) - begin
    if cu_logits_lens is None:
        row = begin + r
        rows = length + 1
    else:
        row = tl.load(cu_logits_lens + r).to(tl.int64)
        rows = tl.load(cu_logits_lens + r + 1).to(tl.int64) - row
    good = (begin >= 0) & (length >= 0) & (begin <= num_draft_tokens - length) & (row >= 0)
    good = good & ((rows == length) | (rows == length + 1)) & (row <= num_rows - rows)
    good = good & ((r != 0) | ((begin == 0) & (row == 0)))
    ends = (begin + length == num_draft_tokens) & (row + rows == num_rows)
    good = good & ((r + 1 != batch) | ends)
    raise_status(status, good == 0, BAD_OFFSETS)
    return (
        tl.where(good, begin, 0),
        tl.where(good, length, 0),
        tl.where(good, row, 0),
        tl.where(good, rows, 0),
    )


@triton.jit
def _position_of(positions, r):
    if positions is None:
        return r * 0
    else:
        return tl.load(positions + r).to(tl.int64)


@triton.jit
def _threshold_of(
    row, vocab, inv, k, p,
    FILTERED: tl.constexpr, BITS: tl.constexpr, INF_BITS: tl.constexpr,
    BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    if FILTERED:
        return filter_threshold(row, vocab, inv, k, p, BITS, INF_BITS, BLOCK, VEC)
    else:
        return tl.full([], -FLT_MAX, tl.float32)


@triton.jit
def _coupled_test(
    row, vocab, inv, threshold, key, position, token, known, log_lenience,
    BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The draw under noise in which a drafted token competes with its bonus instead of its plain
    score."""
    x = tl.load(row + token, mask=known, other=-INF).to(tl.float32) * inv
    score = x + gumbel(key, position, tl.where(known, token, 0)) + log_lenience
    competes = known & (x >= threshold)
    start_score = tl.where(competes, score, -INF)
    start_id = tl.where(competes, token, NO_TOKEN).to(tl.int32)
    excluded = tl.where(known, token, -1).to(tl.int32)
    return sum_and_draw(
        row, vocab, inv, threshold, key, position, excluded, start_score, start_id, True, BLOCK, VEC
    )


@triton.jit
def _greedy_test(row, vocab, threshold, key, BLOCK: tl.constexpr, VEC: tl.constexpr):
    none = tl.full([], -INF, tl.float32)
    no_token = tl.full([], NO_TOKEN, tl.int32)
    return sum_and_draw(
        row, vocab, 1.0, threshold, key, key, no_token * 0 - 1, none, no_token, False, BLOCK, VEC
    )


@triton.jit
def _plain_test(
    row, vocab, inv, threshold,
    FILTERED: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The sum alone."""
    score = tl.full([], -INF, tl.float32)
    no_token = tl.full([], NO_TOKEN, tl.int32)
    if FILTERED:
        top, total, score, no_token = _filtered_sum(row, vocab, inv, threshold, BLOCK, VEC)
    else:
        top, total = row_sum(row, vocab, inv, BLOCK, VEC)
    return top, total, score, no_token


@triton.jit
def _filtered_sum(row, vocab, inv, threshold, BLOCK: tl.constexpr, VEC: tl.constexpr):
    zero = tl.full([], 0, tl.int64)
    no_token = tl.full([], NO_TOKEN, tl.int32)
    # A best of +inf cannot be beaten, so no noise is made.
    return sum_and_draw(
        row, vocab, inv, threshold, zero, zero, no_token, INF * tl.full([], 1.0, tl.float32),
        no_token, True, BLOCK, VEC,
    )  # fmt: skip


@triton.jit(do_not_specialize=["batch", "splits", "num_rows", "num_draft_tokens", "top_k"])
def test_drafts_kernel(
    logits, row_stride, vocab, num_rows, draft_ids, num_draft_tokens, draft_logprobs,
    cu_draft_lens, cu_logits_lens, keys, positions, batch, splits,
    temperatures, inv_temperature, top_ks, top_k, top_ps, top_p,
    log_lenience, scale, min_target_logprob,
    logprobs, first_rejection, next_ids, next_logprobs, status,
    RULE: tl.constexpr, REUSES_ALL: tl.constexpr, REUSES_NONE: tl.constexpr,
    GREEDY: tl.constexpr, FILTERED: tl.constexpr, BITS: tl.constexpr, INF_BITS: tl.constexpr,
    BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    job = tl.program_id(0).to(tl.int64)
    r = job % batch
    begin, length, first_row, rows = _draft_of(
        r, batch, cu_draft_lens, cu_logits_lens, num_draft_tokens, num_rows, status
    )
    inv, greedy, k, p = sampling_of(
        r, vocab, temperatures, inv_temperature, top_ks, top_k, top_ps, top_p, status, GREEDY
    )
    key = tl.load(keys + r)
    start = _position_of(positions, r)
    draws = greedy | (RULE == _COUPLED)
    # The bonus row is left to the second kernel, except where its draw is made here.
    end = tl.where(draws, rows, length)
    i = job // batch
    wanted = i < end
    while wanted:
        # An atomic read is made by one thread and handed to the others. A plain load is made by
        # every thread, and threads that see different values would part ways.
        wanted = i < tl.atomic_min(first_rejection + r, 2147483647)
        if wanted:
            row_index = first_row + i
            row = logits + row_index * row_stride
            has_draft = i < length
            token = tl.load(draft_ids + begin + i, mask=has_draft, other=-1).to(tl.int64)
            known = (token >= 0) & (token < vocab)
            position = start + i
            threshold = _threshold_of(row, vocab, inv, k, p, FILTERED, BITS, INF_BITS, BLOCK, VEC)
            if GREEDY == ALWAYS:
                top, total, _score, best = _greedy_test(row, vocab, threshold, key, BLOCK, VEC)
            elif GREEDY == NEVER:
                if RULE == _COUPLED:
                    top, total, _score, best = _coupled_test(
                        row, vocab, inv, threshold, key, position, token, known, log_lenience,
                        BLOCK, VEC,
                    )  # fmt: skip
                else:
                    top, total, _score, best = _plain_test(
                        row, vocab, inv, threshold, FILTERED, BLOCK, VEC
                    )
            else:
                if greedy:
                    top, total, _score, best = _greedy_test(row, vocab, threshold, key, BLOCK, VEC)
                else:
                    if RULE == _COUPLED:
                        top, total, _score, best = _coupled_test(
                            row, vocab, inv, threshold, key, position, token, known, log_lenience,
                            BLOCK, VEC,
                        )  # fmt: skip
                    else:
                        top, total, _score, best = _plain_test(
                            row, vocab, inv, threshold, FILTERED, BLOCK, VEC
                        )

            good = total >= 0.5
            raise_status(status, good == 0, BAD_LOGITS)
            raise_status(status, has_draft & (known == 0), BAD_TOKEN_ID)
            x = tl.load(row + token, mask=known, other=0.0).to(tl.float32) * inv
            logprob = tl.where(x >= threshold, logprob_of(x, top, total), -INF)
            passes = best == token
            if REUSES_ALL:
                passes = passes | True
            elif REUSES_NONE:
                passes = passes & (greedy == 0)
            if RULE != _COUPLED:
                tested = known & has_draft
                limit = logprob
                if REUSES_ALL:
                    limit = logprob * 0.0 + INF
                    limit = tl.where(limit == limit, limit, INF)
                elif RULE != _ONE_HOT:
                    old = tl.full([], 0.0, tl.float32)
                    if draft_logprobs is not None:
                        old = tl.load(draft_logprobs + begin + i, mask=tested, other=0.0)
                    raise_status(status, (draws == 0) & (old != old), NAN_LOGPROB)
                    limit = scale * ((logprob - old) + log_lenience)
                    limit = tl.where(logprob > min_target_logprob, limit, -INF)
                by_noise = (limit >= 0.0) | (accept_log_uniform(key, position) <= limit)
                passes = tl.where(draws, passes, by_noise)
            accepted = passes & has_draft & known & good
            tl.store(logprobs + row_index, logprob, mask=accepted)

            drawn = good & (best != NO_TOKEN)
            next_id = tl.where(drawn, best, 0)
            next_x = tl.load(row + next_id, mask=draws).to(tl.float32) * inv
            next_logprob = tl.where(drawn, logprob_of(next_x, top, total), float("nan"))
            keeps_draw = draws & (accepted == 0)
            tl.store(next_ids + row_index, next_id, mask=keeps_draw)
            tl.store(next_logprobs + row_index, next_logprob, mask=keeps_draw)
            if has_draft & (accepted == 0):
                tl.atomic_min(first_rejection + r, i.to(tl.int32))
            i += splits
            wanted = accepted & (i < end)


@triton.jit(do_not_specialize=["batch", "num_rows", "num_draft_tokens", "top_k"])
def finish_drafts_kernel(
    logits, row_stride, vocab, num_rows, draft_ids, num_draft_tokens,
    cu_draft_lens, cu_logits_lens, keys, positions, batch,
    temperatures, inv_temperature, top_ks, top_k, top_ps, top_p,
    first_rejection, next_ids, next_logprobs,
    accepted_lens, next_token_ids, logprobs, status,
    RULE: tl.constexpr, GREEDY: tl.constexpr, FILTERED: tl.constexpr,
    BITS: tl.constexpr, INF_BITS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    begin, length, first_row, rows = _draft_of(
        r, batch, cu_draft_lens, cu_logits_lens, num_draft_tokens, num_rows, status
    )
    inv, greedy, k, p = sampling_of(
        r, vocab, temperatures, inv_temperature, top_ks, top_k, top_ps, top_p, status, GREEDY
    )
    rejection = tl.load(first_rejection + r).to(tl.int64)
    accepted = tl.minimum(rejection, length)
    draws = accepted < rows
    row_index = first_row + accepted
    drawn_before = draws & (greedy | (RULE == _COUPLED))
    next_id = tl.load(next_ids + row_index, mask=drawn_before, other=-1)
    next_logprob = tl.load(next_logprobs + row_index, mask=drawn_before, other=float("nan"))
    # The outer condition is known when compiling, and removes what it guards.
    if (RULE != _COUPLED) and (GREEDY != ALWAYS):  # noqa: SIM102
        if draws & (drawn_before == 0):
            row = logits + row_index * row_stride
            position = _position_of(positions, r) + accepted
            excluded = tl.full([], -1, tl.int32)
            if RULE == _ONE_HOT:
                rejected = accepted < length
                token = tl.load(draft_ids + begin + accepted, mask=rejected, other=-1)
                token = token.to(tl.int64)
                excluded = tl.where((token >= 0) & (token < vocab), token, -1).to(tl.int32)
            threshold = _threshold_of(row, vocab, inv, k, p, FILTERED, BITS, INF_BITS, BLOCK, VEC)
            top, total, _score, best = sum_and_draw(
                row, vocab, inv, threshold, tl.load(keys + r), position, excluded,
                tl.full([], -INF, tl.float32), tl.full([], NO_TOKEN, tl.int32), True, BLOCK, VEC,
            )  # fmt: skip
            good = (total >= 0.5) & (best != NO_TOKEN)
            raise_status(status, good == 0, BAD_LOGITS)
            next_id = tl.where(good, best, 0)
            x = tl.load(row + next_id).to(tl.float32) * inv
            next_logprob = tl.where(good, logprob_of(x, top, total), float("nan"))
    tl.store(accepted_lens + r, accepted.to(tl.int32))
    tl.store(next_token_ids + r, next_id)
    tl.store(logprobs + row_index, next_logprob, mask=draws)
    for tail in range(accepted + 1, rows, _TAIL):
        undecided = tail + tl.arange(0, _TAIL)
        tl.store(logprobs + first_row + undecided, float("nan"), mask=undecided < rows)


def _splits(logits: torch.Tensor, batch: int) -> int:
    """Programs per draft: enough to fill the GPU where drafts are few; one where they are many, and
    then no row is read in vain."""
    if not logits.is_cuda:
        return 1
    processors = torch.cuda.get_device_properties(logits.device).multi_processor_count
    return max(1, min(2 * processors // batch, logits.shape[0] // batch))


def verify_prefix(
    logits: torch.Tensor,
    draft_ids: torch.Tensor,
    cu_draft_lens: torch.Tensor,
    draft_logprobs: torch.Tensor | None,
    cu_logits_lens: torch.Tensor | None,
    keys: torch.Tensor,
    positions: torch.Tensor | None,
    temperatures: torch.Tensor | None,
    temperature: float,
    top_ks: torch.Tensor | None,
    top_k: int,
    top_ps: torch.Tensor | None,
    top_p: float,
    rule_kind: int,
    log_lenience: float,
    scale: float,
    min_target_prob: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Contract and errors of `spec_rollout.ops.verify_prefix`; shapes and dtypes have been
    checked."""
    device = logits.device
    rows, vocab = logits.shape
    batch = keys.numel()
    accepted_lens = torch.empty(batch, dtype=torch.int32, device=device)
    next_token_ids = torch.empty(batch, dtype=torch.int32, device=device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=device)
    if batch == 0:
        return accepted_lens, next_token_ids, logprobs
    first_rejection = torch.full((batch,), _NO_REJECTION, dtype=torch.int32, device=device)
    next_ids = torch.empty(rows, dtype=torch.int32, device=device)
    next_logprobs = torch.empty(rows, dtype=torch.float32, device=device)
    splits = _splits(logits, batch)
    shape = launch_shape(logits, elements_per_thread=16)
    greedy = PER_ROW if temperatures is not None else ALWAYS if temperature == 0 else NEVER
    one_hot = rule_kind == _ONE_HOT.value
    drafts = (draft_ids, draft_ids.numel())
    offsets = (cu_draft_lens, cu_logits_lens, keys, positions, batch)
    sampling = (temperatures, inverse(temperature), top_ks, top_k, top_ps, float32(top_p))
    status = status_word_of(logits)
    constants = {
        "RULE": rule_kind,
        "GREEDY": greedy.value,
        "FILTERED": top_ks is not None or top_ps is not None or top_k > 0 or top_p < 1.0,
        "BITS": 8 * logits.element_size(),
        "INF_BITS": {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}[
            logits.dtype
        ],
        "BLOCK": shape.block,
        "VEC": shape.vec,
        "num_warps": shape.num_warps,
        "enable_fp_fusion": False,
    }
    with on_device(logits, test_drafts_kernel):
        test_drafts_kernel[(batch * splits,)](
            logits, logits.stride(0), vocab, rows, *drafts, draft_logprobs, *offsets, splits,
            *sampling, float32(log_lenience), float32(scale),
            float32(math.log(min_target_prob)) if min_target_prob > 0 else -math.inf,
            logprobs, first_rejection, next_ids, next_logprobs, status,
            REUSES_ALL=not one_hot and log_lenience == math.inf,
            REUSES_NONE=not one_hot and log_lenience == -math.inf,
            **constants,
        )  # fmt: skip
        finish_drafts_kernel[(batch,)](
            logits, logits.stride(0), vocab, rows, *drafts, *offsets, *sampling,
            first_rejection, next_ids, next_logprobs,
            accepted_lens, next_token_ids, logprobs, status, **constants,
        )  # fmt: skip
    return accepted_lens, next_token_ids, logprobs
