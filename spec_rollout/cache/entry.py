"""One cached rollout, its checksum and its size."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

from spec_rollout._native import _C

# What describes an entry beside its arrays, in memory checksums and in files alike:
# sample_id, policy_version, num_tokens, finish_reason, arrays present.
DESCRIPTION = struct.Struct("<qqQBB")
_HAS_LOGPROBS, _HAS_TRAINER_LOGPROBS, _HAS_BEHAVIOUR_LOGPROBS, _HAS_AGES = 1, 2, 4, 8

# What CPython spends on an entry and on a group beside the token arrays: object headers, dictionary
# slots, boxed integers. `num_bytes` counts it, so that a byte bound also holds for many short
# responses.
ENTRY_OVERHEAD_BYTES = 256
GROUP_OVERHEAD_BYTES = 448


class Entry(NamedTuple):
    """An immutable rollout.

    The arrays are `bytes` (native int32, float32, ages int16), so nothing outside can alias them.
    A rollout of which nothing was reused has no `ages`, and no `behaviour_logprobs` beside its
    `logprobs`: they are the same.
    """

    token_ids: bytes
    logprobs: bytes | None
    trainer_logprobs: bytes | None
    finish_reason: int
    policy_version: int
    checksum: int  # `checksum_of`, taken when the entry was stored
    behaviour_logprobs: bytes | None = None  # None: `logprobs`, if those are kept
    ages: bytes | None = None  # epochs from a token's draw to this entry's; None: all 0

    @property
    def arrays(self) -> tuple[bytes, ...]:
        """The arrays present, in the order of a file."""
        optional = (self.logprobs, self.trainer_logprobs, self.behaviour_logprobs, self.ages)
        return (self.token_ids, *(array for array in optional if array is not None))

    @property
    def num_bytes(self) -> int:
        """Memory of the entry, CPython's share included."""
        return ENTRY_OVERHEAD_BYTES + sum(map(len, self.arrays))


def owned(entry: Entry) -> Entry:
    """The same with arrays of its own, of an entry that may be borrowed (`Store.borrow_many`)."""

    def copy(array: bytes | None) -> bytes | None:
        return None if array is None else bytes(array)

    return entry._replace(
        token_ids=bytes(entry.token_ids),
        logprobs=copy(entry.logprobs),
        trainer_logprobs=copy(entry.trainer_logprobs),
        behaviour_logprobs=copy(entry.behaviour_logprobs),
        ages=copy(entry.ages),
    )


# Stands for a record that a store holds but cannot take apart. A checksum is never negative, so
# this one is wrong whatever it is compared with.
UNREADABLE = Entry(b"", None, None, finish_reason=0, policy_version=0, checksum=-1)


def group_bytes(samples: Mapping[int, Entry]) -> int:
    """Memory of a group of entries, CPython's share included."""
    return GROUP_OVERHEAD_BYTES + sum(entry.num_bytes for entry in samples.values())


def describe(sample_id: int, entry: Entry) -> bytes:
    """`DESCRIPTION` of an entry."""
    present = (
        _HAS_LOGPROBS * (entry.logprobs is not None)
        + _HAS_TRAINER_LOGPROBS * (entry.trainer_logprobs is not None)
        + _HAS_BEHAVIOUR_LOGPROBS * (entry.behaviour_logprobs is not None)
        + _HAS_AGES * (entry.ages is not None)
    )
    num_tokens = len(entry.token_ids) // 4
    return DESCRIPTION.pack(
        sample_id, entry.policy_version, num_tokens, entry.finish_reason, present
    )


class Present(NamedTuple):
    """Which arrays follow an entry's token ids."""

    logprobs: bool
    trainer_logprobs: bool
    behaviour_logprobs: bool
    ages: bool


def arrays_present(present: int, most: int = 15) -> Present:
    """What a description's last field says; ValueError if it is above `most`."""
    if present > most:
        raise ValueError(f"arrays present: expected 0 to {most}, got {present}")
    flags = (_HAS_LOGPROBS, _HAS_TRAINER_LOGPROBS, _HAS_BEHAVIOUR_LOGPROBS, _HAS_AGES)
    return Present(*(bool(present & flag) for flag in flags))


def checksum_of(prompt_key: bytes, sample_id: int, entry: Entry) -> int:
    """CRC-32C over the key, the description and every array of an entry."""
    return _checksum(_C.crc32c, prompt_key, sample_id, entry)


def crc32_of(prompt_key: bytes, sample_id: int, entry: Entry) -> int:
    """CRC-32 (zlib's) over the same: the checksum of cache files before version 4."""
    return _checksum(zlib.crc32, prompt_key, sample_id, entry)


def _checksum(
    crc_of: Callable[[bytes, int], int], prompt_key: bytes, sample_id: int, entry: Entry
) -> int:
    crc = crc_of(describe(sample_id, entry), crc_of(prompt_key, 0))
    for array in entry.arrays:
        crc = crc_of(array, crc)
    return crc


def is_sound(prompt_key: bytes, sample_id: int, entry: Entry) -> bool:
    """Whether an entry found under this key and sample id is what was once stored there."""
    return has_equal_lens(entry) and checksum_of(prompt_key, sample_id, entry) == entry.checksum


def has_equal_lens(entry: Entry) -> bool:
    """Whether all arrays have as many tokens, and the finish reason is one at all."""
    size = len(entry.token_ids)
    float_arrays = (entry.logprobs, entry.trainer_logprobs, entry.behaviour_logprobs)
    return (
        size % 4 == 0
        and all(array is None or len(array) == size for array in float_arrays)
        and (entry.ages is None or 2 * len(entry.ages) == size)
        and 0 <= entry.finish_reason < 256
    )


def make_entry(
    prompt_key: bytes,
    sample_id: int,
    *,
    token_ids: bytes,
    logprobs: bytes | None,
    trainer_logprobs: bytes | None,
    finish_reason: int,
    policy_version: int,
    behaviour_logprobs: bytes | None = None,
    ages: bytes | None = None,
) -> Entry:
    """An entry with its checksum."""
    entry = Entry(
        token_ids,
        logprobs,
        trainer_logprobs,
        finish_reason,
        policy_version,
        0,
        behaviour_logprobs,
        ages,
    )
    return entry._replace(checksum=checksum_of(prompt_key, sample_id, entry))
