"""Records of a disk store: what is known of a group, and the counters of the whole store.

A group record says where the arrays of each sample are: in which segment, from which byte, and how
long. A segment is the arrays of samples that were put together, end to end, in the order of
`Entry.arrays`. Every record begins with the CRC-32 of the rest; entries bring their own.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from spec_rollout.cache.entry import (
    ENTRY_OVERHEAD_BYTES,
    GROUP_OVERHEAD_BYTES,
    UNREADABLE,
    Entry,
    owned,
)

_CRC = struct.Struct("<I")
_GROUP = struct.Struct("<QII")  # use, length of the key, number of samples
_COUNTERS = struct.Struct("<QQQQQQQ")
_NUMBER = struct.Struct(">Q")  # keys that sort as numbers do
# sample id, policy version, checksum, finish reason, segment, offset, five lengths (-1: absent)
ROW = np.dtype(("<i8", (11,)))
_SAMPLE, _POLICY, _CHECKSUM, _FINISH, SEGMENT, _OFFSET, _LENS = range(7)
# Longer keys are found by their hash; LMDB's own are at most 511 bytes.
_LONGEST_KEY = 64

Row = list[int]
"""What is known of a sample, in the order of the record."""


class DamagedRecord(ValueError):
    """A record that cannot be taken apart."""


class Counters(NamedTuple):
    """Of a whole store.

    `next_segment` and `next_use` only grow. `mark` is the newest mark, 0 without one, and
    `mark_segment` the first segment that was put after it.
    """

    num_groups: int = 0
    num_samples: int = 0
    num_bytes: int = 0
    next_use: int = 0
    next_segment: int = 0
    mark: int = 0
    mark_segment: int = 0

    def to_bytes(self) -> bytes:
        return sealed(_COUNTERS.pack(*self))

    @classmethod
    def from_bytes(cls, record: bytes | memoryview) -> Counters:
        body = opened(record)
        if len(body) != _COUNTERS.size:
            raise DamagedRecord(f"expected counters of {_COUNTERS.size} bytes, got {len(body)}")
        return cls(*_COUNTERS.unpack(body))


class Group:
    """The samples of a prompt key."""

    __slots__ = ("key", "rows", "use")

    def __init__(self, key: bytes, use: int = 0, rows: Iterable[Row] = ()) -> None:
        self.key = key
        self.use = use
        self.rows: dict[int, Row] = {row[_SAMPLE]: row for row in rows}

    @property
    def num_bytes(self) -> int:
        """As `entry.group_bytes` counts."""
        return GROUP_OVERHEAD_BYTES + sum(
            ENTRY_OVERHEAD_BYTES + row_bytes(row) for row in self.rows.values()
        )

    @property
    def segments(self) -> set[int]:
        return {row[SEGMENT] for row in self.rows.values()}

    def to_bytes(self) -> bytes:
        rows = np.array(list(self.rows.values()), "<i8").tobytes()
        return sealed(_GROUP.pack(self.use, len(self.key), len(self.rows)) + self.key + rows)

    @classmethod
    def from_bytes(cls, record: bytes | memoryview) -> Group:
        body = opened(record)
        if len(body) < _GROUP.size:
            raise DamagedRecord(f"expected a group, got {len(body)} bytes")
        use, key_len, num_samples = _GROUP.unpack_from(body)
        size = _GROUP.size + key_len + num_samples * ROW.itemsize
        if len(body) != size:
            raise DamagedRecord(f"expected a group of {size} bytes, got {len(body)}")
        start = _GROUP.size + key_len
        rows = np.frombuffer(body[start:], "<i8").reshape(-1, *ROW.shape).tolist()
        return cls(bytes(body[_GROUP.size : start]), use, rows)


def sealed(body: bytes) -> bytes:
    """A record with its checksum."""
    return _CRC.pack(zlib.crc32(body)) + body


def opened(record: bytes | memoryview) -> memoryview:
    """What `sealed` was given; DamagedRecord if that is not what is there."""
    view = memoryview(record)
    if len(view) < _CRC.size or _CRC.unpack_from(view)[0] != zlib.crc32(view[_CRC.size :]):
        raise DamagedRecord(f"expected the checksum of {len(view)} bytes, got another")
    return view[_CRC.size :]


def index_key(prompt_key: bytes) -> bytes:
    """What a group is found by."""
    if len(prompt_key) <= _LONGEST_KEY:
        return b"k" + prompt_key
    return b"h" + blake2b(prompt_key, digest_size=32).digest()


def number(value: int) -> bytes:
    """A key that sorts as the number does."""
    return _NUMBER.pack(value)


def number_of(key: bytes | memoryview) -> int:
    """What `number` was given, of a key that begins with it."""
    return int(_NUMBER.unpack_from(key)[0])


def row_bytes(row: Row) -> int:
    """Bytes of a sample's arrays."""
    return sum(length for length in row[_LENS:] if length > 0)


def row_of(sample_id: int, entry: Entry, segment: int, offset: int) -> Row:
    """Where an entry's arrays will be."""
    lens = [-1 if array is None else len(array) for array in _arrays(entry)]
    return [
        *(sample_id, entry.policy_version, entry.checksum, entry.finish_reason, segment, offset),
        *lens,
    ]


def moved(row: Row, segment: int, offset: int) -> Row:
    """The same sample in another place."""
    return [*row[:SEGMENT], segment, offset, *row[_LENS:]]


def slice_of(row: Row, segment: memoryview | None) -> memoryview | None:
    """The arrays of a sample; None if the segment is not there, or too short."""
    start, size = row[_OFFSET], row_bytes(row)
    if segment is None or start < 0 or start + size > len(segment):
        return None
    return segment[start : start + size]


def entry_of(row: Row, segment: memoryview | None, *, borrowed: bool) -> Entry:
    """The entry of a row.

    Args:
        segment: Where its arrays are; None gives `UNREADABLE`, as anything does that does not fit.
        borrowed: The arrays are views of the segment, not copies.
    """
    _, policy_version, checksum, finish_reason, _, start, *_ = row
    size, logprobs_size, trainer_size, behaviour_size, ages_size = row[_LENS:]
    if segment is None or start < 0 or size < 0:
        return UNREADABLE
    # Written out: a step looks up thousands of rows.
    end = start + size
    token_ids = segment[start:end]
    logprobs = None if logprobs_size < 0 else segment[end : (end := end + logprobs_size)]
    trainer = None if trainer_size < 0 else segment[end : (end := end + trainer_size)]
    behaviour = None if behaviour_size < 0 else segment[end : (end := end + behaviour_size)]
    ages = None if ages_size < 0 else segment[end : (end := end + ages_size)]
    if end > len(segment):
        return UNREADABLE
    entry = Entry._make(  # of memoryviews in place of bytes
        (token_ids, logprobs, trainer, finish_reason, policy_version, checksum, behaviour, ages)
    )
    return entry if borrowed else owned(entry)


def _arrays(entry: Entry) -> tuple[bytes | None, ...]:
    """All arrays, in the order of `Entry.arrays`."""
    return (
        *(entry.token_ids, entry.logprobs, entry.trainer_logprobs),
        *(entry.behaviour_logprobs, entry.ages),
    )
