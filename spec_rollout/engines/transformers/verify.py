"""Verification: prompts and drafts go through the model chunk by chunk until a draft token is
rejected."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from spec_rollout import ops
from spec_rollout.acceptance import AcceptanceRule
from spec_rollout.engines.transformers.forward import ModelForward
from spec_rollout.engines.transformers.requests import Plan
from spec_rollout.engines.transformers.slot_cache import SlotCache, copy_rows
from spec_rollout.packed import ranges
from spec_rollout.types import RolloutStats, SamplingParams

# Draft tokens in a request's first chunk. Later ones double: what is computed behind a rejection is
# then about as much as was accepted, at the price of a few more forwards for long drafts.
_FIRST_CHUNK = 8


@dataclass(slots=True)
class _Lane:
    """A request under verification: `fed` of its stream's tokens are in the cache, and at most
    `most_tested` of its draft's are tested in the next step."""

    request: int
    most_tested: int
    fed: int = 0
    accepted_len: int = 0
    logprobs: list[np.ndarray] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Verified:
    """A request whose verification has ended.

    Attributes:
        request: Its index.
        lane: Row of the verifier's cache that holds its KV until the next step.
        accepted_len: Draft tokens accepted.
        next_token_id: The token after them; None if a finished draft was accepted whole.
        logprobs: Of the accepted tokens and the next one, in pieces. float32.
    """

    request: int
    lane: int
    accepted_len: int
    next_token_id: int | None
    logprobs: list[np.ndarray]


