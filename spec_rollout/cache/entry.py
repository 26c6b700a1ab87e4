"""One cached rollout, its checksum and its size."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from typing import NamedTuple

# What describes an entry beside its arrays, in memory checksums and in files alike:
# sample_id, policy_version, num_tokens, finish_reason, arrays present.
DESCRIPTION = struct.Struct("<qqQBB")
_HAS_LOGPROBS, _HAS_TRAINER_LOGPROBS = 1, 2

# What CPython spends on an entry and on a group beside the token arrays: object headers, dictionary
# slots, boxed integers. `num_bytes` counts it, so that a byte bound also holds for many short
# responses.
ENTRY_OVERHEAD_BYTES = 256
GROUP_OVERHEAD_BYTES = 448


class Entry(NamedTuple):
    """An immutable rollout.

    The arrays are `bytes` (native int32 and float32), so nothing outside can alias them.
    """

    token_ids: bytes
    logprobs: bytes | None
    trainer_logprobs: bytes | None
    finish_reason: int
    policy_version: int
    checksum: int  # `checksum_of`, taken when the entry was stored

    @property
    def arrays(self) -> tuple[bytes, ...]:
        """The arrays present: token ids, log-probs, trainer log-probs."""
        return tuple(a for a in self[:3] if a is not None)

    @property
    def num_bytes(self) -> int:
        """Memory of the entry, CPython's share included."""
        num_bytes = ENTRY_OVERHEAD_BYTES + len(self.token_ids)
        if self.logprobs is not None:
            num_bytes += len(self.logprobs)
        if self.trainer_logprobs is not None:
            num_bytes += len(self.trainer_logprobs)
        return num_bytes


# Stands for a record that a store holds but cannot take apart. A CRC-32 is never negative, so the
# checksum is wrong whatever it is compared with.
UNREADABLE = Entry(b"", None, None, finish_reason=0, policy_version=0, checksum=-1)


def group_bytes(samples: Mapping[int, Entry]) -> int:
    """Memory of a group of entries, CPython's share included."""
    return GROUP_OVERHEAD_BYTES + sum(entry.num_bytes for entry in samples.values())


def describe(sample_id: int, entry: Entry) -> bytes:
    """`DESCRIPTION` of an entry."""
    token_ids, logprobs, trainer_logprobs, finish_reason, policy_version, _ = entry
    present = (_HAS_LOGPROBS if logprobs is not None else 0) | (
        _HAS_TRAINER_LOGPROBS if trainer_logprobs is not None else 0
    )
    return DESCRIPTION.pack(sample_id, policy_version, len(token_ids) // 4, finish_reason, present)


def arrays_present(present: int) -> tuple[bool, bool]:
    """(log-probs, trainer log-probs) of a description's last field; ValueError on unknown bits."""
    if present & ~(_HAS_LOGPROBS | _HAS_TRAINER_LOGPROBS):
        raise ValueError(f"arrays present: expected 0 to 3, got {present}")
    return bool(present & _HAS_LOGPROBS), bool(present & _HAS_TRAINER_LOGPROBS)


def checksum_of(prompt_key: bytes, sample_id: int, entry: Entry) -> int:
    """CRC-32 over the key, the description and every array of an entry."""
    crc = zlib.crc32(describe(sample_id, entry), zlib.crc32(prompt_key))
    crc = zlib.crc32(entry.token_ids, crc)
    if entry.logprobs is not None:
        crc = zlib.crc32(entry.logprobs, crc)
    if entry.trainer_logprobs is not None:
        crc = zlib.crc32(entry.trainer_logprobs, crc)
    return crc


def is_sound(prompt_key: bytes, sample_id: int, entry: Entry) -> bool:
    """Whether an entry found under this key and sample id is what was once stored there."""
    return checksum_of(prompt_key, sample_id, entry) == entry.checksum


def make_entry(
    prompt_key: bytes,
    sample_id: int,
    *,
    token_ids: bytes,
    logprobs: bytes | None,
    trainer_logprobs: bytes | None,
    finish_reason: int,
    policy_version: int,
) -> Entry:
    """An entry with its checksum."""
    entry = Entry(token_ids, logprobs, trainer_logprobs, finish_reason, policy_version, 0)
    return Entry(*entry[:5], checksum_of(prompt_key, sample_id, entry))
