"""A part of a store that is made of parts: some of the keys, in a store of its own."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np

from spec_rollout.cache.entry import Entry, group_bytes
from spec_rollout.cache.memory import MemoryStore
from spec_rollout.cache.messages import (
    Entries,
    Keys,
    packed_entries,
    packed_groups,
    unpacked_entries,
    unpacked_groups,
    unpacked_keys,
)
from spec_rollout.cache.store import Store, StoreError

Page: TypeAlias = tuple[Keys, Entries, int, bool]
"""Groups of a reading, how many have been read with them, and whether they are the last ones."""

# Of what is read page by page.
_PAGE_BYTES = 16 << 20
# Readings and replacements under way. Who began one and died leaves it: the oldest of too many is
# given up, and what nobody has asked for in a while. A reading of a disk store holds its snapshot,
# so that meanwhile no room of replaced rollouts is used again.
_MOST_UNDER_WAY = 8
_MOST_SECONDS = 600.0


class _Reading:
    """A snapshot that is read page by page.

    The last page is kept: who asks for a page again, because the answer got lost, is to be given
    the same.
    """

    def __init__(self, groups: Iterator[tuple[bytes, Mapping[int, Entry]]]) -> None:
        self._groups = groups
        self._num_read = 0
        self._number = -1  # of the last page
        self._page: Page | None = None

    def page(self, number: int) -> Page:
        if number == self._number + 1:
            self._page, self._number = self._next_page(), number
        if number != self._number or self._page is None:
            raise StoreError(f"expected page {self._number} or the next, got {number}")
        return self._page

    def _next_page(self) -> Page:
        page: list[tuple[bytes, Mapping[int, Entry]]] = []
        room = _PAGE_BYTES
        while room > 0 and (group := next(self._groups, None)) is not None:
            page.append(group)
            room -= group_bytes(group[1])
        self._num_read += len(page)
        return *packed_groups(page), self._num_read, room > 0


class Part:
    """Answers for the keys that fall to it. One call at a time, as an actor is called.

    A call of a `PartedStore` is at most one call here, but for those that read or replace
    everything: their pieces are held together by a token that the caller makes up.

    Args:
        open_store: Gives what holds them; asked by the first call, and again if that failed.
        clock: Gives seconds.
    """

    def __init__(
        self, open_store: Callable[[], Store], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._open_store = open_store
        self._clock = clock
        self._asked: dict[str, float] = {}  # when a reading or replacement was last asked for
        self._store: Store | None = None
        self._readings: OrderedDict[str, _Reading] = OrderedDict()
        self._staged: OrderedDict[str, list[tuple[bytes, dict[int, Entry]]]] = OrderedDict()

    def size(self) -> tuple[int, int, int]:
        """See `Store.size`."""
        size = self._held.size()
        return size.num_groups, size.num_samples, size.num_bytes

    def get(self, keys: Keys, sample_ids: np.ndarray) -> Entries:
        """See `Store.get_many`.

        Args:
            keys: Of each row.
            sample_ids: [num_rows], int64.
        """
        ids: list[int] = sample_ids.tolist()
        with self._held.borrow_many(unpacked_keys(keys), ids) as entries:
            return packed_entries(ids, entries)

    def put(self, keys: Keys, entries: Entries, max_bytes: int | None) -> int:
        """See `Store.put_many`."""
        self._give_up()
        # Memory keeps what it is handed; other stores copy what they keep.
        borrowed = not isinstance(self._held, MemoryStore)
        return self._held.put_many(unpacked_groups(keys, entries, borrowed=borrowed), max_bytes)

    def drop(self, keys: Keys, sample_ids: np.ndarray, entries: Entries) -> int:
        """See `Store.drop_many`."""
        found = unpacked_entries(entries, borrowed=True)
        given = [entry for entry in found if entry is not None]
        return self._held.drop_many(unpacked_keys(keys), sample_ids.tolist(), given)

    def evict(self, max_bytes: int) -> int:
        """See `Store.evict`."""
        return self._held.evict(max_bytes)

    def stage(self, token: str, keys: Keys, entries: Entries) -> None:
        """Holds groups for `commit`; nobody else sees them."""
        staged = self._staged.setdefault(token, [])
        # Copies: what was sent is not to stay in shared memory meanwhile.
        staged += unpacked_groups(keys, entries, borrowed=False)
        self._asked[token] = self._clock()
        self._give_up()

    def commit(self, token: str, num_groups: int, max_bytes: int | None) -> int:
        """Replaces everything by what was staged; see `Store.replace_all`.

        Args:
            num_groups: That were staged.
        """
        staged = self._staged.pop(token, [])
        if len(staged) != num_groups:
            raise StoreError(
                f"expected {num_groups} groups to replace what is held, got {len(staged)}: they "
                "were given up (the part was started again meanwhile, others replaced it, or "
                f"nothing was asked for in {_MOST_SECONDS:g} seconds)"
            )
        return self._held.replace_all(staged, max_bytes)

    def discard(self, token: str) -> None:
        """Forgets what was staged."""
        self._staged.pop(token, None)

    def begin(self, token: str) -> tuple[int, Page]:
        """A snapshot to be read; see `Store.iterate`.

        Returns:
            The number of its groups, and the first page.
        """
        num_groups = self._held.size().num_groups
        self._readings[token] = _Reading(self._held.iterate())
        self._asked[token] = self._clock()
        self._give_up()
        page = self.page(token, 0)
        if page[-1]:  # whose answer got lost begins again
            self.end(token)
        return num_groups, page

    def page(self, token: str, number: int) -> Page:
        """A page of a snapshot: the next one, or the last one again."""
        reading = self._readings.get(token)
        if reading is None:
            raise StoreError(
                "expected a reading that is under way, got one that was given up (the part was "
                f"started again meanwhile, more than {_MOST_UNDER_WAY} others were begun, or "
                f"nothing was asked for in {_MOST_SECONDS:g} seconds)"
            )
        self._asked[token] = self._clock()
        return reading.page(number)

    def end(self, token: str) -> None:
        """A snapshot is of no more use."""
        self._readings.pop(token, None)

    @property
    def _held(self) -> Store:
        if self._store is None:
            self._store = self._open_store()
        return self._store

    def _give_up(self) -> None:
        """What was begun and left."""
        now = self._clock()
        kinds: tuple[OrderedDict[str, Any], ...] = (self._readings, self._staged)
        for under_way in kinds:
            while len(under_way) > _MOST_UNDER_WAY:
                under_way.popitem(last=False)
            for token in list(under_way):
                if now - self._asked[token] > _MOST_SECONDS:
                    del under_way[token]
        known = self._readings.keys() | self._staged.keys()
        self._asked = {token: at for token, at in self._asked.items() if token in known}
