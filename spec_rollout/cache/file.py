"""A whole cache as one file (format version 4, little-endian, no padding).

    header   magic 8s, version u32, num_groups u64, file size u64, pass i64 (-1: not known), CRC-32
             u32 of all before it
    group    key length u32, num_samples u32, key, CRC-32 u32 of all before it in the group's header
    entry    `entry.DESCRIPTION`, CRC-32C u32 (`entry.checksum_of`), token ids i32, then those that
             are present of: log-probs, trainer log-probs, behaviour log-probs f32, ages i16

Groups follow each other from the least to the most recently used, entries follow their group.
Versions 1 to 3 are read, too: an entry has its CRC-32 (`entry.crc32_of`) there. Version 1 has no
pass, and 1 and 2 have no behaviour log-probs and ages, so their rollouts count as drawn when they
were stored.
"""

from __future__ import annotations

import os
import struct
import zlib
from typing import BinaryIO, NamedTuple

from spec_rollout.cache.entry import (
    DESCRIPTION,
    Entry,
    arrays_present,
    checksum_of,
    crc32_of,
    describe,
)
from spec_rollout.cache.store import Groups
from spec_rollout.files import replacing
from spec_rollout.types import FinishReason

MAGIC = b"SPECROLL"
VERSION = 4
_PREAMBLE = struct.Struct("<8sI")
# By version.
_COUNTS = {1: struct.Struct("<QQ"), **dict.fromkeys((2, 3, 4), struct.Struct("<QQq"))}
_MOST_ARRAYS = {1: 3, 2: 3, 3: 15, 4: 15}
_CHECKSUMS = {1: crc32_of, 2: crc32_of, 3: crc32_of, 4: checksum_of}
_GROUP = struct.Struct("<II")
_CRC = struct.Struct("<I")
_HEADER_BYTES = _PREAMBLE.size + _COUNTS[VERSION].size + _CRC.size


class Contents(NamedTuple):
    """What a file holds.

    Attributes:
        groups: The entries of each prompt key, by sample id.
        pass_index: 0-based number of the pass that the rollouts are of, or None.
    """

    groups: dict[bytes, dict[int, Entry]]
    pass_index: int | None


def write(path: str | os.PathLike[str], groups: Groups, pass_index: int | None = None) -> None:
    """Writes beside `path`, flushes to the device, then renames.

    A crash leaves the old file or the new one, nothing between.

    Args:
        path: A link is followed.
        groups: From the least to the most recently used; read once, one group at a time.
        pass_index: Of the pass that the rollouts are of; None if that is not known.
    """
    with replacing(path, seekable=True) as out:
        _write_groups(out, groups, -1 if pass_index is None else pass_index)


def _write_groups(out: BinaryIO, groups: Groups, pass_index: int) -> None:
    out.write(bytes(_HEADER_BYTES))  # the header's place: how much follows is not known yet
    num_groups = 0
    for key, samples in groups:
        header = _GROUP.pack(len(key), len(samples)) + key
        out.write(header + _CRC.pack(zlib.crc32(header)))
        for sample_id, entry in samples.items():
            out.write(describe(sample_id, entry) + _CRC.pack(entry.checksum))
            out.writelines(entry.arrays)
        num_groups += 1
    counts = _COUNTS[VERSION].pack(num_groups, out.tell(), pass_index)
    header = _PREAMBLE.pack(MAGIC, VERSION) + counts
    out.seek(0)
    out.write(header + _CRC.pack(zlib.crc32(header)))


def read(path: str | os.PathLike[str]) -> Contents:
    """Reads a whole file.

    Raises:
        ValueError: naming the path, what was expected and the byte offset.
    """
    with open(path, "rb") as stream:
        return _Reader(path, stream).contents()


