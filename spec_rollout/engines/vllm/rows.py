"""What the worker remembers of a request with a noise key, next to vLLM's own state of it."""

from __future__ import annotations

from typing import Any

import numpy as np

from spec_rollout.engines.vllm.wire import ReuseRequest


class Row:
    """One request, from its first step to its last; survives preemption.

    Attributes:
        prompt_len: Tokens of its prompt; token j of the response is token prompt_len + j of the sequence.
        key, first_position, collect_id, rule: As in `ReuseRequest`.
        draft: The draft, cut to what the response can hold and after its first stop token. [draft_len], int32.
        draft_list: The same as a list: vLLM's scheduler speaks lists.
        draft_logprobs: [draft_len], float32, or None.
        alive: Draft tokens remain and none has been rejected.
        ends: The response ends with the draft's last token, should that be accepted.
        chunk: Draft tokens to propose next.
        proposed_at, proposal, proposal_ids: For which token of the response the last proposal starts, be it from the
            draft or from history, and what it is, as a list and as an array.
        max_response_len: Most tokens of the response.
        history_id: Its number in the rollout call, if proposals from history follow the draft; or -1.
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
        "history_id",
        "key",
        "masks",
        "max_response_len",
        "prompt_len",
        "proposal",
        "proposal_ids",
        "proposed_at",
        "rule",
    )

    def __init__(
        self,
        request: ReuseRequest,
        *,
        prompt_len: int,
        max_response_len: int,
        stop_token_ids: frozenset[int],
        first_chunk: int,
        masks: Any,
        history_id: int = -1,
    ) -> None:
        draft = request.draft_ids[:max_response_len]
        stopped = False
        if stop_token_ids and draft.size:
            stops = np.flatnonzero(np.isin(draft, list(stop_token_ids)))
            if stops.size:
                draft = draft[: int(stops[0]) + 1]
                stopped = True
        self.prompt_len = prompt_len
        self.key = request.key
        self.first_position = request.first_position
        self.collect_id = request.collect_id
        self.rule = request.rule
        self.draft = draft
        self.draft_list: list[int] = draft.tolist()
        self.draft_len = draft.size
        logprobs = request.draft_logprobs
        self.draft_logprobs = None if logprobs is None else logprobs[: draft.size]
        self.alive = draft.size > 0 and request.rule.uses_drafts
        self.ends = stopped or draft.size >= max_response_len
        self.chunk = first_chunk
        self.proposed_at = -1
        self.proposal: list[int] = []
        self.proposal_ids = draft[:0]
        self.masks = masks
        self.max_response_len = max_response_len
        self.history_id = history_id
        self.first_step = -1

    def num_scheduled(self, index: int, scheduled: list[int]) -> int:
        """How many of the draft tokens that vLLM scheduled really are this draft's, from response token `index` on.

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

    def from_history(self, index: int, scheduled: list[int]) -> tuple[np.ndarray, bool]:
        """The scheduled tokens to test where no draft is followed, and whether they are those proposed last.

        Whatever their origin: a token passes only if sampling gives it. vLLM's own inventions (-1) are left out, and
        with tensor parallelism the proposals of one worker are tested by all.
        """
        if self.history_id < 0:
            return np.empty(0, np.int32), False
        n = len(scheduled)
        if self.proposed_at == index and scheduled == self.proposal[:n]:
            return self.proposal_ids[:n], True
        tokens = np.array(scheduled, np.int32)
        invented = np.flatnonzero(tokens < 0)
        if invented.size:
            tokens = tokens[: int(invented[0])]
        return tokens, False

    def propose(self, index: int) -> list[int]:
        """The next chunk, for response tokens from `index` on."""
        # The token after the last chunk is sampled along with it, so nothing is gained by computing a last token that
        # ends the response.
        stop = min(index + self.chunk, self.draft_len - 1 if self.ends else self.draft_len)
        self.proposed_at = index
        self.proposal = self.draft_list[index:stop]
        self.proposal_ids = self.draft[index:stop]
        return list(self.proposal)
