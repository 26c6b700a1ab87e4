"""A store made of parts, each with keys of its own, wherever they are."""

from __future__ import annotations

import heapq
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from itertools import groupby
from operator import itemgetter
from typing import Any, TypeAlias

import numpy as np

from spec_rollout.cache.entry import Entry, group_bytes
from spec_rollout.cache.messages import (
    packed_entries,
    packed_groups,
    packed_keys,
    unpacked_entries,
    unpacked_groups,
)
from spec_rollout.cache.part import Page
from spec_rollout.cache.store import Groups, StoreError, StoreSize

Call: TypeAlias = tuple[Any, ...]
"""Name of a method of `Part`, and its arguments."""

_Group: TypeAlias = tuple[bytes, Mapping[int, Entry]]

# What is put is sent in pieces of so many bytes: a step of the published size is one.
_PIECE_BYTES = 256 << 20


def part_of(prompt_key: bytes, num_parts: int) -> int:
    """Which part has a key; the same in every process, version and on every machine."""
    digest = blake2b(prompt_key, digest_size=8).digest()
    return int.from_bytes(digest, "little") % num_parts


class PartedStore(ABC):
    """`Store` of parts that are asked all at once; see there what may be per part.

    Each keeps the order of use of its own keys, and bounds itself to its share of a bound: all
    parts have the same. `iterate` gives the groups of the parts in turn, each in its order, so that
    the first ones are about the least recently used of all.

    Each call is one call per part that it concerns; `replace_all` and `iterate` take some. What a
    call changes is one transaction per part: where one part fails, the others may have done it.

    Args:
        num_parts: At least 1. What falls to which part depends on it.
    """

    def __init__(self, num_parts: int) -> None:
        self.num_parts = num_parts

    @abstractmethod
    def _ask(self, calls: Mapping[int, Call]) -> dict[int, Any]:
        """What each part answers; all are asked at once, and every answer is waited for.

        Raises:
            StoreError: of the first part that failed.
        """

    @abstractmethod
    def _tell(self, calls: Mapping[int, Call]) -> None:
        """`_ask`, where nobody waits for an answer or wants to know of a failure."""

    def _ask_all(self, *call: Any) -> dict[int, Any]:
        return self._ask(dict.fromkeys(range(self.num_parts), call))

    def size(self) -> StoreSize:
        """See `Store.size`."""
        sizes = self._ask_all("size").values()
        return StoreSize(*(sum(values) for values in zip(*sizes, strict=True)))

    def get_many(
        self, prompt_keys: Sequence[bytes], sample_ids: Sequence[int]
    ) -> list[Entry | None]:
        """See `Store.get_many`."""
        return self._entries(prompt_keys, sample_ids, borrowed=False)

    @contextmanager
    def borrow_many(
        self, prompt_keys: Sequence[bytes], sample_ids: Sequence[int]
    ) -> Iterator[list[Entry | None]]:
        """See `Store.borrow_many`: the arrays are views of the answers."""
        yield self._entries(prompt_keys, sample_ids, borrowed=True)

    def put_many(self, groups: Groups, max_bytes: int | None = None) -> int:
        """See `Store.put_many`. Sent in pieces if it is large."""
        share = self._share(max_bytes)
        evicted = 0
        for piece in self._pieces(groups):
            calls = {part: ("put", *packed_groups(held), share) for part, held in piece.items()}
            evicted += sum(self._ask(calls).values())
        return evicted

    def drop_many(
        self, prompt_keys: Sequence[bytes], sample_ids: Sequence[int], entries: Sequence[Entry]
    ) -> int:
        """See `Store.drop_many`."""
        calls: dict[int, Call] = {}
        for part, rows in self._rows_by_part(prompt_keys).items():
            ids = [sample_ids[row] for row in rows]
            keys = packed_keys(prompt_keys[row] for row in rows)
            packed = packed_entries(ids, (entries[row] for row in rows))
            calls[part] = ("drop", keys, np.array(ids, np.int64), packed)
        return sum(self._ask(calls).values())

    def evict(self, max_bytes: int) -> int:
        """See `Store.evict`: every part to its share."""
        return sum(self._ask_all("evict", self._share(max_bytes)).values())

    def replace_all(self, groups: Groups, max_bytes: int | None = None) -> int:
        """See `Store.replace_all`.

        No part changes before all of them have all of their groups, which each holds in memory up
        to then. Each then changes in a transaction of its own: others may see the old content of
        one and the new of another for a moment, and if one fails by then, the others have changed.
        """
        share, token = self._share(max_bytes), uuid.uuid4().hex
        counts = dict.fromkeys(range(self.num_parts), 0)
        try:
            for piece in self._pieces(groups):
                self._ask(
                    {part: ("stage", token, *packed_groups(held)) for part, held in piece.items()}
                )
                for part, held in piece.items():
                    counts[part] += len(held)
        except BaseException:
            self._tell(dict.fromkeys(counts, ("discard", token)))
            raise
        calls = {part: ("commit", token, count, share) for part, count in counts.items()}
        return sum(self._ask(calls).values())

    def iterate(self) -> Iterator[tuple[bytes, Mapping[int, Entry]]]:
        """See `Store.iterate`: one moment for each part, read in pages."""
        token = uuid.uuid4().hex
        begun = self._ask_all("begin", token)
        readings = [
            self._reading(part, token, num_groups, page)
            for part, (num_groups, page) in begun.items()
        ]
        return (group for _, group in heapq.merge(*readings, key=itemgetter(0)))

    def _reading(
        self, part: int, token: str, num_groups: int, page: Page
    ) -> Iterator[tuple[float, _Group]]:
        """The groups of a part, each with its place in that part's order, from 0 to 1."""
        num_read = number = 0
        keys, entries, num_given, is_last = page
        try:
            while True:
                for group in unpacked_groups(keys, entries, borrowed=False):
                    num_read += 1
                    yield num_read / max(num_groups, 1), group
                # Not `num_groups`: of these a store may leave out what is damaged.
                if num_read != num_given:
                    raise StoreError(
                        f"expected {num_given} groups of part {part} so far, got {num_read}"
                    )
                if is_last:
                    return
                number += 1
                keys, entries, num_given, is_last = self._ask({part: ("page", token, number)})[part]
        finally:
            if number or not is_last:
                self._tell({part: ("end", token)})

    def _entries(
        self, prompt_keys: Sequence[bytes], sample_ids: Sequence[int], *, borrowed: bool
    ) -> list[Entry | None]:
        ids = np.array(sample_ids, np.int64)
        parts = self._rows_by_part(prompt_keys)
        answers = self._ask(
            {
                part: ("get", packed_keys(prompt_keys[row] for row in rows), ids[rows])
                for part, rows in parts.items()
            }
        )
        found: list[Entry | None] = [None] * len(prompt_keys)
        for part, rows in parts.items():
            entries = unpacked_entries(answers[part], borrowed=borrowed)
            for row, entry in zip(rows, entries, strict=True):
                found[row] = entry
        return found

    def _rows_by_part(self, prompt_keys: Sequence[bytes]) -> dict[int, list[int]]:
        """Which rows are of each part that has any."""
        rows_of: dict[int, list[int]] = {}
        end = 0
        for key, rows in groupby(prompt_keys):  # rows of a prompt mostly follow each other
            start, end = end, end + sum(1 for _ in rows)
            rows_of.setdefault(part_of(key, self.num_parts), []).extend(range(start, end))
        return rows_of

    def _pieces(self, groups: Groups) -> Iterator[dict[int, list[_Group]]]:
        """The groups of each part that has any, some bytes at a time; none of them is empty."""
        piece: dict[int, list[_Group]] = {}
        room = _PIECE_BYTES
        for key, samples in groups:
            if not samples:
                continue
            piece.setdefault(part_of(key, self.num_parts), []).append((key, samples))
            room -= group_bytes(samples)
            if room <= 0:
                yield piece
                piece, room = {}, _PIECE_BYTES
        if piece:
            yield piece

    def _share(self, max_bytes: int | None) -> int | None:
        return None if max_bytes is None else max_bytes // self.num_parts
