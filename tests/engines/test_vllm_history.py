"""What the drafter is asked and told of the requests of a step: without vLLM."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from spec_rollout import ops
from spec_rollout.acceptance import Coupled
from spec_rollout.drafting import MatchShares, NoiseLaw, Payoff
from spec_rollout.engines.vllm.metrics import ReuseMetrics
from spec_rollout.engines.vllm.options import EngineOptions
from spec_rollout.engines.vllm.wire import ReuseRequest
from spec_rollout.engines.vllm.worker.chunks import ChunkProposer
from spec_rollout.engines.vllm.worker.engine_history import EngineHistory
from spec_rollout.engines.vllm.worker.engine_side import EngineSide
from spec_rollout.engines.vllm.worker.groups import Known
from spec_rollout.engines.vllm.worker.live import LiveRequests
from spec_rollout.engines.vllm.worker.request_state import Row
from spec_rollout.engines.vllm.worker.v2.proposals import Proposals
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


class Fixed(Payoff):
    """A worker whose clock says that it is worth asking for proposals, or that it is not."""

    def __init__(self, asks: bool) -> None:
        super().__init__()
        self.asks = asks

    def pays(self, rows: int) -> bool:
        return self.asks

    def worth(self, rows: int, proposed: int, expected: float, *, beside: int = 0) -> bool:
        return False


def narrow(payoff: Payoff, **kwargs: Any) -> EngineHistory:
    """With room for a few rollouts of some dozen tokens."""
    return EngineHistory(
        (1 << 19) + 40_000, payoff, MatchShares(), max_proposal=8, token_budget=64, **kwargs
    )


def recalled(workers: list[EngineHistory], *, num_steps: int = 1000) -> list[list[Any]]:
    """What each worker finds, whenever a request comes: all are given the same steps."""
    rng = np.random.default_rng(0)
    found: list[list[Any]] = [[] for _ in workers]
    live: list[tuple[Row, list[int], int]] = []  # its tokens, and how many they are to be
    for _ in range(num_steps):
        for row, tokens, most in list(live):
            if len(tokens) == most:
                live.remove((row, tokens, most))
                for worker in workers:
                    worker.leave(row.history_id)
        while len(live) < 12 and (not live or rng.random() < 0.4):
            group, tag = prompt_key([int(rng.integers(12))]), int(rng.integers(2))
            for results, worker in zip(found, workers, strict=True):
                draft = worker.recall(group, tag)
                results.append(None if draft is None else draft[0].tolist())
            (slot,) = {worker.join(group, [], tag) for worker in workers}
            live.append((row_of(slot, True), [], int(rng.integers(30, 60))))
        new = rng.integers(0, 50, len(live)).astype(np.int32)
        text = np.zeros((len(live), len(PROMPT) + 64), np.int32)
        for i, (_, tokens, _) in enumerate(live):
            tokens.append(int(new[i]))
            text[i, len(PROMPT) : len(PROMPT) + len(tokens)] = tokens
        ends = np.array([len(PROMPT) + len(tokens) for _, tokens, _ in live])
        drawn = ops.SampleResult(torch.from_numpy(new), torch.full((len(live),), -1.0))
        batch = Known.of([row for row, _, _ in live])
        batch.needs_only_draws()
        for worker in workers:
            drafts: list[list[int]] = [[] for _ in live]
            worker.propose(batch, [[int(t)] for t in new], drawn, None, ends, text, drafts)
    assert min(worker.info()["num_evicted_sequences"] for worker in workers) > 20
    return found


def test_workers_with_clocks_of_their_own_find_the_same_drafts() -> None:
    """Ranks of tensor parallelism: they test the same rows, so by the same drafts."""
    one, other = recalled([narrow(Fixed(asks), tells_late=False) for asks in (True, False)])
    assert one == other
    assert 0.2 < np.mean([draft is not None for draft in one]) < 0.8
    # The bound is so near that it takes no more than this for them not to.
    one, other = recalled([narrow(Fixed(asks)) for asks in (True, False)])
    assert one != other


@pytest.mark.parametrize("has_peers", [False, True])
def test_only_a_worker_without_peers_tells_the_drafter_late(has_peers: bool) -> None:
    def side() -> EngineSide:
        options = EngineOptions(mode="lenient")
        return EngineSide(options, engine_seed=0, replica=0, has_peers=has_peers)

    on_v1 = ChunkProposer(first_chunk=4, max_chunk=8, token_budget=64)
    on_v1.serve_by_itself(side(), lambda line: None)
    metrics = ReuseMetrics()
    on_v2 = Proposals(
        4,
        max_chunk=8,
        token_budget=64,
        noise=NoiseLaw.VLLM,
        device=torch.device("cpu"),
        metrics=lambda: metrics,
    )
    on_v2.serve_by_itself(side(), 4, lambda line: None)
    for live in (on_v1.live, on_v2.live):
        assert live is not None
        assert live.history._tells_late is not has_peers


def test_the_log_says_what_was_forgotten_for_want_of_room() -> None:
    history = narrow(Payoff())
    side = EngineSide(EngineOptions(mode="drafting"), engine_seed=0, replica=0)
    live = LiveRequests(
        side, history, first_chunk=4, metrics=ReuseMetrics, write_log=lambda line: None
    )

    def finish(prompt: int) -> None:
        slot = history.join(prompt_key([prompt]), [], None)
        ids = np.arange(700, dtype=np.int32)
        history._drafter.extend(history._handles(np.array([slot])), ids, np.array([ids.size]))
        history.leave(slot)

    finish(0)
    assert live._summary().endswith("1 prompts, 0 MiB")
    for prompt in range(1, 5):
        finish(prompt)
    gone = history.info()["num_evicted_groups"]
    assert gone > 0
    assert live._summary().endswith(
        f"MiB, forgotten for want of room: {gone} prompts, {gone} rollouts"
    )
