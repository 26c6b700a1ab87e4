"""Decoding: a step gives every slot in use one token, or more where proposals pass.

The slots in use are always the first ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from spec_rollout import ops
from spec_rollout.acceptance import Coupled
from spec_rollout.drafting import HistoryDrafter, Payoff
from spec_rollout.engines.transformers.forward import ModelForward
from spec_rollout.engines.transformers.requests import Plan
from spec_rollout.engines.transformers.results import Results
from spec_rollout.engines.transformers.slot_cache import SlotCache, copy_rows
from spec_rollout.engines.transformers.verify import Verified
from spec_rollout.packed import ranges
from spec_rollout.types import RolloutStats, SamplingParams

# Rows of the state on the device: the token to feed, its position in the sequence, the response
# position of the token to draw, the response's limit, the noise key.
_TOKEN, _KV_POSITION, _POSITION, _ROOM, _KEY = range(5)

# More than this is never proposed at once: what is rejected was computed for nothing.
_MAX_PROPOSAL = 32
# With fewer of the requests than this share running, a rollout call is in its tail.
_TAIL_SHARE = 0.1


class Decoder:
    """A fixed number of slots, each holding a response being generated.

    When responses end, the last slots in use move into theirs: the batch is never wider than the
    number of live responses.

    Args:
        forward: The model.
        plan: All requests.
        sampling: As given to the engine.
        results: Where finished responses go.
        num_slots: Responses generated at a time.
        max_tokens: Most tokens of one step with proposals.
        stats: Counts are added here.
        drafter: Proposes tokens, which are tested against what sampling gives; None decodes
            plainly.
        payoff: Decides with the drafter how much to propose, and whether to propose at all; sees
            what steps take and give.
        clock: Seconds; what a step takes is the difference of two readings.
    """

    def __init__(
        self,
        forward: ModelForward,
        plan: Plan,
        sampling: SamplingParams,
        results: Results,
        *,
        num_slots: int,
        max_tokens: int,
        stats: RolloutStats,
        drafter: HistoryDrafter | None = None,
        payoff: Payoff | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._drafter = drafter
        self._payoff = Payoff() if payoff is None else payoff
        self._clock = clock
        self._max_tokens = max_tokens
        self._forward = forward
        self._plan = plan
        self._sampling = sampling
        self._results = results
        self._stats = stats
        self.num_slots = num_slots
        device = forward.device
        longest = int((plan.prompt_lens + plan.rooms).max())
        if drafter is not None and not forward.batch_invariant:
            longest += _MAX_PROPOSAL  # the padding of rows without proposals
        self.cache = forward.kept_cache("slots", num_slots, longest)
        self._requests: list[int] = []
        self._first_positions: list[int] = []
        self._kv_lens: list[int] = []  # of each slot in use, the token to feed not yet counted
        self._first_steps: list[int] = []  # the step at which each slot's request came
        self._num_steps = 0
        self._state = torch.zeros(5, num_slots, dtype=torch.int64, device=device)
        width = int(plan.rooms.max())
        self._token_ids = torch.zeros(num_slots, width, dtype=torch.int32, device=device)
        self._logprobs = torch.zeros(num_slots, width, dtype=torch.float32, device=device)
        self._rows = torch.arange(num_slots, device=device)
        self._stop = torch.tensor(sampling.stop_token_ids, dtype=torch.int64, device=device)

    @property
    def num_live(self) -> int:
        """Responses being generated."""
        return len(self._requests)

    @property
    def num_free(self) -> int:
        """Slots not in use."""
        return self.num_slots - self.num_live

    def add(self, verified: list[Verified], lanes: SlotCache) -> None:
        """Takes over requests: the KV of prompt and accepted tokens, and the token after them.

        Args:
            verified: All with a `next_token_id`.
            lanes: Where their KV is.
        """
        if not verified:
            return
        first = self.num_live
        slots = list(range(first, first + len(verified)))
        state = np.empty((5, len(verified)), dtype=np.int64)
        for column, item in enumerate(verified):
            kv_len = int(self._plan.prompt_lens[item.request]) + item.accepted_len
            position = item.accepted_len + 1
            self._requests.append(item.request)
            self._first_positions.append(position)
            self._kv_lens.append(kv_len)
            self._first_steps.append(self._num_steps)
            assert item.next_token_id is not None
            room, key = self._plan.rooms[item.request], self._plan.keys[item.request]
            state[:, column] = item.next_token_id, kv_len, position, room, key
        self._state[:, first : first + len(verified)] = torch.from_numpy(state).to(
            self._state.device
        )
        copy_rows(lanes, self.cache, [item.lane for item in verified], slots, self._kv_lens[first:])
        if self._drafter is not None:
            pieces: list[np.ndarray] = []
            for item in verified:
                pieces.append(self._plan.draft_ids(item.request)[: item.accepted_len])
                pieces.append(np.array([item.next_token_id], dtype=np.int64))
            self._drafter.extend(
                np.array(self._requests[first:]),
                np.concatenate(pieces).astype(np.int32),
                np.array([item.accepted_len + 1 for item in verified]),
            )

    def step(self) -> None:
        """One forward over the slots in use; finished responses go."""
        start = self._clock()
        live = self.num_live
        kept, num_proposed = None, 0
        if self._drafter is not None and self._payoff.pays(live):
            kept, num_proposed = self._step_with_proposals()
        if kept is None:
            self._step_plainly()
            kept = [1] * live
        state = self._state[:, :live]
        finished = state[_POSITION] >= state[_ROOM]
        if self._stop.numel():
            finished |= torch.isin(state[_TOKEN], self._stop)
        self._kv_lens = [old + new for old, new in zip(self._kv_lens, kept, strict=True)]
        self._num_steps += 1
        stats = self._stats
        stats.num_decode_steps += 1
        stats.num_computed_tokens += live + num_proposed
        stats.num_proposed_tokens += num_proposed
        stats.num_accepted_proposals += sum(kept) - live
        done = finished.nonzero().flatten().tolist()
        seconds = self._clock() - start
        if self._drafter is not None:
            self._payoff.observe(live, num_proposed, seconds, sum(kept) - live)
        if live < _TAIL_SHARE * self._plan.batch:
            stats.num_tail_steps += 1
            stats.tail_seconds += seconds
        if done:
            self._finish(done)

    def _step_plainly(self) -> None:
        """Draws one token for every slot in use."""
        live = self.num_live
        state = self._state[:, :live]
        logits = self._forward(
            self.cache, state[_TOKEN], state[_KV_POSITION], None, max(self._kv_lens) + 1
        )
        positions = state[_POSITION]
        sample = ops.sample_tokens(
            logits,
            keys=state[_KEY],
            positions=positions,
            temperature=self._sampling.temperature,
            top_k=self._sampling.top_k,
            top_p=self._sampling.top_p,
        )
        self._token_ids[self._rows[:live], positions] = sample.token_ids
        self._logprobs[self._rows[:live], positions] = sample.logprobs
        state[_TOKEN] = sample.token_ids
        state[_KV_POSITION : _POSITION + 1] += 1
        if self._drafter is not None:
            self._drafter.extend(
                np.array(self._requests),
                sample.token_ids.cpu().numpy(),
                np.ones(live, dtype=np.int64),
                sample.logprobs.cpu().numpy(),
            )

    def _step_with_proposals(self) -> tuple[list[int] | None, int]:
        """Feeds proposals behind each slot's token and keeps those that sampling gives too.

        Returns:
            Tokens that each slot gained (None, and nothing is done, if nothing is worth proposing),
            and the number of tokens proposed.
        """
        assert self._drafter is not None
        live = self.num_live
        requests, kv_lens = np.array(self._requests), np.array(self._kv_lens)
        # The token drawn after the proposal needs room, too.
        positions = kv_lens - self._plan.prompt_lens[requests] + 1
        limits = np.minimum(self._plan.rooms[requests] - 1 - positions, _MAX_PROPOSAL)
        if limits.max() < 1:
            return None, 0
        proposals = self._drafter.propose(
            requests,
            limits,
            self._payoff.threshold(live),
            favours_longest=True,
            max_total=min(max(0, self._max_tokens - live), self._payoff.room(live)),
            # Greedy decoding knows no noise.
            keys=self._plan.keys[requests] if self._sampling.temperature > 0 else None,
            positions=positions,
        )
        num_proposed, expected = proposals.token_ids.size, float(proposals.expected.sum())
        if not self._payoff.worth(live, num_proposed, expected):
            return None, 0
        device = self._forward.device
        counts = proposals.lens + 1
        firsts = np.cumsum(counts) - counts
        is_first = np.zeros(live + num_proposed, dtype=bool)
        is_first[firsts] = True
        proposed = torch.from_numpy(proposals.token_ids).to(device)
        token_ids = torch.empty(live + num_proposed, dtype=torch.int64, device=device)
        token_ids[torch.from_numpy(is_first).to(device)] = self._state[_TOKEN, :live]
        token_ids[torch.from_numpy(~is_first).to(device)] = proposed.long()
        state = self._state[:, :live]
        logits = self._forward(
            self.cache,
            token_ids,
            state[_KV_POSITION],
            torch.from_numpy(counts).to(device),
            int((kv_lens + counts).max()),
        )
        cu_lens = np.concatenate([[0], np.cumsum(proposals.lens)])
        result = ops.verify_prefix(
            logits,
            proposed,
            torch.from_numpy(cu_lens).to(device),
            rule=Coupled(),  # passes what sampling gives at that position, under every rule
            keys=state[_KEY],
            positions=state[_POSITION],
            temperature=self._sampling.temperature,
            top_k=self._sampling.top_k,
            top_p=self._sampling.top_p,
        )
        accepted = result.accepted_lens.cpu().numpy().astype(np.int64)
        kept = accepted + 1
        gained = np.repeat(firsts, kept) + ranges(kept)  # rows of logits that gave a token
        # Behind its accepted proposals each slot has the token drawn after them.
        tokens = np.empty(live + num_proposed, dtype=np.int32)
        tokens[np.flatnonzero(~is_first) - 1] = proposals.token_ids
        tokens[firsts + accepted] = result.next_token_ids.cpu().numpy()
        new_ids = torch.from_numpy(tokens[gained]).to(device)
        rows = torch.from_numpy(np.repeat(np.arange(live), kept)).to(device)
        columns = torch.from_numpy(np.repeat(positions, kept) + ranges(kept)).to(device)
        self._token_ids[rows, columns] = new_ids
        self._logprobs[rows, columns] = result.logprobs[torch.from_numpy(gained).to(device)]
        state[_TOKEN] = result.next_token_ids.long()
        state[_KV_POSITION : _POSITION + 1] += torch.from_numpy(kept).to(device)
        self._drafter.observe(requests, accepted)
        self._payoff.tested(expected, int(accepted.sum()))
        logprobs = self._logprobs[rows, columns].cpu().numpy()
        self._drafter.extend(requests, tokens[gained], kept, logprobs)
        return kept.tolist(), num_proposed

    def _finish(self, done: list[int]) -> None:
        """Hands the responses of some slots over and moves the last slots in use into the free
        ones."""
        for ids, logprobs, slot in zip(
            self._token_ids[done].cpu().numpy(),
            self._logprobs[done].cpu().numpy(),
            done,
            strict=True,
        ):
            request = self._requests[slot]
            begin = self._first_positions[slot]
            end = self._kv_lens[slot] - int(self._plan.prompt_lens[request]) + 1
            response = self._results.responses[request]
            response.token_ids.append(ids[begin:end].copy())
            response.logprobs.append(logprobs[begin:end].copy())
        self._stats.max_row_steps = max(
            self._stats.max_row_steps, *(self._num_steps - self._first_steps[slot] for slot in done)
        )
        live = self.num_live - len(done)
        gaps = [slot for slot in done if slot < live]
        finished = set(done)
        movers = [slot for slot in range(live, self.num_live) if slot not in finished]
        for values in (
            self._requests,
            self._first_positions,
            self._kv_lens,
            self._first_steps,
        ):
            for gap, mover in zip(gaps, movers, strict=True):
                values[gap] = values[mover]
            del values[live:]
        self.cache.move_rows(movers, gaps, [self._kv_lens[gap] for gap in gaps])
        if gaps:
            for tensor, dim in ((self._state, 1), (self._token_ids, 0), (self._logprobs, 0)):
                index = torch.tensor(gaps, device=tensor.device)
                moved = tensor.index_select(dim, torch.tensor(movers, device=tensor.device))
                tensor.index_copy_(dim, index, moved)
