"""Drafts of the requests that a worker of Model Runner V2 holds, on the device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch

from spec_rollout.acceptance import AcceptanceRule, Coupled, OneHot
from spec_rollout.engines.vllm.metrics import ReuseMetrics
from spec_rollout.engines.vllm.wire import ReuseRequest
from spec_rollout.engines.vllm.worker.request_state import usable_draft
from spec_rollout.engines.vllm.worker.transfer import to_device
from spec_rollout.engines.vllm.worker.v2.proposals import NO_HISTORY, Proposals
from spec_rollout.types import History

# Requests that are gone are counted when the counters are asked for, or when they are so many.
_MOST_UNCOUNTED = 4096


class Field(IntEnum):
    """Columns of `DraftTable.numbers`; `kernels` has them as well."""

    LEN = 0  # draft tokens
    LIMIT = 1  # of these, worth proposing: a token that ends the response needs no KV cache
    CHUNK = 2  # most to propose in the next step
    # Response tokens, from the first on, that are the draft's and passed. At least as many as the
    # response has: the draft is still followed.
    ACCEPTED = 3
    TESTED = 4
    VERIFIED = 5  # draft tokens that went through the model, wasted ones included
    WASTED = 6
    KEY = 7  # of the noise of `Lenient`'s test
    FIRST_POSITION = 8
    RULE = 9  # that decides beside vLLM's draws: its number (`DraftTable.rules`); 0 for none


# What a preempted request has when it comes back.
_COUNTED = (Field.ACCEPTED, Field.TESTED, Field.VERIFIED, Field.WASTED)
_KEPT = (Field.CHUNK, *_COUNTED)


@dataclass(slots=True)
class Held:
    """What the host knows of a request with a key.

    Attributes:
        request_id: vLLM's.
        collect_id: As in `ReuseRequest`, if its rollout call announced it, or -1.
        rule: The acceptance rule, None where vLLM's draws alone decide.
        draft_len: Draft tokens.
        seen: Its tokens of each of `_COUNTED` that are in the counters already.
    """

    request_id: str
    collect_id: int
    rule: AcceptanceRule | None
    draft_len: int
    seen: tuple[int, ...] = (0, 0, 0, 0)


def deciding_rule(rule: AcceptanceRule) -> AcceptanceRule | None:
    """The rule, or None where vLLM's draw alone decides about a draft token.

    So it is under `Coupled`, and under `OneHot`: a draw gives the draft's token y with probability
    p(y), and where it gives another, that one is distributed as p without y.
    """
    return None if isinstance(rule, OneHot) or rule == Coupled() else rule


class DraftTable:
    """Drafts, and how far they were followed, by slot of vLLM's request state.

    What changes is gathered on the host and sent by `apply`, in the order of the device's stream:
    a slot may be given away while kernels of an earlier step have yet to run.

    Args:
        num_slots: Most requests at a time.
        max_model_len: Most tokens of a request.
        first_chunk, max_chunk: In tokens; chunks start at the first and double with every chunk
            accepted whole.
        device: Of the model.

    Attributes:
        tokens: Drafts. [num_slots, max_model_len], int32.
        logprobs: Of their tokens, from when a rule first needed them. [num_slots, max_model_len],
            float32.
        numbers: See `Field`. [num_slots, fields], int64.
        counts: Draft tokens proposed last. [num_slots], int32.
        proposals: What is proposed from history; None where nothing is.
        is_warming_up: Requests are vLLM's own, made to compile kernels: they are not served, and
            nothing of them is counted.
    """

    def __init__(
        self,
        num_slots: int,
        max_model_len: int,
        *,
        first_chunk: int,
        max_chunk: int,
        device: torch.device,
    ) -> None:
        self.device = device
        self.first_chunk = min(first_chunk, max_chunk)
        self.max_chunk = max_chunk
        self.max_model_len = max_model_len
        self.tokens = torch.zeros(num_slots, max_model_len, dtype=torch.int32, device=device)
        self.logprobs: torch.Tensor | None = None
        self.numbers = torch.zeros(num_slots, len(Field), dtype=torch.int64, device=device)
        self.counts = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self._held: list[Held | None] = [None] * num_slots
        self._has_draft = np.zeros(num_slots, bool)
        self._rule_of = np.zeros(num_slots, np.int64)
        self._rules: dict[AcceptanceRule, int] = {}
        self._kept = torch.tensor(_KEPT, device=device)
        self._staged: dict[int, np.ndarray] = {}
        self._returned: dict[int, torch.Tensor] = {}
        self._left: dict[str, tuple[Held, torch.Tensor]] = {}
        self._gone: list[tuple[Held, torch.Tensor]] = []
        self._accepted: dict[int, int] = {}
        self.metrics = ReuseMetrics()
        self.proposals: Proposals | None = None
        self.is_warming_up = False
        self._forget(0)

    def begin(
        self, num_requests: int, history: History | None, stop_token_ids: list[int], keyed: bool
    ) -> None:
        """A rollout call begins; see `ChunkProposer.begin`.

        Raises:
            ValueError: if it has a history, and nothing is proposed from any.
        """
        if self.proposals is not None:
            self.proposals.begin(num_requests, history, stop_token_ids)
        elif history is not None:
            raise ValueError(NO_HISTORY)
        self._forget(num_requests)

    def add(
        self,
        slot: int,
        request_id: str,
        request: ReuseRequest | None,
        *,
        prompt_len: int = 0,
        max_response_len: int = 0,
        stop_token_ids: frozenset[int] = frozenset(),
        is_drawn: bool = True,
    ) -> None:
        """A request took a slot, for the first time or after it was preempted.

        Args:
            slot: Its slot.
            request_id: vLLM's.
            request: None if it has no key.
            prompt_len: Tokens of its prompt.
            max_response_len: Most tokens of its response.
            stop_token_ids: That end it.
            is_drawn: Its tokens are not taken greedily.
        """
        numbers = np.zeros(len(Field), np.int64)
        self._staged[slot] = numbers
        self._put(slot, None)
        is_counted = False
        if request is None and self.proposals is not None:
            request = self.proposals.draft_of(request_id)
            is_counted = request is not None
        if request is None:
            return
        draft, ends = usable_draft(request.draft_ids, max_response_len, stop_token_ids)
        if not request.rule.uses_drafts:
            draft, ends = draft[:0], False
        is_new = request_id not in self._left
        if not is_new:
            held, self._returned[slot] = self._left.pop(request_id)
        else:
            rule = deciding_rule(request.rule) if draft.size else None
            held = Held(request_id, self._claim(request.collect_id), rule, draft.size)
        if self.proposals is not None and self.proposals.announced(
            request_id,
            request,
            held.collect_id,
            prompt_len=prompt_len,
            max_response_len=max_response_len,
            stop_token_ids=stop_token_ids,
            is_drawn=is_drawn,
        ):
            draft, ends = draft[:0], False
            held.draft_len, held.rule = 0, None
        if draft.size and is_new and not is_counted:
            self.metrics.draft_added(draft.size)
        self._put(slot, held)
        numbers[Field.LEN] = draft.size
        numbers[Field.LIMIT] = draft.size - int(ends and draft.size > 0)
        numbers[Field.CHUNK] = self.first_chunk
        numbers[Field.KEY] = request.key
        numbers[Field.FIRST_POSITION] = request.first_position
        numbers[Field.RULE] = self._rule_of[slot]
        self._write(self.tokens, slot, draft)
        if held.rule is not None and held.rule.needs_draft_logprobs:
            assert request.draft_logprobs is not None
            if self.logprobs is None:
                self.logprobs = torch.zeros_like(self.tokens, dtype=torch.float32)
            self._write(self.logprobs, slot, request.draft_logprobs[: draft.size])

    def apply(self) -> None:
        """Sends what was added since the last call."""
        if not self._staged:
            return
        slots = to_device(np.array(list(self._staged), np.int64), self.device)
        rows = to_device(np.stack(list(self._staged.values())), self.device)
        self.numbers.index_copy_(0, slots, rows)
        for slot, numbers in self._returned.items():
            self.numbers[slot, self._kept] = numbers[self._kept]
        self._staged.clear()
        self._returned.clear()

    def leave(self, slot: int) -> None:
        """A request gave its slot back. If it is not told to be over, it was preempted."""
        held = self._held[slot]
        if held is not None:
            self._left[held.request_id] = (held, self.numbers[slot].clone())
        if self.proposals is not None:
            self.proposals.leave(slot)
        self._put(slot, None)

    def over(self, request_ids: Iterable[str]) -> None:
        """These requests, which gave their slots back, are finished or aborted."""
        request_ids = list(request_ids)
        if self.proposals is not None:
            self.proposals.over(request_ids)
        for request_id in request_ids:
            if (left := self._left.pop(request_id, None)) is not None:
                self._gone.append(left)
        if len(self._gone) > _MOST_UNCOUNTED:
            self._count()

    def step(self, num_tokens: int) -> None:
        """A step computed so many tokens (`Proposals.propose` counts its steps itself)."""
        self.metrics.num_engine_steps += 1
        self.metrics.num_computed_tokens += num_tokens

    def end(self) -> ReuseMetrics:
        """The call is over; its counters."""
        metrics = self.take_metrics(False)
        if self.proposals is not None:
            self.proposals.begin(0, None, [])
        self._forget(0)
        return metrics

    def take_metrics(self, reset: bool) -> ReuseMetrics:
        """Counters as they are now, optionally starting them anew; waits for the device."""
        self._count()
        metrics = self.metrics
        if reset:
            self.metrics = ReuseMetrics()
        return metrics

    def take(self) -> tuple[bytes, ...]:
        """As `Collector.take`, without log-probs: vLLM's own outputs have them."""
        self._count()
        accepted, self._accepted = self._accepted, {}
        if self.proposals is not None:
            accepted |= self.proposals.take_followed()
        nothing = (b"", b"", b"")
        return (
            *nothing,
            np.array(list(accepted), "<i4").tobytes(),
            np.array(list(accepted.values()), "<i4").tobytes(),
        )

    def any_draft(self, slots: np.ndarray) -> bool:
        """Whether one of these requests has a draft."""
        return bool(self._has_draft[slots].any())

    def rules(self, slots: np.ndarray) -> dict[AcceptanceRule, int]:
        """The rules that decide beside vLLM's draws for these requests, and their numbers."""
        found = set(self._rule_of[slots].tolist())
        return {rule: n for rule, n in self._rules.items() if n in found} if found - {0} else {}

    def _forget(self, num_requests: int) -> None:
        self.metrics = ReuseMetrics()
        self._gone.clear()
        self._accepted = {}
        self._unclaimed = set(range(num_requests))
        for held in [*self._held, *(held for held, _ in self._left.values())]:
            if held is not None:  # of an earlier call
                held.collect_id = -1
        # A schedule has another rule in every call.
        used = set(self._rule_of.tolist())
        self._rules = {rule: n for rule, n in self._rules.items() if n in used}

    def _put(self, slot: int, held: Held | None) -> None:
        self._held[slot] = held
        self._has_draft[slot] = held is not None and held.draft_len > 0
        rule = None if held is None else held.rule
        self._rule_of[slot] = (
            0
            if rule is None
            else self._rules.setdefault(rule, max(self._rules.values(), default=0) + 1)
        )

    def _claim(self, collect_id: int) -> int:
        """As `Record.claim`."""
        if collect_id in self._unclaimed:
            self._unclaimed.remove(collect_id)
            return collect_id
        self.metrics.num_unknown_ids += collect_id >= 0
        return -1

    def _count(self) -> None:
        """Counts what requests have come to, also those that vLLM has not said to be over."""
        # It says so with the next step, and after the last request of a call there is none.
        held = [(h, self.numbers[slot]) for slot, h in enumerate(self._held) if h is not None]
        pending = [*self._gone, *self._left.values(), *held]
        self._gone.clear()
        pending = [(h, numbers) for h, numbers in pending if h.draft_len]
        if not pending:
            return
        numbers = torch.stack([numbers for _, numbers in pending]).cpu().numpy()
        for (request, _), row in zip(pending, numbers[:, _COUNTED].tolist(), strict=True):
            self.metrics.draft_progress(request.draft_len, request.seen, tuple(row))
            request.seen = tuple(row)
            if request.collect_id >= 0:
                self._accepted[request.collect_id] = row[0]

    def _write(self, rows: torch.Tensor, slot: int, values: np.ndarray) -> None:
        if values.size:
            # Of a request's bytes, which torch would warn of: they cannot be written.
            rows[slot, : values.size] = to_device(values.copy(), self.device)
