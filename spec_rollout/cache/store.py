"""What holds the cached rollouts: the promise behind `RolloutCache`.

`RolloutCache` decides what is kept and what is a usable draft. A store only holds it: in memory, in
a file that several processes share, or in actors that each hold a part of the keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol, TypeAlias

from spec_rollout.cache.entry import Entry

Groups: TypeAlias = Iterable[tuple[bytes, Mapping[int, Entry]]]
"""(prompt key, entry of each sample id), one after another."""


class StoreError(OSError):
    """A store that is not in memory cannot be used; the message names it and says why."""


class StoreSize(NamedTuple):
    """What a store holds at one moment."""

    num_groups: int
    num_samples: int
    num_bytes: int  # the sum of `entry.group_bytes` over all groups


class Store(Protocol):
    """Groups of entries, in order of use and bounded by bytes.

    A *group* is the entries of one prompt key by sample id. A key is non-empty bytes of any length,
    a sample id is 0 <= id < 2**63. A group without entries does not exist.

    Order of use: `get_many` and `put_many` *use* the group of each key, in the order of their rows,
    and make it the most recently used one; a `get_many` that does not find the sample uses the
    group all the same. Nothing else changes the order. It is one order for all threads and
    processes that share the store, and a store that outlives its process keeps it. A store made of
    parts, each with keys of its own, may keep an order and a share of the bound per part, and
    change one part after the other.

    Bytes: what an entry or a group counts is `entry.group_bytes`, on every medium, so that a bound
    keeps the same groups everywhere. A medium's own rounding comes on top.

    Corruption: a store gives back what it holds and checks nothing; it may be handed entries whose
    checksum is wrong. `RolloutCache` compares checksums, treats an entry with a wrong one as not
    found, and drops it. A record that a store cannot even take apart is given back as
    `entry.UNREADABLE`, which no checksum fits, and goes the same way.

    Every method may be called from any thread, and from any process that shares the store. A change
    of one group is seen whole or not at all, by others and after a crash. Entries are immutable:
    a store may keep those it was handed, and callers those they were given.

    All calls take a whole batch: a step looks up thousands of rows, and a store that is not in this
    process answers them in one round trip (one per part).
    """

    def size(self) -> StoreSize:
        """What is held. Changes nothing."""
        ...

    def get_many(
        self, prompt_keys: Sequence[bytes], sample_ids: Sequence[int]
    ) -> list[Entry | None]:
        """The entry of each (prompt key, sample id), None where there is none.

        Changes the order of use and nothing else.

        Args:
            prompt_keys: Length batch.
            sample_ids: Length batch.
        """
        ...

    def borrow_many(
        self, prompt_keys: Sequence[bytes], sample_ids: Sequence[int]
    ) -> AbstractContextManager[list[Entry | None]]:
        """`get_many`, whose entries are valid until the block ends: they need not be copies.

        Their arrays may be read-only memoryviews instead of bytes. The block must not change the
        store.
        """
        ...

    def put_many(self, groups: Groups, max_bytes: int | None = None) -> int:
        """Puts entries into their groups, group after group.

        Each entry replaces the one under its key and sample id; other samples of the group stay.
        After each group the bound is restored: a group that is over it by itself is dropped whole
        (with the samples it had before) and no other goes; otherwise the least recently used groups
        go. Both happen in the transaction that puts the group, so that no one sees a store over the
        bound.

        Args:
            groups: Read once, one group at a time, so that a caller may make entries as they are
                asked for; it must not call the store. A group without entries changes nothing.
                If reading fails, any number of the groups read before it may have been put.
            max_bytes: Bound on `size().num_bytes`; None is no bound.

        Returns:
            Number of groups dropped for space.
        """
        ...

    def drop_many(
        self, prompt_keys: Sequence[bytes], sample_ids: Sequence[int], entries: Sequence[Entry]
    ) -> int:
        """Removes each entry that is still the given one.

        What was put in its place meanwhile stays. The group goes with its last entry.

        Args:
            prompt_keys: Length batch.
            sample_ids: Length batch.
            entries: What was found there. Length batch.

        Returns:
            Number of entries removed. Of rows that name the same entry one counts.
        """
        ...

    def evict(self, max_bytes: int) -> int:
        """Removes the least recently used groups until `size().num_bytes <= max_bytes`.

        Returns:
            Number of groups removed.
        """
        ...

    def replace_all(self, groups: Groups, max_bytes: int | None = None) -> int:
        """Holds nothing but `groups` from now on, as if put into an empty store.

        One transaction: others see the old content or the new one, and if reading `groups` fails,
        the old one stays.

        Args:
            groups: As in `put_many`. The last one is then the most recently used.
            max_bytes: As in `put_many`.

        Returns:
            Number of groups dropped for space.
        """
        ...

    def iterate(self) -> Iterator[tuple[bytes, Mapping[int, Entry]]]:
        """Every group, from the least to the most recently used; samples in no particular order.

        A snapshot of one moment: what is changed while it is read does not show in it. Changes
        nothing, the order of use included.
        """
        ...
