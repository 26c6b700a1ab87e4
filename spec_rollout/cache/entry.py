"""One cached rollout, its checksum and its size."""

from __future__ import annotations

import struct
import zlib
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
    def num_tokens(self) -> int:
        return len(self.token_ids) // 4

    @property
    def arrays(self) -> tuple[bytes, ...]:
        """The arrays present: token ids, log-probs, trainer log-probs."""
        return tuple(a for a in self[:3] if a is not None)

    @property
    def num_bytes(self) -> int:
        """Memory of the entry, CPython's share included."""
        return ENTRY_OVERHEAD_BYTES + sum(map(len, self.arrays))


def describe(sample_id: int, entry: Entry) -> bytes:
    """`DESCRIPTION` of an entry."""
    present = (_HAS_LOGPROBS if entry.logprobs is not None else 0) | (
        _HAS_TRAINER_LOGPROBS if entry.trainer_logprobs is not None else 0
    )
    return DESCRIPTION.pack(
        sample_id, entry.policy_version, len(entry.token_ids) // 4, entry.finish_reason, present
    )


def arrays_present(present: int) -> tuple[bool, bool]:
    """(log-probs, trainer log-probs) of a description's last field; ValueError on unknown bits."""
    if present & ~(_HAS_LOGPROBS | _HAS_TRAINER_LOGPROBS):
        raise ValueError(f"arrays present: expected 0 to 3, got {present}")
    return bool(present & _HAS_LOGPROBS), bool(present & _HAS_TRAINER_LOGPROBS)


def checksum_of(prompt_key: bytes, sample_id: int, entry: Entry) -> int:
    """CRC-32 over the key, the description and every array of an entry."""
    crc = zlib.crc32(describe(sample_id, entry), zlib.crc32(prompt_key))
    for array in entry[:3]:
        if array is not None:
            crc = zlib.crc32(array, crc)
    return crc


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
    fields = (token_ids, logprobs, trainer_logprobs, finish_reason, policy_version)
    return Entry(*fields, checksum_of(prompt_key, sample_id, Entry(*fields, 0)))
