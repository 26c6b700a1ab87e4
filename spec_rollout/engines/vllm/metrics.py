"""What speculative reuse did inside one worker, since the counters were last taken."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np


@dataclass(slots=True)
class ReuseMetrics:
    """Plain sums over engine steps; `a + b` adds up calls or workers.

    Attributes:
        num_engine_steps: Forward passes that ended in sampling.
        num_decode_steps: Of these, steps in which every request computed its last token, what was
            proposed from history behind it, and nothing else.
        num_tail_steps, tail_seconds: Decode steps with fewer than a tenth of the call's requests
            running.
        max_row_steps: Steps of the longest request after its first token (of a sum: of each call's
            longest).
        num_proposed_tokens: Tokens proposed from history; the model computed them all.
        num_accepted_proposals: Of these, kept.
        num_computed_tokens: Tokens the model computed: prompts, draft chunks, single tokens.
        num_drafts: Requests with a draft.
        num_draft_tokens: Their draft tokens (after the cut to max_tokens and to the model's
            length).
        num_verified_tokens: Draft tokens that went through the model, wasted ones included.
        num_tested_tokens: Draft tokens tested; a token can be tested before it is computed, never
            after.
        num_accepted_tokens: Draft tokens accepted. What is accepted after a stop token or string is
            dropped later.
        num_wasted_tokens: Draft tokens computed in a chunk after its first rejection.
        num_fully_reused: Drafts that were accepted to their last token.
        num_placeholder_tokens: Draft tokens that vLLM made up and the plugin rejected.
        num_unknown_ids: Requests with a `collect_id` that no rollout call announced, or that
            another request had: nothing is kept for them.
        tested_at, accepted_at: By response position within the draft. [longest draft], int64.
    """

    num_engine_steps: int = 0
    num_decode_steps: int = 0
    num_computed_tokens: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_verified_tokens: int = 0
    num_tested_tokens: int = 0
    num_accepted_tokens: int = 0
    num_wasted_tokens: int = 0
    num_fully_reused: int = 0
    num_placeholder_tokens: int = 0
    num_unknown_ids: int = 0
    num_tail_steps: int = 0
    tail_seconds: float = 0.0
    max_row_steps: int = 0
    num_proposed_tokens: int = 0
    num_accepted_proposals: int = 0
    tested_at: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    accepted_at: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def draft_added(self, length: int) -> None:
        """A request with a draft of `length` tokens was seen for the first time."""
        self.num_drafts += 1
        self.num_draft_tokens += length
        self._make_room(length)

    def draft_progress(self, draft_len: int, before: tuple[int, ...], now: tuple[int, ...]) -> None:
        """What has come of a draft since `before`.

        Both are its tokens so far that were accepted, tested, verified and wasted.
        """
        self._make_room(draft_len)
        accepted, tested, verified, wasted = now
        self.tested_at[before[1] : tested] += 1
        self.accepted_at[before[0] : accepted] += 1
        self.num_accepted_tokens += accepted - before[0]
        self.num_tested_tokens += tested - before[1]
        self.num_verified_tokens += verified - before[2]
        self.num_wasted_tokens += wasted - before[3]
        self.num_fully_reused += before[0] < draft_len == accepted

    def _make_room(self, length: int) -> None:
        if length > self.tested_at.size:
            grow = length - self.tested_at.size
            self.tested_at = np.pad(self.tested_at, (0, grow))
            self.accepted_at = np.pad(self.accepted_at, (0, grow))

    def chunk_tested(
        self, position: int, num_tested: int, num_accepted: int, num_computed: int
    ) -> None:
        """One row of one step: draft tokens from `position` on."""
        decided = min(num_accepted + 1, num_tested)
        self.tested_at[position : position + decided] += 1
        self.accepted_at[position : position + num_accepted] += 1
        self.num_tested_tokens += decided
        self.num_accepted_tokens += num_accepted
        self.num_wasted_tokens += max(0, num_computed - num_accepted)

    def proposals_tested(
        self, num_tokens: int, num_own: int, num_accepted: int, num_own_accepted: int
    ) -> None:
        """The drafter's proposals of one step.

        `num_own` of these tokens were the requests' own drafts, and count as such.
        """
        self.num_verified_tokens += num_own
        self.num_wasted_tokens += num_own - num_own_accepted
        self.num_proposed_tokens += num_tokens - num_own
        self.num_accepted_proposals += num_accepted - num_own_accepted

    def draft_followed(self, num_followed: int, num_tested: int, draft_len: int) -> None:
        """All of one response whose draft was proposed by the drafter."""
        self.tested_at[:num_tested] += 1
        self.accepted_at[:num_followed] += 1
        self.num_tested_tokens += num_tested
        self.num_accepted_tokens += num_followed
        self.num_fully_reused += num_followed == draft_len

    def __add__(self, other: ReuseMetrics) -> ReuseMetrics:
        size = max(self.tested_at.size, other.tested_at.size)

        def add(a: Any, b: Any) -> Any:
            if isinstance(a, np.ndarray):
                return np.pad(a, (0, size - a.size)) + np.pad(b, (0, size - b.size))
            return a + b

        return ReuseMetrics(
            **{f.name: add(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON and for the way between processes."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in values.items()}

    def as_row(self) -> dict[str, float]:
        """What `RolloutStats` does not say, for a trainer's log.

        `vllm_*` counts, and `vllm_acceptance_A_B`: the share accepted of the draft tokens tested at
        positions A to B (1-based), left out where none was tested.
        """
        names = ("num_tested_tokens", "num_wasted_tokens", "num_placeholder_tokens")
        row: dict[str, float] = {f"vllm_{name}": getattr(self, name) for name in names}
        for first, last in itertools.pairwise((0, 16, 64, 256, 1024, 4096, 1 << 40)):
            tested = int(self.tested_at[first:last].sum())
            if tested:
                end = last if last < 1 << 40 else "up"
                accepted = int(self.accepted_at[first:last].sum())
                row[f"vllm_acceptance_{first + 1}_{end}"] = accepted / tested
        return row

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ReuseMetrics:
        """Inverse of `as_dict`."""
        arrays: dict[str, Any] = {
            k: np.array(v, np.int64) if isinstance(v, list) else v for k, v in values.items()
        }
        return cls(**arrays)
