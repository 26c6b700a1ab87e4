"""How many draft tokens an asynchronous scheduler plans for a request.

It plans a step before it knows what the last one gave, and the tokens themselves are on the device
alone. So it counts on the step under way to accept all of its tokens; a rejection is noticed a step
late, and costs the rows of one step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spec_rollout.engines.vllm.worker.request_state import usable_draft


class Plan:
    """Of one request.

    Args:
        draft_ids: Its draft. [num_draft_tokens], int32.
        max_response_len: Most tokens of its response.
        stop_token_ids: That end it.
        first_chunk: Draft tokens of the first step that has any; every further step has twice as
            many.
    """

    __slots__ = ("_checked", "_chunk", "_draft", "_limit")

    def __init__(
        self,
        draft_ids: np.ndarray,
        *,
        max_response_len: int,
        stop_token_ids: frozenset[int],
        first_chunk: int,
    ) -> None:
        draft, ends = usable_draft(draft_ids, max_response_len, stop_token_ids)
        self._draft: list[int] = draft.tolist()
        self._limit = max(0, len(self._draft) - int(ends))
        self._chunk = first_chunk
        self._checked = 0

    def next(self, known: Sequence[int], num_under_way: int, most: int) -> int:
        """Draft tokens to plan for the next step.

        Args:
            known: The response so far.
            num_under_way: Tokens that steps under way will add at most.
            most: Upper bound.
        """
        if self._limit == 0:
            return 0
        end = min(len(known), self._limit)
        for index in range(self._checked, end):
            if known[index] != self._draft[index]:
                self._limit = 0
                return 0
        self._checked = end
        count = min(self._chunk, most, self._limit - len(known) - num_under_way)
        if count <= 0:
            return 0
        self._chunk *= 2
        return count