class _Reader:
    """Reads front to back, never more than the file has, whatever its length fields say."""

    def __init__(self, path: str | os.PathLike[str], stream: BinaryIO) -> None:
        self._path = os.fspath(path)
        self._stream = stream
        self._size = os.fstat(stream.fileno()).st_size
        self._offset = 0
        self._version = VERSION

    def contents(self) -> Contents:
        num_groups, pass_index = self._header()
        groups: dict[bytes, dict[int, Entry]] = {}
        for _ in range(num_groups):
            start = self._offset
            key, num_samples = self._group_header()
            if key in groups:
                raise self._error(start, "each prompt key once", f"{key.hex()} again")
            groups[key] = {}
            for _ in range(num_samples):
                start = self._offset
                sample_id, entry = self._entry(key)
                if sample_id in groups[key]:
                    raise self._error(start, "each sample id once per group", f"{sample_id} again")
                groups[key][sample_id] = entry
        if self._offset != self._size:
            raise self._error(self._offset, "the end", f"{self._size - self._offset} more bytes")
        return Contents(groups, pass_index)

    def _header(self) -> tuple[int, int | None]:
        preamble = self._take(_PREAMBLE.size, "a header")
        magic, version = _PREAMBLE.unpack(preamble)
        if magic != MAGIC:
            raise self._error(0, f"the magic {MAGIC!r} of a rollout cache", repr(magic))
        if version not in _COUNTS:
            raise self._error(len(MAGIC), f"format version 1 to {VERSION}", str(version))
        self._version = version
        counts = self._take(_COUNTS[version].size, "a header")
        self._check_crc(zlib.crc32(preamble + counts), self._take(_CRC.size, "a header"))
        num_groups, size, *passes = _COUNTS[version].unpack(counts)
        if size != self._size:
            short = "truncated" if self._size < size else "too long"
            raise self._error(
                min(size, self._size), f"{size} bytes in all", f"{self._size} ({short})"
            )
        pass_index = passes[0] if passes else -1
        if pass_index < -1:
            offset = _PREAMBLE.size + _COUNTS[1].size
            raise self._error(offset, "a pass from 0 on, or -1", str(pass_index))
        return num_groups, None if pass_index < 0 else pass_index

    def _group_header(self) -> tuple[bytes, int]:
        lens = self._take(_GROUP.size, "a group header")
        key_len, num_samples = _GROUP.unpack(lens)
        key = self._take(key_len, "a prompt key")
        self._check_crc(zlib.crc32(lens + key), self._take(_CRC.size, "a group header"))
        return key, num_samples

    def _entry(self, key: bytes) -> tuple[int, Entry]:
        start = self._offset
        description = self._take(DESCRIPTION.size, "an entry header")
        sample_id, policy_version, num_tokens, finish_reason, present = DESCRIPTION.unpack(
            description
        )
        (checksum,) = _CRC.unpack(self._take(_CRC.size, "an entry header"))
        most = _MOST_ARRAYS[self._version]
        try:
            has = arrays_present(present, most)
        except ValueError as error:
            offset = start + DESCRIPTION.size - 1
            raise self._error(offset, f"arrays 0 to {most}", str(present)) from error
        token_ids = self._take(4 * num_tokens, "token ids")
        logprobs = self._take(4 * num_tokens, "log-probs") if has.logprobs else None
        trainer = self._take(4 * num_tokens, "trainer log-probs") if has.trainer_logprobs else None
        behaviour = (
            self._take(4 * num_tokens, "behaviour log-probs") if has.behaviour_logprobs else None
        )
        ages = self._take(2 * num_tokens, "ages") if has.ages else None
        entry = Entry(
            token_ids, logprobs, trainer, finish_reason, policy_version, checksum, behaviour, ages
        )
        computed = _CHECKSUMS[self._version](key, sample_id, entry)
        self._check_crc(computed, _CRC.pack(checksum), start)
        if (
            sample_id < 0
            or num_tokens < 1
            or finish_reason not in (FinishReason.STOP, FinishReason.LENGTH)
        ):
            got = f"sample {sample_id}, {num_tokens} tokens, finish reason {finish_reason}"
            raise self._error(start, "a finished rollout", got)
        if self._version < 4:
            entry = entry._replace(checksum=checksum_of(key, sample_id, entry))
        return sample_id, entry

    def _take(self, num_bytes: int, what: str) -> bytes:
        if num_bytes > self._size - self._offset:
            left = self._size - self._offset
            raise self._error(self._offset, f"{what} of {num_bytes} bytes", f"{left} (truncated)")
        data = self._stream.read(num_bytes)
        if len(data) != num_bytes:  # the file shrank while it was read
            got = f"{len(data)} (truncated)"
            raise self._error(self._offset, f"{what} of {num_bytes} bytes", got)
        self._offset += num_bytes
        return data

    def _check_crc(self, computed: int, stored: bytes, start: int | None = None) -> None:
        (expected,) = _CRC.unpack(stored)
        if computed != expected:
            offset = self._offset - _CRC.size if start is None else start
            raise self._error(offset, f"checksum {expected:08x}", f"{computed:08x}")

    def _error(self, offset: int, expected: str, got: str) -> ValueError:
        return ValueError(f"{self._path}: expected {expected} at byte {offset}, got {got}")
