"""Proposals from what an engine generated before, for requests that come and go."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np

from spec_rollout.drafting import Drafter, MatchShares, NoiseLaw, Payoff
from spec_rollout.engines.vllm.worker.history import HistoryProposals
from spec_rollout.engines.vllm.worker.request_state import Row
from spec_rollout.engines.vllm.worker.sharing import HistorySharing

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
        sharing: With other engines; None: with none.
        tells_late: False where other workers remember the same requests, and have to forget the
            same ones: what is forgotten, and when, depends on when the drafter is told.
        noise: See `Drafter`.
    """

    def __init__(
        self,
        max_bytes: int,
        payoff: Payoff,
        shares: MatchShares,
        *,
        max_proposal: int,
        token_budget: int,
        sharing: HistorySharing | None = None,
        tells_late: bool = True,
        noise: NoiseLaw = NoiseLaw.PHILOX,
    ) -> None:
        table = min(max(int(max_bytes * _TABLE_SHARE), _LEAST_TABLE), _MOST_TABLE)
        drafter = Drafter(
            max_bytes=max(max_bytes - table, 0),
            max_group_bytes=max(int(max_bytes * _GROUP_SHARE), _LEAST_GROUP),
            max_table_bytes=table,
            shares=shares,
            noise=noise,
        )
        super().__init__(
            drafter,
            0,
            payoff,
            max_proposal=max_proposal,
            token_budget=token_budget,
            tells_late=tells_late,
        )
        self._handle_of = np.empty(0, np.int64)
        self._free: list[int] = []
        self._sharing = sharing
        if sharing is not None:
            sharing.start(drafter)
        self._named: dict[int, tuple[bytes, int | None]] = {}  # group and tag by slot
        self._unkept: set[int] = set()  # slots of requests that had begun before `clear`

    def join(self, group: bytes, stop_token_ids: Iterable[int], tag: int | None) -> int:
        """A request begins.

        Args:
            group: Key of its prompt.
            stop_token_ids: That end its response.
            tag: Under which `recall` finds what it generated; None: it does not.

        Returns:
            Its slot, for `Row.history_id`.
        """
        handle = self._drafter.join(group, stop_token_ids=sorted(stop_token_ids), tag=tag)
        if not self._free:
            self._grow()
        slot = self._free.pop()
        self._handle_of[slot] = handle
        self._named[slot] = (group, tag)
        self._num_known[slot] = 0
        self._proposed_at[slot] = -1
        return slot

    def begin(self) -> None:
        """Requests come after a time without any: what proposals were good for is forgotten."""
        self._payoff.begin()

    def leave(self, slot: int) -> None:
        """The request is over; what it generated is history now, unless that was cleared."""
        self._outcomes = [
            (ids[ids != slot], accepted[ids != slot]) for ids, accepted in self._outcomes
        ]
        self._tell_late()
        handle = int(self._handle_of[slot])
        group, tag = self._named.pop(slot)
        if self._sharing is not None and (generated := self._drafter.generated(handle)) is not None:
            self._sharing.offer(group, tag, *generated)
        self._drafter.leave(handle, keep=slot not in self._unkept)
        self._unkept.discard(slot)
        self._followers.pop(slot, None)
        self._proposed_at[slot] = -1
        self._free.append(slot)

    def follow(self, row: Row) -> None:
        """See `HistoryProposals.follow`."""
        assert row.draft_logprobs is not None
        handle = int(self._handle_of[row.history_id])
        self._drafter.follow(handle, row.draft, row.draft_logprobs)
        self._followers[row.history_id] = row

    def followed_by(self, slot: int) -> tuple[int, int] | None:
        """Of a request with a draft, before it leaves: tokens kept of the draft, tokens tested."""
        row = self._followers.get(slot)
        if row is None:
            return None
        self._tell_late()
        kept = self._drafter.followed_len(int(self._handle_of[slot]))
        return kept, min(kept + 1, row.draft_len, int(self._num_known[slot]))

    def recall(self, group: bytes, tag: int) -> tuple[np.ndarray, np.ndarray] | None:
        """The last rollout with a tag; see `Drafter.recall`."""
        return self._drafter.recall(group, tag)

    def followed(self) -> list[tuple[Row, int, int]]:
        """Nothing: requests are asked one by one when they leave."""
        return []

    @property
    def is_shared(self) -> bool:
        """With other engines."""
        return self._sharing is not None

    def receive(self) -> None:
        """Adds rollouts of other engines, if some have come."""
        if self._sharing is not None:
            self._sharing.give_to(self._drafter)

    def clear(self) -> None:
        """Forgets everything. Requests that have begun go on, and are not remembered.

        vLLM tells of a request's end in the step after its last, so they may be over.
        """
        self._tell_late()
        self._drafter.clear()
        self._unkept = set(self._named)

    def export_to(self, path: str) -> None:
        """Writes what is remembered to a file, and what live requests have generated so far.

        Those of the last step may be over, which vLLM tells in the next one.
        """
        self._tell_late()
        slots = self._named.keys() - self._unkept
        self._drafter.save(path, live={int(self._handle_of[s]): self._named[s] for s in slots})

    def import_from(self, path: str) -> None:
        """Adds what a file holds."""
        self._drafter.load(path)

    def info(self) -> dict[str, Any]:
        """What is remembered; `num_bytes` is the sum."""
        self._tell_late()
        info = self._drafter.info()
        shared = {} if self._sharing is None else self._sharing.info()
        return {**asdict(info), "num_bytes": info.history_bytes + info.table_bytes, **shared}

    def _handles(self, requests: np.ndarray) -> np.ndarray:
        return self._handle_of[requests]

    def _grow(self) -> None:
        old = self.num_requests
        self.num_requests = new = max(64, 2 * old)
        self._handle_of = _longer(self._handle_of, new, 0)
        self._num_known = _longer(self._num_known, new, 0)
        self._proposed_at = _longer(self._proposed_at, new, -1)
        self._lens = _longer(self._lens, new, 0)
        self._own_lens = _longer(self._own_lens, new, 0)
        self._starts = _longer(self._starts, new, 0)
        self._expected = _longer(self._expected, new, 0)
        self._free = list(range(new - 1, old - 1, -1))


def _longer(values: np.ndarray, size: int, fill: int) -> np.ndarray:
    return np.concatenate([values, np.full(size - values.size, fill, values.dtype)])