class Verifier:
    """Feeds up to `num_lanes` requests at a time, each by at most `chunk` tokens of its stream a
    step.

    A lane whose draft is rejected or used up is free for the next request at once, so every forward
    is full while requests wait. A request without a draft is one whose "draft" of no tokens is
    accepted: the token after it is the first of its response.

    Requests of the same prompt, as the samples of a group, share its computation: all but its last
    token is computed once and copied, if that takes no more memory than the lanes do.

    Args:
        forward: The model.
        plan: All requests.
        sampling, rule: As given to the engine.
        num_lanes: Requests under verification at a time.
        max_tokens: Most tokens of one forward.
        chunk: Most tokens of one request per step. Of a draft the first step has `_FIRST_CHUNK`,
            the next ones twice as many each.
        stats: Counts are added here.
    """

    def __init__(
        self,
        forward: ModelForward,
        plan: Plan,
        sampling: SamplingParams,
        rule: AcceptanceRule,
        *,
        num_lanes: int,
        max_tokens: int,
        chunk: int,
        stats: RolloutStats,
    ) -> None:
        self._forward = forward
        self._plan = plan
        self._sampling = sampling
        self._rule = rule
        self._max_tokens = max_tokens
        self._chunk = chunk
        self._stats = stats
        self._lanes: list[_Lane | None] = []
        self._feed_lens = plan.feed_lens
        self.num_lanes = num_lanes
        longest = int(self._feed_lens.max()) + chunk
        self.cache = forward.kept_cache("lanes", num_lanes, longest)

        self._prompts: SlotCache | None = None
        self._prompt_rows: dict[bytes, int] = {}  # rows of `_prompts`
        self._compute_shared_prompts(num_lanes * longest)

    @property
    def num_busy(self) -> int:
        """Requests under verification."""
        return sum(lane is not None for lane in self._lanes)

    def admit(self, request: int) -> None:
        """Takes a request into a free lane."""
        lane = _Lane(request, min(_FIRST_CHUNK, self._chunk))
        if None in self._lanes:
            self._lanes[self._lanes.index(None)] = lane
        else:
            assert len(self._lanes) < self.num_lanes
            self._lanes.append(lane)

    def step(self) -> tuple[list[Verified], float]:
        """One forward over all lanes.

        Returns:
            The requests whose verification ended (their lanes are free from the next call on), and
            the share of the computed tokens that belongs to requests with drafts.
        """
        self._close_gaps()
        lanes = [lane for lane in self._lanes if lane is not None]
        self._copy_prompts(lanes)
        requests = np.array([lane.request for lane in lanes])
        fed = np.array([lane.fed for lane in lanes])
        left = self._feed_lens[requests] - fed
        # Logits from the prompt's last token on: row i of them predicts draft token i.
        prompt_ends = self._plan.prompt_lens[requests] - 1
        most_tested = np.array([lane.most_tested for lane in lanes])
        most = np.maximum(prompt_ends - fed, 0) + most_tested
        counts = np.minimum(np.minimum(left, self._chunk), most)
        ends = fed + counts
        first_rows = np.maximum(fed, prompt_ends)
        num_rows = np.maximum(ends - first_rows, 0)
        offsets = first_rows - prompt_ends
        num_tests = np.minimum(num_rows, self._plan.draft_lens[requests] - offsets)
        logits = self._run(requests, fed, counts, first_rows, num_rows)

        self._stats.num_verified_tokens += int(num_tests.sum())
        self._stats.num_computed_tokens += int(counts.sum())
        share = float(counts[self._plan.has_draft[requests]].sum() / counts.sum())
        for lane, end in zip(lanes, ends, strict=True):
            lane.fed = int(end)
        tested = np.flatnonzero(num_rows)
        if not tested.size:  # prompts only so far
            return [], share
        accepted, next_ids, logprobs, cu_rows = self._verify(
            logits, requests[tested], offsets[tested], num_tests[tested], num_rows[tested]
        )
        verified = []
        for i, row in enumerate(tested.tolist()):
            lane, count, next_id = lanes[row], int(accepted[i]), int(next_ids[i])
            drawn = next_id >= 0
            lane.accepted_len += count
            lane.most_tested = min(2 * lane.most_tested, self._chunk)
            lane.logprobs.append(logprobs[cu_rows[i] : cu_rows[i] + count + drawn])
            if drawn or lane.fed == self._feed_lens[lane.request]:
                token = next_id if drawn else None
                verified.append(
                    Verified(lane.request, row, lane.accepted_len, token, lane.logprobs)
                )
                self._lanes[row] = None
        return verified, share

    def _compute_shared_prompts(self, max_positions: int) -> None:
        """KV of every prompt that several requests have, up to its last token."""
        plan = self._plan
        requests_of: dict[bytes, list[int]] = {}
        for request in range(plan.batch):
            if plan.prompt_lens[request] > 1:
                requests_of.setdefault(plan.prompt_ids(request).tobytes(), []).append(request)
        shared = {key: ids[0] for key, ids in requests_of.items() if len(ids) > 1}
        if not shared or len(shared) * plan.prompt_lens.max() > max_positions:
            return
        # Longest first: the rows that go on are then the first ones.
        keys = sorted(shared, key=lambda key: -plan.prompt_lens[shared[key]])
        firsts = np.array([shared[key] for key in keys])
        lens = plan.prompt_lens[firsts] - 1
        self._prompts = self._forward.kept_cache("prompts", len(keys), int(lens.max()))
        device = self._forward.device
        fed = 0
        while (live := int((lens > fed).sum())) > 0:
            most = max(1, self._max_tokens // live)
            counts = np.minimum(lens[:live] - fed, most)
            tokens = np.repeat(plan.stream_starts[firsts[:live]] + fed, counts) + ranges(counts)
            self._forward(
                self._prompts,
                torch.from_numpy(plan.stream_ids[tokens]).to(device),
                torch.full((live,), fed, device=device),
                torch.from_numpy(counts).to(device),
                int(fed + counts.max()),
                torch.zeros(1, dtype=torch.int64, device=device),  # nobody reads these logits
            )
            self._stats.num_computed_tokens += int(counts.sum())
            fed += most
        self._prompt_rows = {key: row for row, key in enumerate(keys)}

    def _copy_prompts(self, lanes: list[_Lane]) -> None:
        """Gives new lanes the prompts that are there already."""
        if self._prompts is None:
            return
        rows, sources = [], []
        for row, lane in enumerate(lanes):
            if lane.fed == 0:
                source = self._prompt_rows.get(self._plan.prompt_ids(lane.request).tobytes())
                if source is not None:
                    rows.append(row)
                    sources.append(source)
                    lane.fed = int(self._plan.prompt_lens[lane.request]) - 1
        copy_rows(self._prompts, self.cache, sources, rows, [lanes[row].fed for row in rows])

    def _run(
        self,
        requests: np.ndarray,
        fed: np.ndarray,
        counts: np.ndarray,
        first_rows: np.ndarray,
        num_rows: np.ndarray,
    ) -> torch.Tensor:
        """The forward; logits of the wanted tokens, lane after lane. [sum(num_rows), vocab]."""
        tokens = np.repeat(self._plan.stream_starts[requests] + fed, counts) + ranges(counts)
        firsts = np.cumsum(counts) - counts
        select = np.repeat(firsts + first_rows - fed, num_rows) + ranges(num_rows)
        device = self._forward.device
        return self._forward(
            self.cache,
            torch.from_numpy(self._plan.stream_ids[tokens]).to(device),
            torch.from_numpy(fed).to(device),
            torch.from_numpy(counts).to(device),
            int((fed + counts).max()),
            torch.from_numpy(select).to(device),
        )

    def _verify(
        self,
        logits: torch.Tensor,
        requests: np.ndarray,
        offsets: np.ndarray,
        num_tests: np.ndarray,
        num_rows: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Accepted counts and next tokens [rows], log-probs [sum(num_rows)], cu_rows [rows + 1]."""
        plan, device = self._plan, self._forward.device
        cu_rows = np.concatenate([[0], np.cumsum(num_rows)])
        cu_tests = np.concatenate([[0], np.cumsum(num_tests)])
        starts = plan.stream_starts[requests] + plan.prompt_lens[requests] + offsets
        tested = np.repeat(starts, num_tests) + ranges(num_tests)
        draft_logprobs = None
        if plan.draft_logprobs is not None:
            draft_logprobs = torch.from_numpy(plan.draft_logprobs[tested]).to(device)
        result = ops.verify_prefix(
            logits,
            torch.from_numpy(plan.stream_ids[tested]).to(device),
            torch.from_numpy(cu_tests).to(device),
            rule=self._rule,
            keys=torch.from_numpy(plan.keys[requests]).to(device),
            positions=torch.from_numpy(offsets).to(device),
            draft_logprobs=draft_logprobs,
            cu_logits_lens=torch.from_numpy(cu_rows).to(device),
            temperature=self._sampling.temperature,
            top_k=self._sampling.top_k,
            top_p=self._sampling.top_p,
        )
        accepted, next_ids, logprobs = (tensor.cpu().numpy() for tensor in result)
        return accepted, next_ids, logprobs, cu_rows

    def _close_gaps(self) -> None:
        """Moves the last lanes into free ones, so that the lanes in use come first."""
        busy = [row for row, lane in enumerate(self._lanes) if lane is not None]
        gaps = [row for row in range(len(busy)) if self._lanes[row] is None]
        movers = busy[len(busy) - len(gaps) :]
        lens = []
        for gap, row in zip(gaps, movers, strict=True):
            lane = self._lanes[row]
            assert lane is not None
            self._lanes[gap] = lane
            lens.append(lane.fed)
        del self._lanes[len(busy) :]
        self.cache.move_rows(movers, gaps, lens)
