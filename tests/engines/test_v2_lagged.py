"""Proposals made a step late: what waits for the device, and what is learned of requests that left."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from spec_rollout.drafting import NoiseLaw
from spec_rollout.engines.vllm.metrics import ReuseMetrics
from spec_rollout.engines.vllm.options import EngineOptions
from spec_rollout.engines.vllm.wire import SampleName
from spec_rollout.engines.vllm.worker.engine_side import Arrival, EngineSide
from spec_rollout.engines.vllm.worker.v2 import lagged
from spec_rollout.engines.vllm.worker.v2.lagged import LaggedProposals
from spec_rollout.engines.vllm.worker.v2.step import StepState

SLOTS, LEN = 4, 32
PARAMS = SimpleNamespace(temperature=1.0, seed=None, logprobs=None, n=1)


class Worker:
    """Steps that give every request the next token of a text of its own."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.waits = 0
        self.lines: list[tuple[int, int]] = []
        patch.setattr(lagged, "copying", self._copying)
        metrics = ReuseMetrics()
        self.proposals = LaggedProposals(
            SLOTS,
            num_planned=2,
            max_chunk=4,
            token_budget=64,
            noise=NoiseLaw.VLLM,
            device=torch.device("cpu"),
            metrics=lambda: metrics,
        )
        side = EngineSide(
            EngineOptions(mode="coupled", lagged_tokens=2), engine_seed=0, replica=0, on_v2=True
        )
        self.proposals.serve_by_itself(side, 4, lambda line: None)
        live = self.proposals.live
        assert live is not None
        self.live = live
        patch.setattr(live, "end_step", lambda rows, tokens: self.lines.append((rows, tokens)))
        self.token_ids = torch.zeros(SLOTS, LEN, dtype=torch.int32)
        self.total_lens = torch.zeros(SLOTS, dtype=torch.int32)
        self.prompt_lens = torch.zeros(SLOTS, dtype=torch.int32)

    def _copying(self, packed: torch.Tensor) -> Any:
        values = packed.clone()  # of this step, whatever comes after

        def copied() -> np.ndarray:
            self.waits += 1
            return values.numpy()

        return copied

    def add(self, slot: int, request_id: str, prompt: list[int]) -> None:
        self.proposals.arrive(request_id, Arrival(prompt, PARAMS, "", SampleName(0)))
        limits: dict[str, Any] = {"max_response_len": 20, "stop_token_ids": frozenset()}
        seed = self.proposals.seed_of(request_id, **limits)
        assert seed is not None
        self.proposals.take_slot(slot, request_id, seed=seed, prompt_len=len(prompt))
        self.token_ids[slot, : len(prompt)] = torch.tensor(prompt)
        self.total_lens[slot] = self.prompt_lens[slot] = len(prompt)

    def step(self, *slots: int) -> None:
        for slot in slots:
            self.token_ids[slot, self.total_lens[slot]] = 10 * slot + int(self.total_lens[slot])
            self.total_lens[slot] += 1
        n = len(slots)
        step = StepState(
            slots=np.array(slots),
            device_slots=torch.tensor(slots, dtype=torch.int32),
            num_scheduled=np.zeros(n, np.int64),
            num_tokens=n,
            num_logits=n,
            num_sampled=torch.ones(n, dtype=torch.int32),
            total_lens=self.total_lens,
            prompt_lens=self.prompt_lens,
            token_ids=self.token_ids,
        )
        counts = torch.zeros(SLOTS, dtype=torch.int32)
        self.proposals.propose(step, torch.zeros(n, 4, dtype=torch.int64), counts)

    def over(self, *gone: tuple[int, str]) -> None:
        for slot, _ in gone:
            self.proposals.leave(slot)
        self.proposals.over([request_id for _, request_id in gone])


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Worker:
    return Worker(monkeypatch)


def rollout(worker: Worker, prompt: list[int]) -> list[int]:
    """What the next request for the first sample of a prompt has to follow."""
    worker.live.side.weights_changed()
    served = worker.live.side.admit(Arrival(prompt, PARAMS, "", SampleName(0)))
    assert served is not None
    return served.request.draft_ids.tolist()


def test_an_abort_waits_for_no_step_that_others_go_on_from(worker: Worker) -> None:
    worker.add(0, "a", [5, 6])
    worker.add(1, "b", [7, 8])
    worker.step(0, 1)
    worker.step(0, 1)
    assert worker.waits == 1  # for the first
    worker.over((0, "a"))
    assert worker.waits == 1
    assert len(worker.live) == 2
    worker.step(1)
    assert worker.waits == 2
    assert len(worker.live) == 1
    assert rollout(worker, [5, 6]) == [2, 3]  # both of its steps
    worker.step(1)
    # Each step's tokens are counted with the next.
    assert worker.lines == [(0, 0), (2, 2), (2, 2), (1, 1)]


def test_with_the_last_request_of_a_step_all_is_learned(worker: Worker) -> None:
    worker.add(0, "a", [5, 6])
    worker.add(1, "b", [7, 8])
    worker.step(0, 1)
    worker.over((0, "a"))
    assert worker.waits == 0
    worker.over((1, "b"))
    assert worker.waits == 1
    assert len(worker.live) == 0
    assert rollout(worker, [5, 6]) == [2]
    worker.add(2, "c", [9])
    worker.step(2)
    assert worker.lines == [(0, 0), (2, 2)]


def test_what_left_is_known_where_it_is_asked_for(worker: Worker) -> None:
    """By a request with its id, and by one for a sample of its prompt."""
    for request_id, prompt in (("a", [1, 2]), ("c", [5, 6])):
        worker.add(0, "a", [5, 6])
        worker.add(1, "b", [7, 8])
        worker.step(0, 1)
        worker.over((0, "a"))
        assert "a" in worker.proposals._leaving
        worker.live.side.weights_changed()
        worker.add(2, request_id, prompt)
        assert not worker.proposals._leaving
        assert worker.live.info()["num_repeated"] == 0
        worker.over((1, "b"), (2, request_id))
        assert len(worker.live) == 0
        worker.live.side.weights_changed()


def test_another_prompts_request_waits_for_nothing(worker: Worker) -> None:
    worker.add(0, "a", [5, 6])
    worker.add(1, "b", [7, 8])
    worker.step(0, 1)
    worker.over((0, "a"))
    worker.add(2, "c", [9])
    assert worker.waits == 0


def test_settled_all_is_known(worker: Worker) -> None:
    """Before what is remembered is exported or cleared."""
    worker.add(0, "a", [5, 6])
    worker.add(1, "b", [7, 8])
    worker.step(0, 1)
    worker.over((0, "a"))
    worker.proposals.settle()
    assert len(worker.live) == 1
    assert rollout(worker, [5, 6]) == [2]
