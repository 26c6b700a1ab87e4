"""Decoding: one token per step for every slot in use; the slots in use are always the first ones."""

from __future__ import annotations

import numpy as np
import torch

from spec_rollout import ops
from spec_rollout.engines.transformers.forward import ModelForward
from spec_rollout.engines.transformers.requests import Plan
from spec_rollout.engines.transformers.results import Results
from spec_rollout.engines.transformers.slot_cache import SlotCache, copy_rows
from spec_rollout.engines.transformers.verify import Verified
from spec_rollout.types import RolloutStats, SamplingParams

# Rows of the state on the device: the token to feed, its position in the sequence, the response
# position of the token to draw, the response's limit, the noise key.
_TOKEN, _KV_POSITION, _POSITION, _ROOM, _KEY = range(5)


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
        stats: Counts are added here.
    """

    def __init__(
        self,
        forward: ModelForward,
        plan: Plan,
        sampling: SamplingParams,
        results: Results,
        *,
        num_slots: int,
        stats: RolloutStats,
    ) -> None:
        self._forward = forward
        self._plan = plan
        self._sampling = sampling
        self._results = results
        self._stats = stats
        self.num_slots = num_slots
        device = forward.device
        self.cache = forward.new_cache(num_slots, int((plan.prompt_lens + plan.rooms).max()))
        self._requests: list[int] = []
        self._first_positions: list[int] = []
        self._kv_lens: list[int] = []  # of each slot in use, the token to feed not yet counted
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
        """Takes over requests to go on from: the KV of prompt and accepted tokens, and the next token."""
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
            state[:, column] = (
                item.next_token_id,
                kv_len,
                position,
                self._plan.rooms[item.request],
                self._plan.keys[item.request],
            )
        self._state[:, first : first + len(verified)] = torch.from_numpy(state).to(
            self._state.device
        )
        copy_rows(lanes, self.cache, [item.lane for item in verified], slots, self._kv_lens[first:])

    def step(self) -> None:
        """Draws one token for every slot in use and lets finished responses go."""
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
        finished = state[_POSITION] >= state[_ROOM]
        if self._stop.numel():
            finished |= torch.isin(state[_TOKEN], self._stop)
        self._kv_lens = [kv_len + 1 for kv_len in self._kv_lens]
        self._stats.num_decode_steps += 1
        self._stats.num_computed_tokens += live
        done = finished.nonzero().flatten().tolist()
        if done:
            self._finish(done)

    def _finish(self, done: list[int]) -> None:
        """Hands the responses of some slots over and moves the last slots in use into the free ones."""
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
        live = self.num_live - len(done)
        gaps = [slot for slot in done if slot < live]
        finished = set(done)
        movers = [slot for slot in range(live, self.num_live) if slot not in finished]
        for values in (self._requests, self._first_positions, self._kv_lens):
            for gap, mover in zip(gaps, movers, strict=True):
                values[gap] = values[mover]
            del values[live:]
        self.cache.move_rows(movers, gaps, [self._kv_lens[gap] for gap in gaps])
        if gaps:
            for tensor, dim in ((self._state, 1), (self._token_ids, 0), (self._logprobs, 0)):
                index = torch.tensor(gaps, device=tensor.device)
                moved = tensor.index_select(dim, torch.tensor(movers, device=tensor.device))
                tensor.index_copy_(dim, index, moved)
