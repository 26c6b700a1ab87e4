"""What travels between a store made of parts and its parts: bytes and arrays of numbers.

Prompt keys lie end to end, with a length for each and the number of rows that it stands for. Of
each entry there is a row of a disk store's record (`disk_records.row_of`), which says where in one
flat array of bytes its own arrays are. So whoever receives it takes entries apart without a copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TypeAlias

import numpy as np

from spec_rollout.cache.disk_records import ROW, entry_of, row_bytes, row_of
from spec_rollout.cache.entry import Entry

Keys: TypeAlias = tuple[bytes, np.ndarray, np.ndarray]
"""Keys end to end, their lengths [num_keys] int64, the number of rows of each [num_keys] int64."""

Entries: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Rows of records [num_rows, 11] int64, and the bytes they point to [num_bytes] uint8."""

_SAMPLE = 0
_ABSENT = [-1] * ROW.shape[0]  # a row without an entry: no sample id is negative


def packed_keys(prompt_keys: Iterable[bytes]) -> Keys:
    """The key of each row; rows of a prompt mostly follow each other."""
    runs = [(key, sum(1 for _ in rows)) for key, rows in groupby(prompt_keys)]
    lens = np.array([len(key) for key, _ in runs], np.int64)
    return b"".join(key for key, _ in runs), lens, np.array([n for _, n in runs], np.int64)


def unpacked_runs(keys: Keys) -> Iterator[tuple[bytes, int]]:
    """(key, number of rows that it stands for), in the order of the rows."""
    data, lens, num_rows = keys
    end = 0
    for length, rows in zip(lens.tolist(), num_rows.tolist(), strict=True):
        start, end = end, end + length
        yield data[start:end], rows


def unpacked_keys(keys: Keys) -> list[bytes]:
    """What `packed_keys` was given."""
    return [key for key, num_rows in unpacked_runs(keys) for _ in range(num_rows)]


def packed_entries(sample_ids: Iterable[int], entries: Iterable[Entry | None]) -> Entries:
    """Entries with one copy of their arrays, which may be borrowed ones."""
    rows: list[list[int]] = []
    arrays: list[bytes] = []
    size = 0
    for sample_id, entry in zip(sample_ids, entries, strict=True):
        if entry is None:
            rows.append(_ABSENT)
            continue
        row = row_of(sample_id, entry, 0, size)
        rows.append(row)
        arrays += entry.arrays
        size += row_bytes(row)
    flat = np.empty(size, np.uint8)
    view, end = flat.data, 0
    for array in arrays:
        start, end = end, end + len(array)
        view[start:end] = array
    return np.array(rows, np.int64).reshape(-1, *ROW.shape), flat


def unpacked_entries(packed: Entries, *, borrowed: bool) -> list[Entry | None]:
    """The entry of each row, None where there is none.

    Args:
        borrowed: Their arrays are views of what was packed, not copies.
    """
    rows, flat = packed
    return [
        None if row[_SAMPLE] < 0 else entry_of(row, flat.data, borrowed=borrowed)
        for row in rows.tolist()
    ]


def packed_groups(groups: Sequence[tuple[bytes, Mapping[int, Entry]]]) -> tuple[Keys, Entries]:
    """Groups, none of them empty; a key may come more than once."""
    lens = np.array([len(key) for key, _ in groups], np.int64)
    num_rows = np.array([len(samples) for _, samples in groups], np.int64)
    sample_ids = [sample_id for _, samples in groups for sample_id in samples]
    entries = [entry for _, samples in groups for entry in samples.values()]
    keys = b"".join(key for key, _ in groups), lens, num_rows
    return keys, packed_entries(sample_ids, entries)


def unpacked_groups(
    keys: Keys, packed: Entries, *, borrowed: bool
) -> Iterator[tuple[bytes, dict[int, Entry]]]:
    """What `packed_groups` was given, one group at a time.

    Args:
        borrowed: As in `unpacked_entries`.
    """
    rows, flat = packed
    end = 0
    for key, num_rows in unpacked_runs(keys):
        start, end = end, end + num_rows
        yield (
            key,
            {
                row[_SAMPLE]: entry_of(row, flat.data, borrowed=borrowed)
                for row in rows[start:end].tolist()
            },
        )
