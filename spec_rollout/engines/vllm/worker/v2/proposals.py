"""Proposals from history on Model Runner V2, for requests that follow no draft of the table.

The drafter lives on the host, so a step with such requests waits once for the tokens that it gave.
Their noise is vLLM's: what is proposed is a guess of what vLLM's sampler is going to draw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch

from spec_rollout import ops
from spec_rollout.drafting import HistoryDrafter, MatchShares, NoiseLaw
from spec_rollout.engines.vllm.metrics import ReuseMetrics
from spec_rollout.engines.vllm.wire import ReuseRequest
from spec_rollout.engines.vllm.worker.engine_history import EngineHistory
from spec_rollout.engines.vllm.worker.engine_side import Arrival, EngineSide
from spec_rollout.engines.vllm.worker.groups import Known
from spec_rollout.engines.vllm.worker.history import HistoryProposals
from spec_rollout.engines.vllm.worker.live import LiveRequests
from spec_rollout.engines.vllm.worker.request_state import Row
from spec_rollout.engines.vllm.worker.step_times import StepTimes
from spec_rollout.engines.vllm.worker.v2.step import GivenTokens, StepState, filled, packed_tokens
from spec_rollout.types import History

NO_HISTORY = (
    "history: expected None with asynchronous scheduling on vLLM's Model Runner V2, got one; start "
    "the engine with async_scheduling=False"
)


class Proposals:
    """What is proposed from history, and to which requests.

    Args:
        num_slots: Most requests at a time.
        max_chunk: Most tokens proposed to a request in one step.
        token_budget: Most tokens of a step.
        noise: Of vLLM's draws.
        device: Of the model.
        metrics: Gives the worker's counters as they are now.

    Attributes:
        live: Requests that the engine serves by itself, or None where it does not.
        history: What is proposed from now, or None.
        num_kept: Tokens of proposals that were kept in this step.
    """

    def __init__(
        self,
        num_slots: int,
        *,
        max_chunk: int,
        token_budget: int,
        noise: NoiseLaw,
        device: torch.device,
        metrics: Callable[[], ReuseMetrics],
    ) -> None:
        self.live: LiveRequests | None = None
        self.history: HistoryProposals | None = None
        self.num_kept = 0
        self._metrics = metrics
        self._max_chunk = max_chunk
        self._token_budget = token_budget
        self._noise = noise
        self._device = device
        self._times = StepTimes(self)
        self._shares = MatchShares()
        self._standing: EngineHistory | None = None
        self._arrivals: dict[str, Arrival] = {}
        self._row_of: dict[str, Row | None] = {}
        self._drafts: dict[str, ReuseRequest] = {}
        self._rows: list[Row | None] = [None] * num_slots
        self._is_served = np.zeros(num_slots, bool)
        self._known = Known.of([])
        self._told = np.zeros(0, np.int64)  # response tokens of each request that the history has
        shape = num_slots, max_chunk + 1
        self._logprobs = torch.zeros(shape, dtype=torch.float32, device=device)

    @property
    def metrics(self) -> ReuseMetrics:
        """The worker's counters."""
        return self._metrics()

    @property
    def in_call(self) -> bool:
        """Whether a rollout call with a history of its own is in progress."""
        return self.history is not None and self.history is not self._standing

    def serve_by_itself(
        self, side: EngineSide, first_chunk: int, write_log: Callable[[str], None]
    ) -> None:
        """As `ChunkProposer.serve_by_itself`."""
        self._standing = EngineHistory(
            side.options.history_bytes,
            self._times.payoff,
            self._shares,
            max_proposal=self._max_chunk,
            token_budget=self._token_budget,
            noise=self._noise,
            tells_late=not side.has_peers,
        )
        side.recall = self._standing.recall
        self.live = LiveRequests(
            side,
            self._standing,
            first_chunk=first_chunk,
            metrics=self._metrics,
            write_log=write_log,
        )
        self.begin(0, None, [])

    def begin(self, num_requests: int, history: History | None, stop_token_ids: list[int]) -> None:
        """A rollout call begins, or is over; see `ChunkProposer.begin`."""
        if self.in_call or history is not None:  # each history has requests of its own
            self._row_of.clear()
            self._rows = [None] * len(self._rows)
            self._is_served.fill(False)
            self._told = np.zeros(0, np.int64)
        self.history = self._standing
        if history is not None:
            self.history = HistoryProposals(
                HistoryDrafter(history, stop_token_ids, self._shares, self._noise),
                history.request_groups.numel(),
                self._times.payoff,
                max_proposal=self._max_chunk,
                token_budget=self._token_budget,
            )
        self._times.begin(num_requests)

    def arrive(self, request_id: str, arrival: Arrival) -> None:
        """A request is about to take a slot."""
        self._arrivals[request_id] = arrival

    def seed_of(
        self, request_id: str, *, max_response_len: int, stop_token_ids: frozenset[int]
    ) -> int | None:
        """The seed that a request without a key is to be drawn with; None leaves it to vLLM, as it
        is where the request has a seed and no name.

        Where the engine serves it, its state is made, when it comes for the first time.
        """
        arrival = self._arrivals.pop(request_id, None)
        if arrival is None or self.live is None or self.in_call:
            return None
        if request_id not in self._row_of:
            row = self.live.serve(
                request_id,
                arrival,
                prompt_len=0 if arrival.prompt_ids is None else len(arrival.prompt_ids),
                max_response_len=max_response_len,
                stop_token_ids=stop_token_ids,
                masks=None,
            )
            self._enter(request_id, row)
            if row is not None and row.alive:
                # The key is the test's; that of `row` will be that of the draws.
                self._drafts[request_id] = ReuseRequest(
                    row.key, row.rule, row.draft, row.draft_logprobs
                )
        if arrival.params.seed is None:
            return self.live.noise_key(request_id)
        row = self._row_of[request_id]
        # A name goes first, as on V1: trainers give one seed to all samples of a prompt.
        is_named = arrival.name is not None and self.live.side.samples is not None
        return row.key if row is not None and is_named else None

    def announced(
        self,
        request_id: str,
        request: ReuseRequest,
        collect_id: int,
        *,
        prompt_len: int,
        max_response_len: int,
        stop_token_ids: frozenset[int],
        is_drawn: bool,
    ) -> bool:
        """A request with a key has come, of a rollout call if `collect_id` is not -1.

        Returns:
            Whether its draft is proposed here, as part of the history.
        """
        if not self.in_call or collect_id < 0 or request_id in self._row_of:
            row = self._row_of.get(request_id)
            return row is not None and row.follows
        assert self.history is not None
        row = Row(
            request,
            collect_id=collect_id,
            prompt_len=prompt_len,
            max_response_len=max_response_len,
            stop_token_ids=stop_token_ids,
            first_chunk=1,
            masks=None,
            history_id=collect_id if collect_id < self.history.num_requests else -1,
            is_drawn=is_drawn,
        )
        self._enter(request_id, row if row.history_id >= 0 else None)
        if row.follows:
            self.metrics.draft_added(row.draft_len)
            self.history.follow(row)
        return row.follows

    def draft_of(self, request_id: str) -> ReuseRequest | None:
        """The draft that a request served by the engine follows in chunks, if any."""
        return self._drafts.get(request_id)

    def take_slot(self, slot: int, request_id: str, *, seed: int, prompt_len: int) -> None:
        """A request has its slot, and vLLM the seed that it draws the request's tokens with."""
        row = self._rows[slot] = self._row_of.get(request_id)
        self._is_served[slot] = row is not None
        if row is not None:
            row.key = seed
            row.prompt_len = prompt_len
            # vLLM's noise is that of the position of the input.
            row.first_position = prompt_len - 1
        self._known = Known.of([])

    def leave(self, slot: int) -> None:
        """A request gave its slot back."""
        self._rows[slot] = None
        self._is_served[slot] = False

    def over(self, request_ids: Iterable[str]) -> None:
        """These requests are finished or aborted."""
        gone = [i for i in request_ids if i in self._row_of]
        for request_id in gone:
            del self._row_of[request_id]
            self._drafts.pop(request_id, None)
        if gone and self.live is not None:
            self.live.sweep(self._row_of.get)

    def settle(self) -> None:
        """From now all is known that steps so far gave."""

    def take_followed(self) -> dict[int, int]:
        """Collect id -> draft tokens kept, of a call's requests whose drafts were proposed here."""
        if not self.in_call:
            return {}
        assert self.history is not None
        found = self.history.followed()
        for row, kept, tested in found:
            self.metrics.draft_followed(kept, tested, row.draft_len)
        return {row.collect_id: kept for row, kept, _ in found}

    def is_served(self, slots: np.ndarray) -> bool:
        """Whether one of these requests is proposed to from history."""
        return bool(self._is_served[slots].any())

    def keep_logprobs(
        self, slots: torch.Tensor, columns: torch.Tensor, logits: torch.Tensor, drawn: torch.Tensor
    ) -> None:
        """Notes the log-probs of what rows of processed logits gave.

        Args:
            slots, columns: Of each row: its request's slot, and its place among the request's rows.
                [num_rows], int32.
            logits: [num_rows, vocab].
            drawn: [num_rows], int64.
        """
        self._logprobs[slots.long(), columns.long()] = ops.token_logprobs(logits, drawn)

    def propose(
        self, step: StepState, proposed: torch.Tensor, counts: torch.Tensor
    ) -> torch.Tensor:
        """Learns what a step gave, and adds proposals from history.

        Args:
            step: The step.
            proposed: Tokens of drafts. [num_reqs, max_chunk], int64.
            counts: How many, by slot; changed in place. [num_slots], int32.

        Returns:
            As `proposed`.
        """
        rows = [self._rows[slot] for slot in step.slots.tolist()]
        self._times.count(step.num_tokens, step.num_logits, rows)
        num_rows = num_tokens = 0
        if self.history is not None and any(row is not None for row in rows):
            packed = packed_tokens(step, counts, self._logprobs).cpu()  # waits for the step
            found = GivenTokens.unpacked(packed.numpy())
            drafts = self._ask(found, rows, step.num_scheduled)
            num_rows, num_tokens = int((found.given > 0).sum()), int(found.given.sum())
            proposed = filled(step, drafts, proposed, counts)
        self._times.end_step()
        if self.live is not None:
            self.live.end_step(num_rows, num_tokens)
        return proposed

    def _ask(
        self, found: GivenTokens, rows: list[Row | None], num_scheduled: np.ndarray
    ) -> list[list[int]]:
        """Learns what a step gave, and returns what each request is proposed behind that."""
        assert self.history is not None
        given, indices, own, tokens, logprobs = found
        before = indices - given
        known = self._known_of(rows, before)
        drafts = [[0] * n for n in own.tolist()]
        for row, got, n in zip(rows, given.tolist(), own.tolist(), strict=True):
            if row is not None and got and not n:  # rejected, or followed to its end
                row.alive = False
        known.needs_only_draws()
        self._learn(known, before, given, num_scheduled)
        # Of each request the tokens of this step, before which its prompt and all else lie.
        known.prompt_lens = -before
        drawn = None
        if known.all_in_history and bool((given == 1).all()):
            drawn = ops.SampleResult(
                torch.from_numpy(tokens[:, 0].copy()), torch.from_numpy(logprobs[:, 0].copy())
            )
        sampled = [row[:n] for row, n in zip(tokens.tolist(), given.tolist(), strict=True)]
        self.history.propose(known, sampled, drawn, logprobs, given, tokens, drafts)
        ids = known.history_ids
        self._told[ids[ids >= 0]] = indices[ids >= 0]
        return [[] if n else draft for n, draft in zip(own.tolist(), drafts, strict=True)]

    def _known_of(self, rows: list[Row | None], before: np.ndarray) -> Known:
        """What is fixed about the requests of a step.

        One whose tokens came in part another way is left alone from now on.
        """
        last = self._known.rows
        if len(last) != len(rows) or any(a is not b for a, b in zip(last, rows, strict=True)):
            self._known = Known.of(rows)
        ids = self._known.history_ids
        strays = (ids >= 0) & (self._told[ids] != before) if self._told.size else ids >= 0
        if strays.any():
            self._is_served[[r is not None and r.history_id in ids[strays] for r in self._rows]] = 0
            self._rows = [
                None if r is not None and r.history_id in ids[strays] else r for r in self._rows
            ]
            rows = [None if stray else row for row, stray in zip(rows, strays, strict=True)]
            self._known = Known.of(rows)
        return self._known

    def _enter(self, request_id: str, row: Row | None) -> None:
        self._row_of[request_id] = row
        if row is None:
            return
        assert self.history is not None
        if self._told.size < self.history.num_requests:
            more = self.history.num_requests - self._told.size
            self._told = np.pad(self._told, (0, more))
        self._told[row.history_id] = 0

    def _learn(
        self, known: Known, before: np.ndarray, given: np.ndarray, num_scheduled: np.ndarray
    ) -> None:
        """Tells history and counters what became of the last proposals."""
        assert self.history is not None
        ids = known.history_ids
        lens, own_lens = self.history.last_lens(ids, before)
        lens, own_lens = np.where(ids >= 0, lens, 0), np.where(ids >= 0, own_lens, 0)
        tested = np.where(given > 0, np.minimum(lens, num_scheduled), 0)
        if not tested.any():
            return
        accepted = np.minimum(np.maximum(given - 1, 0), tested)
        own = np.minimum(own_lens, tested)
        self.metrics.proposals_tested(
            int(tested.sum()),
            int(own.sum()),
            int(accepted.sum()),
            int(np.minimum(accepted, own).sum()),
        )
        self.num_kept += int(accepted.sum())
        # Where all passed that was scheduled, nothing is known of the rest.
        is_known = (tested > 0) & ((tested == lens) | (accepted < tested))
        self.history.tested(ids[is_known], accepted[is_known])
