"""What the drafter is asked for the requests of a step: without vLLM."""

from __future__ import annotations

import numpy as np
import pytest

from spec_rollout.acceptance import Coupled
from spec_rollout.drafting import MatchShares, Payoff
from spec_rollout.engines.vllm.wire import ReuseRequest
from spec_rollout.engines.vllm.worker.engine_history import EngineHistory
from spec_rollout.engines.vllm.worker.groups import Known
from spec_rollout.engines.vllm.worker.request_state import Row
from spec_rollout.keys import prompt_key

PROMPT = [40, 41]
TEXT = list(range(1, 13))


def row_of(slot: int, is_drawn: bool) -> Row:
    return Row(
        ReuseRequest(slot, Coupled()),
        collect_id=-1,
        prompt_len=len(PROMPT),
        max_response_len=64,
        stop_token_ids=frozenset(),
        first_chunk=8,
        masks=None,
        history_id=slot,
        is_drawn=is_drawn,
    )


def test_greedy_and_drawn_requests_share_what_a_step_has_room_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Payoff, "pays", lambda self, rows: True)
    monkeypatch.setattr(Payoff, "threshold", lambda self, rows: 0.0)
    monkeypatch.setattr(Payoff, "worth", lambda self, *args, **kwargs: True)
    monkeypatch.setattr(Payoff, "room", lambda self, rows: 9)
    history = EngineHistory(
        1 << 22, Payoff(), MatchShares(), max_proposal=8, token_budget=64, sharing=None
    )
    key, sure = prompt_key(PROMPT), np.zeros(len(TEXT), np.float32)
    slot = history.join(key, [], None)
    ids = np.array(TEXT, np.int32)
    history._drafter.extend(history._handles(np.array([slot])), ids, np.array([ids.size]), sure)
    history.leave(slot)
    rows = [row_of(history.join(key, [], None), is_drawn) for is_drawn in (True, False, True)]
    drafts: list[list[int]] = [[], [], []]
    history.propose(
        Known.of(rows),
        [[TEXT[0]]] * 3,
        None,
        np.zeros((3, 1), np.float32),
        np.full(3, len(PROMPT) + 1),
        np.tile(np.array([*PROMPT, TEXT[0]], np.int32), (3, 1)),
        drafts,
    )
    assert drafts == [TEXT[1:4]] * 3
