"""What is proposed to each request, and how much of it passed: one launch each.

Triton, as all of Model Runner V2: it runs where V2 runs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spec_rollout.engines.vllm.worker.v2.table import DraftTable, Field

_LEN = tl.constexpr(int(Field.LEN))
_LIMIT = tl.constexpr(int(Field.LIMIT))
_CHUNK = tl.constexpr(int(Field.CHUNK))
_ACCEPTED = tl.constexpr(int(Field.ACCEPTED))
_TESTED = tl.constexpr(int(Field.TESTED))
_VERIFIED = tl.constexpr(int(Field.VERIFIED))
_WASTED = tl.constexpr(int(Field.WASTED))

# What a rule says of a logits row (`rules.Decisions`).
BY_DRAW = tl.constexpr(0)
PASSED = tl.constexpr(1)
REJECTED = tl.constexpr(2)


@triton.jit
def _propose_kernel(
    proposed,  # *int64 [num_reqs, K]
    counts,  # *int32 [num_slots]
    slots,  # *int [num_reqs]
    num_sampled,  # *int32 [num_reqs]
    total_lens,  # *int32 [num_slots]
    prompt_lens,  # *int32 [num_slots]
    last_sampled,  # *int64 [num_slots]
    numbers,  # *int64 [num_slots, numbers_stride]
    numbers_stride,
    drafts,  # *int32 [num_slots, drafts_stride]
    drafts_stride,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + request).to(tl.int64)
    row = numbers + slot * numbers_stride
    done = (tl.load(total_lens + slot) - tl.load(prompt_lens + slot)).to(tl.int64)
    follows = (tl.load(num_sampled + request) > 0) & (tl.load(row + _ACCEPTED) >= done)
    room = tl.minimum(tl.load(row + _LIMIT) - done, tl.load(row + _CHUNK))
    count = tl.where(follows, tl.minimum(tl.maximum(room, 0), K), 0)
    k = tl.arange(0, BLOCK)
    token = tl.load(drafts + slot * drafts_stride + done + k, mask=k < count, other=0).to(tl.int64)
    # vLLM embeds what is proposed before it looks at it: a token that exists, behind the draft.
    token = tl.where(k < count, token, tl.load(last_sampled + slot))
    tl.store(proposed + request * K + k, token, mask=k < K)
    tl.store(counts + slot, count.to(tl.int32))


@triton.jit
def _outcome_kernel(
    sampled,  # *int64 [num_reqs, WIDTH]
    num_sampled,  # *int32 [num_reqs]
    drawn,  # *int64 [num_rows]
    scheduled,  # *int [num_rows]: the input token of each row
    decisions,  # *int32 [num_rows]
    cu_rows,  # *int32 [num_reqs + 1]
    positions,  # *int64 [num_rows]
    slots,  # *int [num_reqs]
    prompt_lens,  # *int32 [num_slots]
    prefill_lens,  # *int32 [num_slots]
    numbers,  # *int64 [num_slots, numbers_stride]
    numbers_stride,
    drafts,  # *int32 [num_slots, drafts_stride]
    drafts_stride,
    max_chunk,
    HAS_DECISIONS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    start = tl.load(cu_rows + request).to(tl.int64)
    num_rows = tl.load(cu_rows + request + 1).to(tl.int64) - start
    slot = tl.load(slots + request).to(tl.int64)
    row = numbers + slot * numbers_stride
    accepted = tl.load(row + _ACCEPTED)
    # The first row predicts this token of the sequence, and of the response.
    next_token = tl.load(positions + start) + 1
    first = next_token - tl.load(prompt_lens + slot)
    follows = (accepted >= first) & (next_token >= tl.load(prefill_lens + slot))
    length = tl.where(follows, tl.load(row + _LEN), first)  # or nothing is left of it

    i = tl.arange(0, BLOCK)
    is_row = i < num_rows
    token = tl.load(drawn + start + i, mask=is_row, other=-1).to(tl.int64)
    following = tl.load(scheduled + start + i + 1, mask=i + 1 < num_rows, other=-1).to(tl.int64)
    drafted = is_row & (first + i < length)
    draft = tl.load(drafts + slot * drafts_stride + first + i, mask=drafted, other=-1).to(tl.int64)
    kept = drafted & (token == draft)
    passed = (i + 1 < num_rows) & (following == token)
    if HAS_DECISIONS:
        decision = tl.load(decisions + start + i, mask=is_row, other=0)
        kept = kept & (decision != REJECTED)
        # What a rule rejects ends the draft, even where the draw gives the same token.
        passed = passed & ~(drafted & (decision == REJECTED))

    num_passed = tl.min(tl.where(passed, BLOCK, i), axis=0).to(tl.int64)
    tl.store(sampled + request * WIDTH + i, token, mask=i < WIDTH)
    tl.store(num_sampled + request, (num_passed + 1).to(tl.int32))

    given = i <= num_passed
    num_kept = tl.min(tl.where(kept & given, BLOCK, i), axis=0).to(tl.int64)
    is_proposal = (i + 1 < num_rows) & drafted & (following == draft)
    num_computed = tl.sum(is_proposal.to(tl.int64))
    num_wasted = num_computed - tl.minimum(num_computed, num_passed)
    # A token that was kept without having been proposed is the next step's input.
    last_is_kept = num_kept > num_passed
    also_computed = last_is_kept & (first + num_passed < tl.load(row + _LIMIT))
    rejected = (num_kept <= num_passed) & (first + num_kept < length)
    chunk = tl.load(row + _CHUNK)
    grows = last_is_kept & (num_passed + 1 == num_rows) & (num_passed >= chunk)
    if first < length:
        tl.store(row + _ACCEPTED, first + num_kept)
        tl.store(row + _TESTED, tl.load(row + _TESTED) + num_kept + rejected.to(tl.int64))
        tl.store(
            row + _VERIFIED,
            tl.load(row + _VERIFIED) + num_computed + also_computed.to(tl.int64),
        )
        tl.store(row + _WASTED, tl.load(row + _WASTED) + num_wasted)
        tl.store(row + _CHUNK, tl.where(grows, tl.minimum(2 * chunk, max_chunk), chunk))


def propose(
    table: DraftTable,
    slots: torch.Tensor,
    *,
    num_sampled: torch.Tensor,
    total_lens: torch.Tensor,
    prompt_lens: torch.Tensor,
    last_sampled: torch.Tensor,
) -> torch.Tensor:
    """The next tokens of every request's draft, while it is followed.

    `table.counts` gets how many of them there are; behind them the last token is repeated.

    Args:
        table: The drafts.
        slots: Of each request. [num_reqs], int32.
        num_sampled: Tokens that each was given in this step. [num_reqs], int32.
        total_lens, prompt_lens: Tokens of each request so far, and of its prompt. [num_slots],
            int32.
        last_sampled: The last token of each. [num_slots], int64.

    Returns:
        [num_reqs, table.max_chunk], int64.
    """
    num_reqs, k = slots.numel(), table.max_chunk
    proposed = torch.empty(num_reqs, k, dtype=torch.int64, device=table.device)
    _propose_kernel[(num_reqs,)](
        proposed,
        table.counts,
        slots,
        num_sampled,
        total_lens,
        prompt_lens,
        last_sampled,
        table.numbers,
        table.numbers.stride(0),
        table.tokens,
        table.tokens.stride(0),
        K=k,
        BLOCK=triton.next_power_of_2(k),
    )
    return proposed


def outcome(
    table: DraftTable,
    slots: torch.Tensor,
    *,
    drawn: torch.Tensor,
    scheduled: torch.Tensor,
    decisions: torch.Tensor | None,
    cu_rows: torch.Tensor,
    positions: torch.Tensor,
    prompt_lens: torch.Tensor,
    prefill_lens: torch.Tensor,
    width: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each request is given in a step; `table` is brought up to date.

    Rows of a request follow each other: the first one's input is its last token, the others' are
    scheduled tokens. A scheduled token passes if it is what the row before it gives, and no rule
    rejected it there.

    Args:
        table: The drafts.
        slots: Of each request. [num_reqs], int32.
        drawn: The token that each row gives. [num_rows], int64.
        scheduled: The input token of each row, -1 for one that must not pass. [num_rows].
        decisions: What a rule says of the draft token that each row predicts (`BY_DRAW`, `PASSED`,
            `REJECTED`), None where there is no rule. [num_rows], int32.
        cu_rows: [num_reqs + 1], int32.
        positions: Of each row's input in the sequence. [num_rows], int64.
        prompt_lens, prefill_lens: Tokens of each prompt, and of what was known when the request
            took its slot. [num_slots], int32.
        width: Most tokens of a request in a step.

    Returns:
        The tokens [num_reqs, width], int64, and how many of them are given [num_reqs], int32.
    """
    num_reqs = slots.numel()
    sampled = torch.zeros(num_reqs, width, dtype=torch.int64, device=table.device)
    num_sampled = torch.empty(num_reqs, dtype=torch.int32, device=table.device)
    _outcome_kernel[(num_reqs,)](
        sampled,
        num_sampled,
        drawn,
        scheduled,
        drawn if decisions is None else decisions,
        cu_rows,
        positions,
        slots,
        prompt_lens,
        prefill_lens,
        table.numbers,
        table.numbers.stride(0),
        table.tokens,
        table.tokens.stride(0),
        table.max_chunk,
        HAS_DECISIONS=decisions is not None,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
    )
    return sampled, num_sampled
