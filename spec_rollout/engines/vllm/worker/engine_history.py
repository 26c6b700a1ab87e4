"""Proposals from what an engine generated before, for requests that come and go."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np

from spec_rollout.drafting import Drafter, MatchShares, Payoff, Proposals
from spec_rollout.engines.vllm.worker.groups import Known
from spec_rollout.engines.vllm.worker.history import HistoryProposals
from spec_rollout.engines.vllm.worker.request_state import Row

# Of a prompt's rollouts, and of the n-gram table, as shares of all that may be remembered.
_GROUP_SHARE = 1 / 64
_TABLE_SHARE = 1 / 8
_LEAST_GROUP = 1 << 18
_LEAST_TABLE = 1 << 19
_MOST_TABLE = 1 << 26


class EngineHistory(HistoryProposals):
    """`HistoryProposals` that outlives its requests. A request has a slot from `join` to `leave`.

    Args:
        max_bytes: Bound of what is remembered.
        payoff, shares, max_proposal, token_budget: See `HistoryProposals`.
    """

    def __init__(
        self,
        max_bytes: int,
        payoff: Payoff,
        shares: MatchShares,
        *,
        max_proposal: int,
        token_budget: int,
    ) -> None:
        table = min(max(int(max_bytes * _TABLE_SHARE), _LEAST_TABLE), _MOST_TABLE)
        self._lasting = Drafter(
            max_bytes=max(max_bytes - table, 0),
            max_group_bytes=max(int(max_bytes * _GROUP_SHARE), _LEAST_GROUP),
            max_table_bytes=table,
            shares=shares,
        )
        # Greedy requests have a key as well: it says nothing of what they draw, see `propose`.
        self._set_up(self._lasting, 0, True, payoff, max_proposal, token_budget)
        self._handle_of = np.empty(0, np.int64)
        self._free: list[int] = []

    def join(self, group: bytes, stop_token_ids: Iterable[int], tag: int | None) -> int:
        """A request begins.

        Args:
            group: Key of its prompt.
            stop_token_ids: That end its response.
            tag: Under which `recall` finds what it generated; None: it does not.

        Returns:
            Its slot, for `Row.history_id`.
        """
        handle = self._lasting.join(group, stop_token_ids=sorted(stop_token_ids), tag=tag)
        if not self._free:
            self._grow()
        slot = self._free.pop()
        self._handle_of[slot] = handle
        self._num_indexed[slot] = 0
        self._proposed_at[slot] = -1
        return slot

    def begin(self) -> None:
        """Requests come after a time without any: what proposals were good for is forgotten."""
        self._payoff.begin()

    def leave(self, slot: int) -> None:
        """The request is over; what it generated is history now."""
        self._outcomes = [
            (ids[ids != slot], accepted[ids != slot]) for ids, accepted in self._outcomes
        ]
        self._lasting.leave(int(self._handle_of[slot]))
        self._followers.pop(slot, None)
        self._proposed_at[slot] = -1
        self._free.append(slot)

    def follow(self, row: Row) -> None:
        """See `HistoryProposals.follow`."""
        assert row.draft_logprobs is not None
        handle = int(self._handle_of[row.history_id])
        self._lasting.follow(handle, row.draft, row.draft_logprobs)
        self._followers[row.history_id] = row

    def followed_by(self, slot: int) -> tuple[int, int] | None:
        """Of a request with a draft, before it leaves: tokens kept of the draft, tokens tested."""
        row = self._followers.get(slot)
        if row is None:
            return None
        kept = self._lasting.followed_len(int(self._handle_of[slot]))
        return kept, min(kept + 1, row.draft_len, int(self._num_indexed[slot]))

    def recall(self, group: bytes, tag: int) -> tuple[np.ndarray, np.ndarray] | None:
        """The last rollout with a tag; see `Drafter.recall`."""
        return self._lasting.recall(group, tag)

    def followed(self) -> list[tuple[Row, int, int]]:
        """Nothing: requests are asked one by one when they leave."""
        return []

    def clear(self) -> None:
        """Forgets all but what live requests have generated."""
        self._lasting.clear()

    def export_to(self, path: str) -> None:
        """Writes what is remembered to a file."""
        self._lasting.save(path)

    def import_from(self, path: str) -> None:
        """Adds what a file holds."""
        self._lasting.load(path)

    def info(self) -> dict[str, Any]:
        """What is remembered; `num_bytes` is the sum."""
        info = self._lasting.info()
        return {**asdict(info), "num_bytes": info.history_bytes + info.table_bytes}

    def _handles(self, requests: np.ndarray) -> np.ndarray:
        return self._handle_of[requests]

    def _ask(
        self,
        batch: Known,
        free: np.ndarray,
        requests: np.ndarray,
        indices: np.ndarray,
        limits: np.ndarray,
        budget: int,
    ) -> Proposals:
        """See `HistoryProposals._ask`; the noise of greedy requests does not decide."""
        drawn = batch.is_drawn[free]
        if drawn.all():
            return super()._ask(batch, free, requests, indices, limits, budget)
        handles, least = self._handles(requests), self._payoff.threshold(len(batch.rows))
        if not drawn.any():
            return self._drafter.propose(handles, limits, least, max_total=budget)
        greedy = self._drafter.propose(handles[~drawn], limits[~drawn], least, max_total=budget)
        sampled = self._drafter.propose(
            handles[drawn],
            limits[drawn],
            least,
            max_total=budget - greedy.token_ids.size,
            keys=batch.keys[free][drawn],
            positions=(batch.first_positions[free] + indices)[drawn],
        )
        return _interleaved(drawn, sampled, greedy)

    def _grow(self) -> None:
        old = self.num_requests
        self.num_requests = new = max(64, 2 * old)
        self._handle_of = _longer(self._handle_of, new, 0)
        self._num_indexed = _longer(self._num_indexed, new, 0)
        self._proposed_at = _longer(self._proposed_at, new, -1)
        self._lens = _longer(self._lens, new, 0)
        self._own_lens = _longer(self._own_lens, new, 0)
        self._starts = _longer(self._starts, new, 0)
        self._expected = _longer(self._expected, new, 0)
        self._free = list(range(new - 1, old - 1, -1))


def _longer(values: np.ndarray, size: int, fill: int) -> np.ndarray:
    return np.concatenate([values, np.full(size - values.size, fill, values.dtype)])


def _interleaved(is_first: np.ndarray, first: Proposals, other: Proposals) -> Proposals:
    """A batch's proposals from those of two parts of it; `is_first` [count] says whose is whose."""

    def by_request(name: str) -> np.ndarray:
        values = np.empty(is_first.size, getattr(first, name).dtype)
        values[is_first], values[~is_first] = getattr(first, name), getattr(other, name)
        return values

    lens = by_request("lens")
    of_first = np.repeat(is_first, lens)
    token_ids = np.empty(int(lens.sum()), np.int32)
    token_ids[of_first], token_ids[~of_first] = first.token_ids, other.token_ids
    return Proposals(token_ids, lens, by_request("own_lens"), by_request("expected"))
