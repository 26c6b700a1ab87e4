"""The logits rows of a step, sorted by what is to be done with them."""

from __future__ import annotations

import numpy as np

from spec_rollout.acceptance import AcceptanceRule
from spec_rollout.engines.vllm.worker.groups import Segment
from spec_rollout.engines.vllm.worker.request_state import Row
from spec_rollout.engines.vllm.worker.sampling.base import SAMPLED, Step
from spec_rollout.engines.vllm.worker.sampling.record import Record


def segments_by_rule(
    step: Step, first_rows: np.ndarray, record: Record
) -> tuple[dict[AcceptanceRule, list[Segment]], list[int]]:
    """Sorts the logits rows of the requests with a key.

    Args:
        step: The step.
        first_rows: Of each request. [batch + 1], int64.
        record: Counts what is found.

    Returns:
        Segments by acceptance rule, in order, and the requests that have nothing tested, one row
        each. Together they own every row of these requests. Plain requests join the first rule.
    """
    # A rule of None: nothing to test, any rule will do.
    order: list[tuple[AcceptanceRule | None, Segment]] = []
    plain: list[int] = []
    scheduled_all = step.scheduled
    discard = step.discard.tolist()
    for r, row in enumerate(step.rows):
        if row is None:
            continue
        scheduled = [] if scheduled_all is None else scheduled_all[r]
        if not (scheduled or row.alive or discard[r]):
            plain.append(r)
            continue
        first, count = int(first_rows[r]), len(scheduled) + 1
        if discard[r]:
            order.append((None, Segment(r, first, 1)))
            used = 1
        else:
            index = int(step.lens[r]) - row.prompt_len
            segment = _segment(r, row, first, index, scheduled, record)
            used = segment.num_rows
            rule = row.rule if segment.is_draft else SAMPLED
            order.append((rule if segment.num_tested else None, segment))
        if used < count:  # rows computed for draft tokens that vLLM made up
            order.append((None, Segment(r, first + used, count - used)))
    default = next((rule for rule, _ in order if rule is not None), SAMPLED)
    groups: dict[AcceptanceRule, list[Segment]] = {}
    for any_rule, segment in order:
        groups.setdefault(default if any_rule is None else any_rule, []).append(segment)
    if default in groups:  # first, for it is the one that plain requests join
        groups = {default: groups.pop(default), **groups}
    return groups, plain


def _segment(
    request: int, row: Row, first_row: int, index: int, scheduled: list[int], record: Record
) -> Segment:
    """What is to be tested of one request.

    `scheduled`: draft tokens, for response tokens from `index` on.
    """
    metrics = record.metrics
    if row.alive:
        num_real = row.num_scheduled(index, scheduled) if scheduled else 0
        metrics.num_verified_tokens += num_real
        metrics.num_placeholder_tokens += len(scheduled) - num_real
        num_tested = min(num_real + 1, row.draft_len - index)
        num_rows = max(num_tested, min(num_real, num_tested) + 1)
        tokens = row.draft[index : index + num_tested]
        return Segment(request, first_row, num_rows, index, tokens, num_real, row)
    num_proposed, num_own = -1, 0
    tokens = np.empty(0, np.int32)
    if record.history is not None and scheduled:
        tokens, num_proposed, num_own = record.history.scheduled_one(row, index, scheduled)
    n = tokens.size
    metrics.num_placeholder_tokens += len(scheduled) - n
    return Segment(
        request,
        first_row,
        n + 1,
        index,
        tokens,
        n,
        row,
        is_draft=False,
        learn=num_proposed >= 0,
        num_own=num_own,
        is_whole=n == num_proposed,
    )
