"""What a step waits for on Model Runner V1, and what kernels report of it: without vLLM or a GPU.

On a GPU kernels report bad values in a word on the device. Here it is set by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from spec_rollout import ops
from spec_rollout.acceptance import AcceptanceRule, Coupled, Lenient
from spec_rollout.engines.vllm.options import EngineOptions
from spec_rollout.engines.vllm.wire import ReuseRequest
from spec_rollout.engines.vllm.worker import transfer
from spec_rollout.engines.vllm.worker.chunks import ChunkProposer
from spec_rollout.engines.vllm.worker.engine_side import EngineSide
from spec_rollout.engines.vllm.worker.request_state import Row
from spec_rollout.engines.vllm.worker.sampling import general
from spec_rollout.engines.vllm.worker.sampling.base import Step
from spec_rollout.ops import _status

VOCAB = 31
PROMPT_LEN = 3
DRAFT = np.array([4, 5, 6], np.int32)
BAD_LOGITS = 4  # bit of the word


@pytest.fixture
def word(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The device's status word, which ops on a CPU have none of."""
    monkeypatch.setattr(_status, "_words", {})
    made = _status.status_word(torch.zeros(1), on_cpu=True)
    assert made is not None
    monkeypatch.setattr(ops, "status_word", lambda tensor: made)
    return made


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Copies to the host that were begun, and waited for."""
    found: list[str] = []

    def copying(tensor: torch.Tensor) -> Callable[[], np.ndarray]:
        found.append("begun")
        values = tensor.clone()

        def copied() -> np.ndarray:
            found.append("waited")
            return values.numpy()

        return copied

    monkeypatch.setattr(transfer, "copying", copying)
    monkeypatch.setattr(general, "copying", copying)
    return found


def row_of(key: int, rule: AcceptanceRule | None = None, history_id: int = -1) -> Row:
    request = ReuseRequest(key, Coupled())
    if rule is not None:
        request = ReuseRequest(key, rule, DRAFT, np.full(DRAFT.size, -1.0, np.float32))
    return Row(
        request,
        collect_id=-1,
        prompt_len=PROMPT_LEN,
        max_response_len=16,
        stop_token_ids=frozenset(),
        first_chunk=4,
        masks=None,
        history_id=history_id,
    )


def step_of(rows: list[Row | None], scheduled: list[list[int]] | None = None) -> Step:
    n = len(rows)
    num_logits = n if scheduled is None else n + sum(map(len, scheduled))

    def sample_stock(logits: torch.Tensor) -> Any:
        return SimpleNamespace(sampled_token_ids=logits.argmax(-1)[:, None], logprobs_tensors=None)

    return Step(
        rows=rows,
        lens=np.full(n, PROMPT_LEN, np.int64),
        scheduled=scheduled,
        discard=np.zeros(n, bool),
        logits=torch.randn(num_logits, VOCAB, generator=torch.Generator().manual_seed(0)),
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        sample_stock=sample_stock,
        logprobs=None,
    )


def new_proposer() -> ChunkProposer:
    return ChunkProposer(first_chunk=4, max_chunk=8, token_budget=64)


def propose(proposer: ChunkProposer, tokens: torch.Tensor) -> list[list[int]]:
    """What vLLM does with a step's tokens."""
    sampled = [[t for t in row if t >= 0] for row in tokens.tolist()]
    text = np.zeros((len(sampled), 32), np.int32)
    for row, given in zip(text, sampled, strict=True):
        row[PROMPT_LEN : PROMPT_LEN + len(given)] = given
    lens = np.array([PROMPT_LEN + len(given) for given in sampled])
    return proposer.propose(sampled, lens, text)


@pytest.mark.parametrize("remembers", [False, True])
def test_bad_logits_of_a_plain_step_are_that_steps_error(
    word: torch.Tensor, remembers: bool
) -> None:
    proposer = new_proposer()
    rows: list[Row | None] = [row_of(1), row_of(2)]
    if remembers:
        side = EngineSide(EngineOptions(mode="drafting"), engine_seed=0, replica=0)
        proposer.serve_by_itself(side, lambda line: None)
        assert proposer.live is not None
        history = proposer.live.history
        rows = [row_of(key, history_id=history.join(bytes(16), [], None)) for key in (1, 2)]
    tokens, _ = proposer.sampler(step_of(rows))
    propose(proposer, tokens)
    word.fill_(BAD_LOGITS)  # by the kernel of the next step, which gives token 0
    tokens, _ = proposer.sampler(step_of(rows))
    with pytest.raises(ValueError, match="logits: expected numbers below"):
        propose(proposer, tokens)
    assert not word.any()
    tokens, _ = proposer.sampler(step_of(rows))
    propose(proposer, tokens)


@pytest.mark.parametrize("rules", [[Coupled()], [Coupled(), Lenient(0.5)]], ids=len)
def test_bad_logits_of_a_test_are_its_steps_error(
    word: torch.Tensor, rules: list[AcceptanceRule]
) -> None:
    proposer = new_proposer()
    rows: list[Row | None] = [row_of(key, rule) for key, rule in enumerate(rules)]
    word.fill_(BAD_LOGITS)
    with pytest.raises(ValueError, match="logits: expected numbers below"):
        proposer.sampler(step_of(rows, [DRAFT.tolist()] * len(rows)))


def test_what_comes_with_the_word_is_what_comes_without(
    monkeypatch: pytest.MonkeyPatch, word: torch.Tensor
) -> None:
    def steps() -> list[Any]:
        proposer = new_proposer()
        rules = [None, Coupled(), Lenient(0.5)]
        mixed = [None, *(row_of(key, rule) for key, rule in enumerate(rules))]
        plain = [row_of(7), row_of(8)]
        given = [
            proposer.sampler(step_of(mixed, [[], [], DRAFT.tolist(), DRAFT.tolist()]))[0],
            proposer.sampler(step_of(plain))[0],
        ]
        return [tokens.tolist() for tokens in given]

    expected = steps()
    monkeypatch.setattr(ops, "status_word", lambda tensor: None)
    assert steps() == expected


def test_a_plain_step_waits_for_nothing_before_its_tokens_are_there(
    word: torch.Tensor, events: list[str]
) -> None:
    proposer = new_proposer()
    tokens, _ = proposer.sampler(step_of([row_of(1), row_of(2)]))
    assert events == ["begun"]
    propose(proposer, tokens)
    assert events == ["begun", "waited"]


def test_all_that_a_step_gives_is_on_its_way_before_anything_is_waited_for(
    word: torch.Tensor, events: list[str]
) -> None:
    """So a step waits once, whatever it tests: of two rules, beside requests that are vLLM's."""
    rows = [None, row_of(1), row_of(2, Coupled()), row_of(3, Lenient(0.5))]
    new_proposer().sampler(step_of(rows, [[], [], DRAFT.tolist(), DRAFT.tolist()]))
    assert events == ["begun"] * 3 + ["waited"] * 3
