"""Proposals from history under asynchronous scheduling: made from what is known a step late.

While the host makes a step's proposals, the device is still at work on that step. So the drafter is
told what the step before gave, and guesses on from there: first the tokens of the step under way,
then those to propose behind them. The device looks whether it was right about the former. What is
planned is decided by the scheduler, which knows nothing of all that: the same number of tokens for
every request in every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from spec_rollout.drafting import Payoff
from spec_rollout.engines.vllm.worker.groups import Known
from spec_rollout.engines.vllm.worker.request_state import Row
from spec_rollout.engines.vllm.worker.transfer import copying
from spec_rollout.engines.vllm.worker.v2.proposals import NO_HISTORY, Proposals
from spec_rollout.engines.vllm.worker.v2.step import (
    GivenTokens,
    StepState,
    continued,
    packed_tokens,
)
from spec_rollout.types import History

# A guess ends where a token of it is right with less than this probability. What is planned is
# computed anyway, and a wrong token costs no more than none.
_LEAST = 0.05
_NO_BOUND = 1 << 30


class _Always(Payoff):
    """Proposes whatever is likely enough: what steps compute does not depend on it."""

    def pays(self, rows: int) -> bool:
        return True

    def threshold(self, rows: int) -> float:
        return _LEAST

    def room(self, rows: int) -> int:
        return _NO_BOUND

    def worth(self, rows: int, proposed: int, expected: float, *, beside: int = 0) -> bool:
        return proposed > 0


@dataclass(frozen=True, slots=True)
class _Late:
    """A step whose tokens are not known yet.

    Attributes:
        rows, slots, num_scheduled: Of each request, as in `StepState`.
        packed: Waits, and gives what `packed_tokens` packed, with the number of tokens proposed
            behind the step in a further column.
        tested: Tokens that had been proposed to each before the step. [num_reqs], int64.
        going: Slots of those that have not left since.
    """

    rows: list[Row | None]
    slots: np.ndarray
    num_scheduled: np.ndarray
    packed: Callable[[], np.ndarray]
    tested: np.ndarray
    going: set[int]


class LaggedProposals(Proposals):
    """`Proposals` that wait for no step, for requests that the engine serves by itself.

    Args:
        num_slots: As in `Proposals`, with all its other arguments.
        num_planned: Tokens that the scheduler plans for each request.
    """

    def __init__(self, num_slots: int, *, num_planned: int, **kwargs: Any) -> None:
        super().__init__(num_slots, **kwargs)
        self._num_planned = num_planned
        # The step under way gives at most one token more than it was planned.
        self._max_chunk = 2 * num_planned + 1
        self._token_budget = _NO_BOUND
        self._times.payoff = _Always()
        self._late: _Late | None = None
        self._guesses: dict[int, tuple[int, list[int]]] = {}  # by history id: first index, tokens
        self._stops: dict[int, frozenset[int]] = {}  # by history id
        self._ended: set[int] = set()  # history ids
        self._leaving: set[str] = set()  # over, with tokens of the step under way
        self._given = np.zeros(2, np.int64)  # requests that were given tokens, these; not counted
        self._proposed = np.zeros(num_slots, np.int64)  # to each slot, behind the last known step
        self._tested = np.zeros(0, np.int64)

    def begin(self, num_requests: int, history: History | None, stop_token_ids: list[int]) -> None:
        """See `Proposals.begin`.

        Raises:
            ValueError: if there is a history: the scheduler plans nothing for a call's requests.
        """
        if history is not None:
            raise ValueError(NO_HISTORY)
        super().begin(num_requests, history, stop_token_ids)

    def seed_of(
        self, request_id: str, *, max_response_len: int, stop_token_ids: frozenset[int]
    ) -> int | None:
        """See `Proposals.seed_of`."""
        if self._leaving and self._comes_again(request_id):
            self.settle()
        seed = super().seed_of(
            request_id, max_response_len=max_response_len, stop_token_ids=stop_token_ids
        )
        if (row := self._row_of.get(request_id)) is not None:
            self._stops[row.history_id] = stop_token_ids
        return seed

    def announced(self, request_id: str, *args: Any, **kwargs: Any) -> bool:
        """See `Proposals.announced`."""
        if request_id in self._leaving:
            self.settle()
        return super().announced(request_id, *args, **kwargs)

    def take_slot(self, slot: int, request_id: str, *, seed: int, prompt_len: int) -> None:
        """See `Proposals.take_slot`."""
        super().take_slot(slot, request_id, seed=seed, prompt_len=prompt_len)
        self._proposed[slot] = 0

    def leave(self, slot: int) -> None:
        """See `Proposals.leave`."""
        super().leave(slot)
        if self._late is not None:
            self._late.going.discard(slot)

    def over(self, request_ids: Iterable[str]) -> None:
        """See `Proposals.over`. What they were given last is still learned.

        Of those that were aborted, or met a stop string, it is not known yet: they leave once it
        is.
        """
        request_ids = [i for i in request_ids if i in self._row_of]
        under_way: set[int] = set()
        if request_ids and self._late is not None:
            under_way = {
                id(row)
                for row in self._late.rows
                if row is not None and row.history_id not in self._ended
            }
        self._leaving |= {i for i in request_ids if id(self._row_of[i]) in under_way}
        self._let_go([i for i in request_ids if i not in self._leaving])
        if self._leaving and not (self._late is not None and self._late.going):
            self.settle()  # there is nobody whom it would hold up, and maybe no step to come

    def settle(self) -> None:
        """See `Proposals.settle`. Waits for the last step."""
        self._take_late()
        leaving, self._leaving = self._leaving, set()
        self._let_go(list(leaving))

    def _let_go(self, request_ids: list[str]) -> None:
        gone = {row.history_id for i in request_ids if (row := self._row_of.get(i)) is not None}
        super().over(request_ids)
        for history_id in gone:
            self._stops.pop(history_id, None)
            self._guesses.pop(history_id, None)
        self._ended -= gone

    def _comes_again(self, request_id: str) -> bool:
        """Whether a request is one that is leaving, or may be the same sample of a prompt."""
        arrival = self._arrivals.get(request_id)
        return request_id in self._leaving or (
            arrival is not None
            and self.live is not None
            and self.live.shares_samples(arrival, self._leaving)
        )

    def propose(
        self, step: StepState, proposed: torch.Tensor, counts: torch.Tensor
    ) -> torch.Tensor:
        """See `Proposals.propose`."""
        rows = [self._rows[slot] for slot in step.slots.tolist()]
        self._times.count(step.num_tokens, step.num_logits, rows)
        self.settle()
        if any(row is not None for row in rows):
            packed = packed_tokens(step, counts, self._logprobs)
            guesses = self._guesses_for(rows)
            if guesses[:, 1].any():
                proposed = continued(step, guesses, proposed, counts, self._num_planned)
            behind = counts[step.device_slots.long()][:, None].to(packed.dtype)
            copy = copying(torch.cat([packed, behind], dim=1))
            tested, going = self._proposed[step.slots], set(step.slots.tolist())
            self._late = _Late(rows, step.slots, step.num_scheduled, copy, tested, going)
        self._guesses = {}
        self._times.end_step()
        if self.live is not None:
            num_rows, num_tokens = self._given.tolist()
            self.live.end_step(num_rows, num_tokens)
        self._given.fill(0)
        return proposed

    def _take_late(self) -> None:
        """Learns what the last step gave, and guesses on from there."""
        late, self._late = self._late, None
        if late is None or self.history is None:
            return
        here = {id(row) for row in self._row_of.values()}
        # Of a request that has ended the next step gives tokens, too: nobody asked for these.
        rows = [
            row
            if row is not None and id(row) in here and row.history_id not in self._ended
            else None
            for row in late.rows
        ]
        if not any(row is not None for row in rows):
            return
        packed = late.packed()
        found = GivenTokens.unpacked(packed[:, :-1])
        self._tested = late.tested
        # Others may have the slots of those that left.
        stay = np.array([slot in late.going for slot in late.slots.tolist()], bool)
        self._proposed[late.slots[stay]] = np.where(found.own > 0, 0, packed[:, -1])[stay]
        drafts = self._ask(found, rows, late.num_scheduled)
        for row, given, index, tokens, draft in zip(
            rows,
            found.given.tolist(),
            found.indices.tolist(),
            found.tokens.tolist(),
            drafts,
            strict=True,
        ):
            if row is None:
                continue
            stops = self._stops.get(row.history_id, frozenset())
            if index >= row.max_response_len or not stops.isdisjoint(tokens[:given]):
                self._ended.add(row.history_id)
            elif draft:
                self._guesses[row.history_id] = index, draft
        self._given += int((found.given > 0).sum()), int(found.given.sum())

    def _guesses_for(self, rows: list[Row | None]) -> np.ndarray:
        """As `continued` takes them. [num_reqs, 2 + most], int32."""
        guesses = np.zeros((len(rows), 2 + self._max_chunk), np.int32)
        for out, row in zip(guesses, rows, strict=True):
            if row is not None and (guess := self._guesses.get(row.history_id)) is not None:
                index, tokens = guess
                out[:2] = index, len(tokens)
                out[2 : 2 + len(tokens)] = tokens
        return guesses

    def _learn(
        self, known: Known, before: np.ndarray, given: np.ndarray, num_scheduled: np.ndarray
    ) -> None:
        """Counts what became of proposals; what was guessed of others says nothing of a guess."""
        is_served = (known.history_ids >= 0) & (given > 0)
        tested = np.where(is_served, np.minimum(self._tested, num_scheduled), 0)
        accepted = np.minimum(np.maximum(given - 1, 0), tested)
        self.metrics.proposals_tested(int(tested.sum()), 0, int(accepted.sum()), 0)
        self.num_kept += int(accepted.sum())
