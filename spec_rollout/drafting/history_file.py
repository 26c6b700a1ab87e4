"""A drafter's history as bytes (format version 2, little-endian, no padding).

    header    magic 8s, version u32, CRC-32 u32 of all after the header, size u64 of that,
              num_rows u64, num_tokens u64
    keys      of each row's group, num_rows times 16 bytes
    tags      num_rows i64
    lens      num_rows u32
    tokens    num_tokens i32
    logprobs  num_tokens f32

Rows of the least recently used group come first, of a group the oldest. Version 1 had only the
upper halves of log-probs; it is read, too.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spec_rollout.files import replacing

MAGIC = b"SPECHIST"
VERSION = 2
_HEADER = struct.Struct("<8sIIQQQ")
HEADER_BYTES = _HEADER.size
_ROW_BYTES = 16 + 8 + 4
_TOKEN_BYTES = {1: 4 + 2, 2: 4 + 4}  # by version
NO_TAG = -(2**63)  # of a row without
MAX_ROW_TOKENS = 2**20 - 2  # of a suffix index (csrc/drafting/suffix_index.h)


@dataclass(frozen=True, slots=True)
class KeptRows:
    """Rollouts of some groups.

    Attributes:
        keys: Of each row's group. [rows, 2], int64.
        tags: [rows], int64.
        cu_lens: [rows + 1], int64.
        token_ids: [num_tokens], int32.
        logprobs: NaN where not known. [num_tokens], float32.
    """

    keys: np.ndarray
    tags: np.ndarray
    cu_lens: np.ndarray
    token_ids: np.ndarray
    logprobs: np.ndarray

    @classmethod
    def of(cls, groups: Sequence[tuple[bytes, Sequence[tuple[int, bytes, bytes]]]]) -> KeptRows:
        """From the extension: per group its key, and of each row tag, tokens and log-probs."""
        rows = [(key, *row) for key, group in groups for row in group]
        lens = np.array([len(tokens) // 4 for _, _, tokens, _ in rows], np.int64)
        return cls(
            np.frombuffer(b"".join(row[0] for row in rows), np.int64).reshape(-1, 2),
            np.array([row[1] for row in rows], np.int64),
            np.concatenate([[0], np.cumsum(lens)]).astype(np.int64),
            np.frombuffer(b"".join(row[2] for row in rows), np.int32),
            np.frombuffer(b"".join(row[3] for row in rows), np.float32),
        )


def _widened(halves: memoryview) -> np.ndarray:
    """Upper halves of float32 as float32."""
    return (np.frombuffer(halves, "<u2").astype(np.uint32) << 16).view(np.float32)


def packed(rows: KeptRows) -> bytes:
    """All of it."""
    body = b"".join(
        (
            rows.keys.astype("<i8").tobytes(),
            rows.tags.astype("<i8").tobytes(),
            np.diff(rows.cu_lens).astype("<u4").tobytes(),
            rows.token_ids.astype("<i4").tobytes(),
            rows.logprobs.astype("<f4").tobytes(),
        )
    )
    head = _HEADER.pack(
        MAGIC, VERSION, zlib.crc32(body), len(body), rows.tags.size, rows.token_ids.size
    )
    return head + body


def unpacked(data: bytes) -> KeptRows:
    """Checks and takes apart.

    Raises:
        ValueError: saying what was expected.
    """
    if len(data) < _HEADER.size:
        raise ValueError(f"history: expected at least {_HEADER.size} bytes, got {len(data)}")
    magic, version, checksum, size, num_rows, num_tokens = _HEADER.unpack_from(data)
    if magic != MAGIC or version not in _TOKEN_BYTES:
        raise ValueError(
            f"history: expected {MAGIC!r} version 1 or {VERSION}, got {magic!r} version {version}"
        )
    # Sizes are believed only once they agree with what is there.
    found = len(data) - _HEADER.size
    if size != found or size != _body_bytes(version, num_rows, num_tokens):
        raise ValueError(
            f"history: expected {size} bytes of {num_rows} rows and {num_tokens} tokens after the "
            f"header, got {found}"
        )
    body = memoryview(data)[_HEADER.size :]
    if zlib.crc32(body) != checksum:
        raise ValueError(f"history: expected checksum {checksum}, got {zlib.crc32(body)}")
    logprob_bytes = (_TOKEN_BYTES[version] - 4) * num_tokens
    ends = np.cumsum([16 * num_rows, 8 * num_rows, 4 * num_rows, 4 * num_tokens, logprob_bytes])
    keys, tags, lens, tokens, logprobs = (
        body[begin:end] for begin, end in zip([0, *ends[:-1]], ends, strict=True)
    )
    row_lens = np.frombuffer(lens, "<u4").astype(np.int64)
    token_ids = np.frombuffer(tokens, "<i4").astype(np.int32)
    if int(row_lens.sum()) != num_tokens or (row_lens > MAX_ROW_TOKENS).any():
        raise ValueError(
            f"history: expected rows of at most {MAX_ROW_TOKENS} tokens, {num_tokens} in all, got "
            f"{int(row_lens.sum())} and one of {int(row_lens.max(initial=0))}"
        )
    if (token_ids < 0).any():
        raise ValueError(f"history: expected token ids >= 0, got {int(token_ids.min())}")
    return KeptRows(
        np.frombuffer(keys, "<i8").astype(np.int64).reshape(-1, 2),
        np.frombuffer(tags, "<i8").astype(np.int64),
        np.concatenate([[0], np.cumsum(row_lens)]).astype(np.int64),
        token_ids,
        _widened(logprobs) if version == 1 else np.frombuffer(logprobs, "<f4").astype(np.float32),
    )


def num_bytes(data: bytes, start: int) -> int | None:
    """Of the history that begins at `start` of `data`, as its header has it; None if none does."""
    if len(data) - start < _HEADER.size:
        return None
    magic, version, _, size, num_rows, num_tokens = _HEADER.unpack_from(data, start)
    if magic != MAGIC or version not in _TOKEN_BYTES:
        return None
    return HEADER_BYTES + size if size == _body_bytes(version, num_rows, num_tokens) else None


def _body_bytes(version: int, num_rows: int, num_tokens: int) -> int:
    return num_rows * _ROW_BYTES + num_tokens * _TOKEN_BYTES[version]


def write(path: str | os.PathLike[str], rows: KeptRows) -> None:
    """Into a file, which appears complete or not at all."""
    with replacing(path) as out:
        out.write(packed(rows))


def read(path: str | os.PathLike[str]) -> KeptRows:
    """From a file, which is read only if its size is what its header says.

    Raises:
        OSError: if it cannot be read.
        ValueError: naming the path.
    """
    with open(path, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        head = stream.read(_HEADER.size)
        try:
            if len(head) == _HEADER.size and _HEADER.unpack(head)[3] != size - len(head):
                raise ValueError(
                    f"history: expected {_HEADER.unpack(head)[3]} bytes after the header, got "
                    f"{size - len(head)}"
                )
            return unpacked(head + stream.read())
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error
