"""Sampling of one engine step: drafts verified and tokens drawn from the logits vLLM hands over.

vLLM has computed, for request r, logits after its last token and after each of the n_r draft tokens
scheduled for it: n_r + 1 rows. Row i predicts response token j_r + i. Every row is tested against
the draft token of its position where there is one: also the row at the end of a prompt's prefill
(n_r = 0), and the last row of a chunk (vLLM's "bonus"), so that an accepted draft never loses a
step at a chunk border.

What was proposed from history instead of a draft is tested for being what sampling gives, under
every rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from spec_rollout import ops
from spec_rollout.acceptance import AcceptanceRule, Coupled
from spec_rollout.drafting import MatchShares, Payoff, StepCost
from spec_rollout.engines.vllm.metrics import ReuseMetrics
from spec_rollout.engines.vllm.worker.collect import Collector
from spec_rollout.engines.vllm.worker.groups import Group, Known, Segment
from spec_rollout.engines.vllm.worker.history import HistoryProposals
from spec_rollout.engines.vllm.worker.logprobs import SampledLogprobs
from spec_rollout.engines.vllm.worker.request_state import Row
from spec_rollout.engines.vllm.worker.verify import verify_group
from spec_rollout.packed import ranges

# (request, first logits row, its tokens, their log-probs) of the requests served in one step
_Runs = list[tuple[int, int, np.ndarray, np.ndarray]]

_SAMPLED = Coupled()  # passes what keyed sampling gives at that position
# With fewer of the requests than this share running, a rollout call is in its tail.
_TAIL_SHARE = 0.1


@dataclass(slots=True)
class Step:
    """What the sampler needs of one step of the model runner.

    Attributes:
        rows: Per request of the batch, in its order: our state of it, or None for a request without
            a key.
        lens: Tokens of prompt and response so far. [batch], int64 (numpy).
        scheduled: Draft tokens vLLM scheduled, per request (its own inventions included).
        discard: Whether vLLM throws the sample away (prefill not finished). [batch], bool (numpy).
        logits: [sum(len(scheduled) + 1), vocab].
        temperature, top_k, top_p: As the ops take them: a number, or [batch] on the logits' device.
        sample_stock: Logits [batch, vocab] -> vLLM's own sampler output for them.
        logprobs: What vLLM wants returned, or None.
    """

    rows: list[Row | None]
    lens: np.ndarray
    scheduled: list[list[int]] | None
    discard: np.ndarray
    logits: torch.Tensor
    temperature: float | torch.Tensor
    top_k: int | torch.Tensor
    top_p: float | torch.Tensor
    sample_stock: Callable[[torch.Tensor], Any]
    logprobs: SampledLogprobs | None


class ReuseSampler:
    """Draws the tokens of every request that has a noise key; leaves the others to vLLM's
    sampler."""

    def __init__(self, max_chunk: int) -> None:
        self.max_chunk = max_chunk
        self.num_requests = 0  # of the rollout call, where known
        self.history: HistoryProposals | None = None
        self.cost = StepCost()  # this and the next two live as long as the engine
        self.payoff = Payoff()
        self.match_shares = MatchShares()
        self._num_kept = 0  # tokens of proposals kept in this step
        # Of the tokens given out in this step, where the host knows them. [batch, most tokens],
        # float32.
        self.given_logprobs: np.ndarray | None = None
        self._is_decode = False
        self._step_end: float | None = None
        self._step_work: tuple[int, int] | None = None
        self._in_tail = False
        self.metrics = ReuseMetrics()
        self.collector = Collector()
        self.known = Known.of([])  # of the last step, for the proposer

    def __call__(self, step: Step) -> tuple[torch.Tensor, Any]:
        """Samples one step.

        Returns:
            Token ids [batch, most tokens], int32, -1 where a request got fewer; and vLLM's
            LogprobsTensors or None.
        """
        self.given_logprobs = None
        # The list is the same object as long as the batch is the same.
        if self.known.rows is not step.rows:
            self.known = Known.of(step.rows)
        if self._is_plain(step, self.known):
            if step.scheduled is None:
                return self._draw_plain(step, self.known)
            if self.history is not None:
                indices = step.lens - self.known.prompt_lens
                proposed = self.history.scheduled(self.known, indices, step.scheduled)
                if proposed is not None:
                    return self._verify_proposals(step, self.history, indices, *proposed)
        return self._verify(step, self.known)

    def begin(self, num_requests: int, history: HistoryProposals | None) -> None:
        """A rollout call of so many requests begins; what was left of an earlier one is
        forgotten."""
        self.metrics = ReuseMetrics()
        self.collector = Collector()
        self.num_requests = num_requests
        self.history = history
        if history is not None:
            self.cost.begin()
        self._step_end = None

    def take(self) -> tuple[bytes, ...]:
        """What was recorded of the finished requests (`Collector.take`)."""
        if self.history is not None:
            for row, followed, tested in self.history.followed():
                self.metrics.draft_followed(followed, tested, row.draft_len)
                if followed and row.collect_id >= 0:
                    self.collector.reused(row.collect_id, followed)
        return self.collector.take()

    def end(self) -> ReuseMetrics:
        """The call is over; its counters."""
        metrics = self.metrics
        self.begin(0, None)
        return metrics

    def count(self, num_tokens: int, num_logits: int, rows: list[Row | None]) -> None:
        """A step in which the model computed `num_tokens` tokens, and logits after `num_logits` of
        them."""
        num_requests = len(rows)
        is_decode = num_tokens == num_logits and (
            num_tokens == num_requests or not any(row is not None and row.alive for row in rows)
        )
        metrics = self.metrics
        metrics.num_engine_steps += 1
        metrics.num_computed_tokens += num_tokens
        metrics.num_decode_steps += is_decode
        # Prefill is another kind of work: from its steps nothing is learnt about decoding.
        is_learnt = num_tokens == num_logits
        self._step_work = (num_requests, num_tokens - num_requests) if is_learnt else None
        self._is_decode = is_decode
        self._in_tail = is_decode and num_requests < _TAIL_SHARE * self.num_requests
        metrics.num_tail_steps += self._in_tail

    def end_step(self, now: float) -> None:
        """The step's tokens are sampled and the next one's proposals made; `now` in seconds.

        A step takes from the end of the one before to its own, scheduling and all.
        """
        if self._step_end is not None:
            seconds = now - self._step_end
            if self._in_tail:
                self.metrics.tail_seconds += seconds
            if self.history is not None and self._step_work is not None:
                rows, extra = self._step_work
                gained = self._num_kept if self._is_decode else None
                self.cost.observe(rows, extra, seconds, gained)
                if gained is not None:
                    self.payoff.observe(rows, extra > 0, rows + gained, seconds)
        self._num_kept = 0
        self._step_end = now

    # -- Nothing to verify: one call, no copies, keys stay on the device while the batch is the
    # same.

    def _is_plain(self, step: Step, known: Known) -> bool:
        if not known.is_plain:  # if it ever was, it still is: drafts do not come back to life
            known.is_plain = not any(
                row is None or row.alive or row.masks is not None for row in step.rows
            )
        return known.is_plain and not step.discard.any()

    def _draw_plain(self, step: Step, known: Known) -> tuple[torch.Tensor, Any]:
        indices = step.lens - known.prompt_lens
        positions = torch.from_numpy(indices + known.first_positions)
        result = ops.sample_tokens(
            step.logits,
            keys=known.keys_on(step.logits.device),
            positions=positions.to(step.logits.device, non_blocking=True),
            temperature=step.temperature,
            top_k=step.top_k,
            top_p=step.top_p,
        )
        if known.any_collected:
            self.collector.add(known.collect_ids, indices.astype(np.int32), result.logprobs)
        if self.history is not None and not result.logprobs.is_cuda:  # elsewhere: not worth a wait
            self.given_logprobs = result.logprobs.numpy()[:, None]
        tokens = result.token_ids[:, None]
        if step.logprobs is None:
            return tokens, None
        every = torch.arange(len(step.rows), device=tokens.device)
        return tokens, step.logprobs.gather(
            step.logits, every, every, result.token_ids, result.logprobs
        )

    # -- Nothing but the drafter's proposals, just as it made them.

    def _verify_proposals(
        self,
        step: Step,
        history: HistoryProposals,
        indices: np.ndarray,
        proposed: np.ndarray,
        lens: np.ndarray,
        own_lens: np.ndarray,
    ) -> tuple[torch.Tensor, Any]:
        group = Group.of_proposals(lens, indices, self.known)
        tokens = np.full((lens.size, int(lens.max()) + 1), -1, np.int32)
        self.given_logprobs = np.full(tokens.shape, np.nan, np.float32)
        if step.logprobs is not None:
            step.logprobs.keep_raw(step.logits, False)
        sampling = (step.temperature, step.top_k, step.top_p)
        accepted, drawn, logprobs = verify_group(
            _SAMPLED, group, step.logits, sampling, proposed, None
        )
        accepted = accepted.astype(np.int64)
        emitted: _Runs = []
        self._record(step, group, proposed, accepted, drawn, logprobs, tokens, emitted)
        self._num_kept += int(accepted.sum())
        self.metrics.proposals_tested(
            int(lens.sum()),
            int(own_lens.sum()),
            int(accepted.sum()),
            int(np.minimum(accepted, own_lens).sum()),
        )
        tested = lens > 0
        history.tested(self.known.history_ids[tested], accepted[tested])
        output = torch.from_numpy(tokens)
        if step.logprobs is None:
            return output, None
        return output, step.logprobs.scatter(step.logits, tokens.shape, emitted, [], None)

    # -- The general step.

    def _verify(self, step: Step, known: Known) -> tuple[torch.Tensor, Any]:
        batch = len(step.rows)
        counts = [1] * batch if step.scheduled is None else [len(s) + 1 for s in step.scheduled]
        first_rows = np.zeros(batch + 1, np.int64)
        np.cumsum(counts, out=first_rows[1:])
        tokens = np.full((batch, max(counts)), -1, np.int32)
        if self.history is not None:
            self.given_logprobs = np.full(tokens.shape, np.nan, np.float32)
        emitted: _Runs = []
        logprobs = step.logprobs

        stock = [r for r, row in enumerate(step.rows) if row is None]
        stock_output = None
        if stock:
            # Whatever drafts vLLM made up for them, their next token is sampled from the first row.
            self.metrics.num_placeholder_tokens += sum(counts[r] - 1 for r in stock)
            rows_of = torch.from_numpy(first_rows[:-1]).to(step.logits.device)
            stock_output = step.sample_stock(step.logits[rows_of])
            tokens[stock, 0] = stock_output.sampled_token_ids[:, 0].cpu().numpy()[stock]
        if logprobs is not None:
            logprobs.keep_raw(step.logits, any(row is not None and row.masks for row in step.rows))

        if len(stock) < batch:
            groups, plain = self._segments(step, first_rows)
            default = next(iter(groups), _SAMPLED)
            for rule in groups or [default]:
                group = Group.of(
                    groups.get(rule, []),
                    plain if rule is default else [],
                    step.lens,
                    known,
                    first_rows,
                )
                self._verify_group(
                    step, rule, group, len(groups) <= 1 and not stock, tokens, emitted
                )

        output = torch.from_numpy(tokens)
        if logprobs is None:
            return output, None
        return output, logprobs.scatter(step.logits, tokens.shape, emitted, stock, stock_output)

    def _segments(
        self, step: Step, first_rows: np.ndarray
    ) -> tuple[dict[AcceptanceRule, list[Segment]], list[int]]:
        """Logits rows by acceptance rule, in order; and the requests that have nothing tested, one
        row each.

        Together they own every row of the keyed requests.
        """
        order: list[
            tuple[AcceptanceRule | None, Segment]
        ] = []  # None: nothing to test, any rule will do
        plain: list[int] = []
        scheduled_all = step.scheduled
        discard = step.discard.tolist()
        for r, row in enumerate(step.rows):
            if row is None:
                continue
            scheduled = [] if scheduled_all is None else scheduled_all[r]
            if not (scheduled or row.alive or discard[r]):
                plain.append(r)
                if row.masks is not None:
                    first = int(first_rows[r])
                    position = int(step.lens[r]) - row.prompt_len + row.first_position
                    row.masks.apply(step.logits[first : first + 1], position)
                continue
            first, count = int(first_rows[r]), len(scheduled) + 1
            if discard[r]:
                order.append((None, Segment(r, first, 1)))
                used = 1
            else:
                index = int(step.lens[r]) - row.prompt_len
                segment = self._segment(r, row, first, index, scheduled)
                used = segment.num_rows
                rule = row.rule if segment.is_draft else _SAMPLED
                order.append((rule if segment.num_tested else None, segment))
                if row.masks is not None:
                    row.masks.apply(step.logits[first : first + used], index + row.first_position)
            if used < count:  # rows computed for draft tokens that vLLM made up
                order.append((None, Segment(r, first + used, count - used)))
        default = next((rule for rule, _ in order if rule is not None), _SAMPLED)
        groups: dict[AcceptanceRule, list[Segment]] = {}
        for rule, segment in order:
            groups.setdefault(default if rule is None else rule, []).append(segment)
        if default in groups:  # first, for it is the one that plain requests join
            groups = {default: groups.pop(default), **groups}
        return groups, plain

    def _segment(
        self, request: int, row: Row, first_row: int, index: int, scheduled: list[int]
    ) -> Segment:
        """What is to be tested of one request, with draft tokens `scheduled` for response tokens
        from `index` on."""
        metrics = self.metrics
        if row.alive:
            num_real = row.num_scheduled(index, scheduled) if scheduled else 0
            metrics.num_verified_tokens += num_real
            metrics.num_placeholder_tokens += len(scheduled) - num_real
            num_tested = min(num_real + 1, row.draft_len - index)
            num_rows = max(num_tested, min(num_real, num_tested) + 1)
            tokens = row.draft[index : index + num_tested]
            return Segment(request, first_row, num_rows, index, tokens, num_real, row)
        num_proposed, num_own = -1, 0
        tokens = np.empty(0, np.int32)
        if self.history is not None and scheduled:
            tokens, num_proposed, num_own = self.history.scheduled_one(row, index, scheduled)
        n = tokens.size
        metrics.num_placeholder_tokens += len(scheduled) - n
        return Segment(
            request,
            first_row,
            n + 1,
            index,
            tokens,
            n,
            row,
            is_draft=False,
            learn=num_proposed >= 0,
            num_own=num_own,
            is_whole=n == num_proposed,
        )

    def _verify_group(
        self,
        step: Step,
        rule: AcceptanceRule,
        group: Group,
        owns_all: bool,
        tokens: np.ndarray,
        emitted: _Runs,
    ) -> None:
        device = step.logits.device
        logits = step.logits
        if not owns_all:
            group = group.read_only()
            if not group.requests.size:
                return
            wanted = np.repeat(group.first_rows, group.num_rows) + ranges(group.num_rows)
            logits = logits[torch.from_numpy(wanted).to(device)]
        requests = group.requests
        if requests.size == len(step.rows) and bool((requests[1:] > requests[:-1]).all()):
            sampling = (step.temperature, step.top_k, step.top_p)
        else:
            where = torch.from_numpy(requests).to(device)
            sampling = tuple(
                value[where] if isinstance(value, torch.Tensor) else value
                for value in (step.temperature, step.top_k, step.top_p)
            )
        draft_ids, draft_logprobs = group.drafts(rule.needs_draft_logprobs)
        accepted, drawn, logprobs = verify_group(
            rule, group, logits, sampling, draft_ids, draft_logprobs
        )
        self._record(
            step, group, draft_ids, accepted.astype(np.int64), drawn, logprobs, tokens, emitted
        )
        for i, segment in zip(group.places, group.segments, strict=True):
            if segment.row is not None:
                self._settle(segment, segment.row, int(accepted[i]), int(drawn[i]))

    def _record(
        self,
        step: Step,
        group: Group,
        draft_ids: np.ndarray,
        accepted: np.ndarray,
        drawn: np.ndarray,
        logprobs: np.ndarray,
        tokens: np.ndarray,
        emitted: _Runs,
    ) -> None:
        """Writes down what the requests were given: `tokens` [batch, width], and their log-probs
        where those are wanted."""
        was_drawn = (drawn >= 0) & group.is_read
        accepted = np.where(group.is_read, accepted, 0)
        from_draft = np.flatnonzero(accepted)
        if from_draft.size:
            counts = accepted[from_draft]
            columns = ranges(counts)
            sources = np.repeat(group.first_tokens[from_draft], counts) + columns
            tokens[np.repeat(group.requests[from_draft], counts), columns] = draft_ids[sources]
        tokens[group.requests[was_drawn], accepted[was_drawn]] = drawn[was_drawn]
        kept = accepted + was_drawn
        firsts = np.cumsum(group.num_rows) - group.num_rows  # of the rows in `logprobs`
        if group.any_collected:
            collected = np.where(group.collect_ids >= 0, kept, 0)
            offsets = ranges(collected)
            self.collector.add(
                np.repeat(group.collect_ids, collected),
                (np.repeat(group.indices, collected) + offsets).astype(np.int32),
                torch.from_numpy(logprobs[np.repeat(firsts, collected) + offsets]),
            )
        if self.given_logprobs is not None:
            offsets = ranges(kept)
            self.given_logprobs[np.repeat(group.requests, kept), offsets] = logprobs[
                np.repeat(firsts, kept) + offsets
            ]
        if step.logprobs is not None:
            for i in np.flatnonzero(group.is_read).tolist():
                request, n, first = int(group.requests[i]), int(kept[i]), int(firsts[i])
                row = int(group.first_rows[i])
                emitted.append((request, row, tokens[request, :n], logprobs[first : first + n]))

    def _settle(self, segment: Segment, row: Row, accepted: int, token: int) -> None:
        """Books the outcome of one request that something was tested for."""
        index = segment.index
        if not segment.is_draft:
            self._num_kept += accepted
            own = segment.num_own
            self.metrics.proposals_tested(segment.num_tested, own, accepted, min(accepted, own))
            # Where all passed that was scheduled, nothing is known of the rest.
            is_known = segment.is_whole or accepted < segment.num_tested
            if segment.learn and is_known and self.history is not None:
                self.history.tested(np.array([row.history_id]), np.array([accepted]))
        elif segment.num_tested:
            self.metrics.chunk_tested(index, segment.num_tested, accepted, segment.num_proposed)
            if accepted < segment.num_tested:
                row.alive = False
            elif index + accepted >= row.draft_len:
                row.alive = False
                self.metrics.num_fully_reused += 1
                self.metrics.num_verified_tokens += token < 0 and not row.ends
            else:
                # The last accepted token is the next step's input.
                self.metrics.num_verified_tokens += 1
            if row.alive and segment.num_proposed >= row.chunk:
                row.chunk = min(2 * row.chunk, self.max_chunk)
            if accepted and row.collect_id >= 0:
                self.collector.reused(row.collect_id, accepted)
