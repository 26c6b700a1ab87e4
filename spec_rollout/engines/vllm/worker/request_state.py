"""What the worker remembers of a request with a noise key, next to vLLM's own state of it."""

from __future__ import annotations

from typing import Any

import numpy as np

from spec_rollout.acceptance import Coupled
from spec_rollout.engines.vllm.wire import ReuseRequest
from spec_rollout.packed import lens_to_stop


def usable_draft(
    draft_ids: np.ndarray, max_response_len: int, stop_token_ids: frozenset[int]
) -> tuple[np.ndarray, bool]:
    """A draft, cut to what the response can hold and after its first stop token.

    Returns:
        The draft [draft_len], int32, and whether the response ends with its last token, should that
        be accepted.
    """
    draft = draft_ids[:max_response_len]
    lens, stops = lens_to_stop(draft, np.array([0, draft.size]), tuple(stop_token_ids))
    draft = draft[: int(lens[0])]
    return draft, bool(stops[0]) or draft.size >= max_response_len


class Row:
    """One request, from its first step to its last; survives preemption.

    Attributes:
        prompt_len: Tokens of its prompt; token j of the response is token prompt_len + j of the
            sequence.
        key, first_position, rule: As in `ReuseRequest`.
        collect_id: The same, if its rollout call announced it (`Record.claim`), or -1.
        draft: The draft, cut to what the response can hold and after its first stop token.
            [draft_len], int32.
        draft_list: The same as a list, if `alive`: vLLM's scheduler speaks lists.
        draft_logprobs: [draft_len], float32, or None.
        follows: Its draft is proposed by the drafter, among other things, and tested like any
            proposal: where the noise is the draft's and the rule lossless, to be accepted is to be
            what sampling gives.
        alive: Draft tokens remain and none has been rejected.
        ends: The response ends with the draft's last token, should that be accepted.
        chunk: Draft tokens to propose next.
        proposed_at, proposal: For which token of the response the last chunk starts, and what it
            is.
        max_response_len: Most tokens of the response.
        history_id: Its number in the rollout call, if proposals from history follow the draft; or
            -1.
        is_drawn: Its tokens are drawn with its noise, not taken greedily.
        first_step: Engine step that gave its first token; -1 before.
        masks: The request's `LogitMasks`, or None.
    """

    __slots__ = (
        "alive",
        "chunk",
        "collect_id",
        "draft",
        "draft_len",
        "draft_list",
        "draft_logprobs",
        "ends",
        "first_position",
        "first_step",
        "follows",
        "history_id",
        "is_drawn",
        "key",
        "masks",
        "max_response_len",
        "prompt_len",
        "proposal",
        "proposed_at",
        "rule",
    )

    def __init__(
        self,
        request: ReuseRequest,
        *,
        collect_id: int,
        prompt_len: int,
        max_response_len: int,
        stop_token_ids: frozenset[int],
        first_chunk: int,
        masks: Any,
        history_id: int = -1,
        is_drawn: bool = True,
    ) -> None:
        draft, ends = usable_draft(request.draft_ids, max_response_len, stop_token_ids)
        self.prompt_len = prompt_len
        self.key = request.key
        self.first_position = request.first_position
        self.collect_id = collect_id
        self.rule = request.rule
        self.draft = draft
        self.draft_len = draft.size
        logprobs = request.draft_logprobs
        self.draft_logprobs = None if logprobs is None else logprobs[: draft.size]
        self.follows = (
            is_drawn
            and history_id >= 0
            and draft.size > 0
            and self.draft_logprobs is not None
            and request.rule == Coupled()
        )
        self.alive = draft.size > 0 and request.rule.uses_drafts and not self.follows
        self.draft_list: list[int] = draft.tolist() if self.alive else []
        self.ends = ends
        self.chunk = first_chunk
        self.proposed_at = -1
        self.proposal: list[int] = []
        self.masks = masks
        self.max_response_len = max_response_len
        self.history_id = history_id
        self.is_drawn = is_drawn
        self.first_step = -1

    def num_scheduled(self, index: int, scheduled: list[int]) -> int:
        """How many of the tokens that vLLM scheduled are this draft's, from token `index` on.

        vLLM makes up drafts of its own (-1, 0) and cuts long ones.
        """
        n = len(scheduled)
        if self.proposed_at == index and scheduled == self.proposal[:n]:
            return n
        count = 0
        for token, expected in zip(scheduled, self.draft_list[index:], strict=False):
            if token != expected:
                break
            count += 1
        return count

    def propose(self, index: int) -> list[int]:
        """The next chunk, for response tokens from `index` on."""
        # The token after the last chunk is sampled along with it, so nothing is gained by computing
        # a last token that ends the response.
        stop = min(index + self.chunk, self.draft_len - 1 if self.ends else self.draft_len)
        self.proposed_at = index
        self.proposal = self.draft_list[index:stop]
        return list(self.proposal)
