from __future__ import annotations

import os
import resource
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cache_samples import logprob_rows_of, make_rollouts, rows_of

from spec_rollout.cache import CacheStats, RolloutCache
from spec_rollout.cache.reference import crc32c
from spec_rollout.types import FinishReason

A, B, C = b"prompt-a", b"prompt-b", b"prompt-c"

# Format version 4, byte by byte: one group of one response, with the three checksums left zero.
# A change here is a new format version.
GOLDEN = bytes.fromhex(
    "53504543524f4c4c04000000"  # magic, version
    "01000000000000006a00000000000000"  # groups, bytes in all
    "ffffffffffffffff"  # pass not known
    "00000000"
    "0800000001000000"  # key length, samples
    "70726f6d70742d61"  # prompt-a
    "00000000"
    "03000000000000000200000000000000020000000000000000"  # sample 3, policy 2, 2 tokens, STOP
    "01"  # log-probs present
    "00000000"
    "0700000008000000"  # 7, 8
    "000000bf000080bf"  # -0.5, -1.0
)


# The same as earlier versions had it; 1 has no pass. All have CRC-32 for a checksum of the entry.
GOLDEN_3 = GOLDEN[:8] + b"\3" + GOLDEN[9:]
GOLDEN_2 = GOLDEN[:8] + b"\2" + GOLDEN[9:]
GOLDEN_1 = b"SPECROLL\1" + GOLDEN[9:20] + b"\x62" + GOLDEN[21:28] + GOLDEN[36:]


def _filled() -> RolloutCache:
    cache = RolloutCache()
    rollouts = make_rollouts(
        [[1, 2, 3], [4], [5, 6]],
        finish_reasons=[FinishReason.STOP, FinishReason.LENGTH, FinishReason.STOP],
        policy_version=7,
    )
    cache.store([A, A, B], [0, 5, 1], rollouts)
    cache.store([C], [0], make_rollouts([[9]]), make_rollouts([[9]]).logprobs * 2)
    return cache


def test_a_fingerprint_is_of_what_is_cached_alone(tmp_path: Path) -> None:
    assert RolloutCache().fingerprint() == 0
    cache = _filled()
    first = cache.fingerprint()
    assert 0 < first < 2**62
    cache.lookup([A], [0], max_tokens=9)  # another order of use
    assert cache.fingerprint() == first
    cache.save(tmp_path / "cache")
    loaded = RolloutCache()
    loaded.load(tmp_path / "cache")
    assert loaded.fingerprint() == first
    # The same tokens one epoch later.
    cache.store([B], [1], make_rollouts([[5, 6]], policy_version=8))
    second = cache.fingerprint()
    cache.store([B], [2], make_rollouts([[5, 6]], policy_version=8))
    assert len({first, second, cache.fingerprint()}) == 3


def _content(cache: RolloutCache) -> tuple:
    """Everything a cache would answer, without touching it."""
    return tuple(
        (key, sample_id, tuple(entry))
        for key, samples in cache._store.iterate()
        for sample_id, entry in samples.items()
    )


def _size(stats: CacheStats) -> tuple[int, int, int]:
    return stats.num_groups, stats.num_samples, stats.num_bytes


def test_a_loaded_cache_answers_as_the_saved_one(tmp_path: Path) -> None:
    saved, loaded = _filled(), RolloutCache()
    saved.save(tmp_path / "cache")
    loaded.load(tmp_path / "cache")
    assert _content(loaded) == _content(saved)
    assert _size(loaded.stats) == _size(saved.stats)
    drafts = loaded.lookup([B, A, C, A], [1, 0, 1, 5], max_tokens=9)
    assert rows_of(drafts) == [[5, 6], [1, 2, 3], [], [4]]
    assert logprob_rows_of(drafts)[1] == [-1 / 8, -2 / 8, -3 / 8]
    assert drafts.finished.tolist() == [True, True, False, False]
    again = loaded.lookup([C], [0], max_tokens=9, trainer_logprobs=True)
    assert logprob_rows_of(again) == [[-9 / 4]]
    assert os.listdir(tmp_path) == ["cache"]


def test_an_empty_cache_and_one_without_logprobs_survive(tmp_path: Path) -> None:
    RolloutCache().save(tmp_path / "empty")
    cache = _filled()
    cache.load(tmp_path / "empty")
    assert _size(cache.stats) == (0, 0, 0)
    lean = RolloutCache(keep_logprobs=False)
    lean.store([A], [0], make_rollouts([[1, 2]]))
    lean.save(tmp_path / "lean")
    cache.load(tmp_path / "lean")
    cache.store([B], [0], make_rollouts([[3]]))
    drafts = cache.lookup([A, B, C], [0, 0, 0], max_tokens=9)
    assert rows_of(drafts) == [[1, 2], [3], []]
    assert drafts.logprobs is None  # row 0 has none, so the batch has none
    assert cache.lookup([B, C], [0, 0], max_tokens=9).logprobs is not None


def test_loading_replaces_the_content_and_keeps_the_counters(tmp_path: Path) -> None:
    _filled().save(tmp_path / "cache")
    cache = RolloutCache()
    cache.store([b"prompt-z"], [0], make_rollouts([[1]]))
    cache.lookup([b"prompt-z", A], [0, 0], max_tokens=9)
    cache.load(tmp_path / "cache")
    assert cache.lookup([b"prompt-z"], [0], max_tokens=9).lens.tolist() == [0]
    assert (cache.stats.hits, cache.stats.misses) == (1, 2)


def test_the_order_of_use_survives(tmp_path: Path) -> None:
    saved = RolloutCache()
    for key in (A, B, C):
        saved.store([key], [0], make_rollouts([[1] * 50]))
    saved.lookup([A], [0], max_tokens=50)  # B is now the oldest, then C, then A
    saved.save(tmp_path / "cache")
    bounded = RolloutCache(max_bytes=2 * saved.stats.num_bytes // 3)
    bounded.load(tmp_path / "cache")
    assert bounded.stats.evictions == 1
    bounded.store([b"prompt-d"], [0], make_rollouts([[1] * 50]))
    assert bounded.lookup([A, B, C], [0] * 3, max_tokens=50).lens.tolist() == [50, 0, 0]


def _sealed(blob: bytes, header_bytes: int = 36) -> bytes:
    """`GOLDEN`-shaped bytes with the three checksums put right."""
    header, rest = blob[:header_bytes], blob[header_bytes + 4 :]
    group, entry, arrays = rest[:16], rest[20:46], rest[50:]
    crc = struct.Struct("<I")
    entry_crc = (crc32c if blob[8] == 4 else zlib.crc32)(rest[8:16] + entry + arrays)
    return b"".join(
        (
            *(header, crc.pack(zlib.crc32(header))),
            *(group, crc.pack(zlib.crc32(group))),
            *(entry, crc.pack(entry_crc), arrays),
        )
    )


def test_the_format_is_the_documented_one(tmp_path: Path) -> None:
    cache = RolloutCache()
    rollouts = make_rollouts([[7, 8]], logprobs=[[-0.5, -1.0]], policy_version=2)
    cache.store([A], [3], rollouts)
    cache.save(tmp_path / "cache")
    blob = (tmp_path / "cache").read_bytes()
    assert len(blob) == 0x6A
    assert blob == _sealed(GOLDEN)
    cache.save(tmp_path / "cache", pass_index=258)
    numbered = GOLDEN[:28] + bytes([2, 1, 0, 0, 0, 0, 0, 0]) + GOLDEN[36:]
    assert (tmp_path / "cache").read_bytes() == _sealed(numbered)


def test_the_pass_that_was_saved_is_what_loading_says(tmp_path: Path) -> None:
    path, cache = tmp_path / "cache", RolloutCache()
    for pass_index in (None, 0, 1, 2**62):
        _filled().save(path, pass_index=pass_index)
        assert cache.load(path) == pass_index
    for wrong in (-1, 1.5, "one", 2**63):
        with pytest.raises(ValueError, match="pass_index: expected"):
            cache.save(path, pass_index=wrong)  # type: ignore[arg-type]
    assert RolloutCache().load(path) == 2**62


def test_who_drew_what_survives_and_is_where_the_format_says(tmp_path: Path) -> None:
    path, cache, loaded = tmp_path / "cache", RolloutCache(), RolloutCache()
    rollouts = replace(
        make_rollouts([[7, 8]], logprobs=[[-0.5, -1.0]], policy_version=2),
        accepted_lens=torch.tensor([1], dtype=torch.int32),
        behaviour_logprobs=torch.tensor([-0.25, -1.0]),
        ages=torch.tensor([258, 0], dtype=torch.int16),
    )
    cache.store([A], [3], rollouts)
    cache.save(path)
    arrays = bytes.fromhex("000080be000080bf02010000")  # -0.25, -1.0; 258, 0
    blob = GOLDEN[:20] + struct.pack("<Q", 0x6A + 12) + GOLDEN[28:85] + b"\x0d" + GOLDEN[86:]
    assert path.read_bytes() == _sealed(blob + arrays)
    loaded.load(path)
    drafts = loaded.lookup([A], [3], max_tokens=9)
    assert drafts.logprobs is not None
    assert drafts.behaviour_logprobs is not None
    assert drafts.ages is not None
    assert drafts.logprobs.tolist() == [-0.5, -1.0]
    assert drafts.behaviour_logprobs.tolist() == [-0.25, -1.0]
    assert drafts.ages.tolist() == [259, 1]


@pytest.mark.parametrize("golden", [GOLDEN_2, GOLDEN_3], ids=["2", "3"])
def test_rollouts_of_a_file_of_version_2_or_3_count_as_drawn_when_they_were_stored(
    tmp_path: Path, golden: bytes
) -> None:
    path, cache, same = tmp_path / "cache", RolloutCache(), RolloutCache()
    path.write_bytes(_sealed(golden))
    assert cache.load(path) is None
    path.write_bytes(_sealed(GOLDEN))
    same.load(path)
    assert _content(cache) == _content(same)
    drafts = cache.lookup([A], [3], max_tokens=9)
    assert (drafts.behaviour_logprobs, drafts.ages) == (None, None)


def test_a_file_of_version_1_is_read(tmp_path: Path) -> None:
    path, cache, same = tmp_path / "cache", RolloutCache(), RolloutCache()
    path.write_bytes(_sealed(GOLDEN_1, 28))
    assert cache.load(path) is None
    path.write_bytes(_sealed(GOLDEN))
    assert same.load(path) is None
    assert _content(cache) == _content(same)
    assert rows_of(cache.lookup([A], [3], max_tokens=9)) == [[7, 8]]
    for length in range(len(GOLDEN_1)):
        _assert_refused(
            path, _sealed(GOLDEN_1, 28)[:length], r"expected .* at byte \d+, got .*truncated"
        )


def _assert_refused(path: Path, blob: bytes, match: str, cache: RolloutCache | None = None) -> None:
    path.write_bytes(blob)
    cache = cache or _filled()
    before = _content(cache), cache.stats
    with pytest.raises(ValueError, match=match) as caught:
        cache.load(path)
    assert str(path) in str(caught.value)
    assert (_content(cache), cache.stats) == before
    assert path.read_bytes() == blob


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    _filled().save(path)
    blob = path.read_bytes()
    for length in range(len(blob)):
        _assert_refused(path, blob[:length], r"expected .* at byte \d+, got .*truncated")


def test_a_flipped_bit_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    _filled().save(path)
    blob, cache = path.read_bytes(), _filled()
    for byte in range(len(blob)):
        in_headers = byte < 90  # of the file, of the first group and of its first entry
        for bit in range(8) if in_headers else (byte % 8,):
            damaged = blob[:byte] + bytes([blob[byte] ^ (1 << bit)]) + blob[byte + 1 :]
            _assert_refused(path, damaged, r"expected .* at byte \d+, got ", cache)


def test_trailing_bytes_are_refused_with_their_offset(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    _filled().save(path)
    blob = path.read_bytes()
    _assert_refused(path, blob + b"\0", rf"expected {len(blob)} bytes in all at byte {len(blob)}")


def test_other_files_and_versions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    _filled().save(path)
    blob = path.read_bytes()
    _assert_refused(path, b"PK\3\4 something else" * 9, "expected the magic .* at byte 0, got")
    # A later version may have another header: its checksum is no reason to call it damaged.
    for version in (0, 5):
        newer = blob[:8] + struct.pack("<I", version) + blob[12:]
        _assert_refused(path, newer, f"expected format version 1 to 4 at byte 8, got {version}")


def test_a_wrong_checksum_names_the_entry_it_belongs_to(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    _filled().save(path)
    blob = bytearray(path.read_bytes())
    entry_at = 40 + 8 + 8 + 4 + (26 + 4 + 3 * 8)  # header, group header of A, sample 0 of A
    blob[entry_at + 26 + 4] ^= 1  # the token of sample 5 of A
    _assert_refused(path, bytes(blob), f"expected checksum [0-9a-f]{{8}} at byte {entry_at}, got")


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        ({28: struct.pack("<q", -2)}, "expected a pass from 0 on, or -1 at byte 28, got -2"),
        ({60: struct.pack("<q", -1)}, "expected a finished rollout at byte 60, got sample -1"),
        ({84: bytes([FinishReason.ABORT])}, "expected a finished rollout .*finish reason 2"),
        ({84: b"\x09"}, "expected a finished rollout .*finish reason 9"),
        ({85: b"\x10"}, "expected arrays 0 to 15 at byte 85, got 16"),
        ({8: b"\x02", 85: b"\x04"}, "expected arrays 0 to 3 at byte 85, got 4"),
        ({85: b"\x05"}, "expected behaviour log-probs of 8 bytes at byte 106"),
        ({85: b"\x09"}, "expected ages of 4 bytes at byte 106"),
        (
            {76: struct.pack("<Q", 2**61)},
            "expected token ids of 9223372036854775808 bytes at byte 90",
        ),
        (
            {40: struct.pack("<I", 2**32 - 1)},
            "expected a prompt key of 4294967295 bytes at byte 48",
        ),
        ({44: struct.pack("<I", 2)}, "expected an entry header of 26 bytes at byte 106"),
        ({44: struct.pack("<I", 0)}, "expected the end at byte 60"),
        ({12: struct.pack("<Q", 2)}, "expected a group header of 8 bytes at byte 106"),
    ],
)
def test_nonsense_with_right_checksums_is_refused(
    tmp_path: Path, edit: dict[int, bytes], match: str
) -> None:
    blob = bytearray(GOLDEN)
    for offset, value in edit.items():
        blob[offset : offset + len(value)] = value
    _assert_refused(tmp_path / "cache", _sealed(bytes(blob)), match)


def test_a_repeated_key_or_sample_is_refused(tmp_path: Path) -> None:
    one = _sealed(GOLDEN)
    twice = bytearray(one + one[40:])
    twice[12:20] = struct.pack("<Q", 2)
    twice[20:28] = struct.pack("<Q", len(twice))
    twice[36:40] = struct.pack("<I", zlib.crc32(twice[:36]))
    _assert_refused(
        tmp_path / "cache", bytes(twice), "each prompt key once at byte 106, got .* again"
    )
    double = bytearray(one + one[60:])
    double[44:48] = struct.pack("<I", 2)
    double[56:60] = struct.pack("<I", zlib.crc32(double[40:56]))
    double[20:28] = struct.pack("<Q", len(double))
    double[36:40] = struct.pack("<I", zlib.crc32(double[:36]))
    _assert_refused(
        tmp_path / "cache", bytes(double), "each sample id once .* at byte 106, got 3 again"
    )


def test_a_missing_file_leaves_the_cache(tmp_path: Path) -> None:
    cache = _filled()
    before = _content(cache)
    with pytest.raises(FileNotFoundError):
        cache.load(tmp_path / "none")
    assert _content(cache) == before


@contextmanager
def _file_size_limit(num_bytes: int) -> Iterator[None]:
    """Writes past this fail with OSError, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_save_that_fails_midway_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    _filled().save(path)
    blob = path.read_bytes()
    bigger = _filled()
    bigger.store([A], [1], make_rollouts([[1] * 100_000]))
    with _file_size_limit(4096), pytest.raises(OSError, match="File too large"):
        bigger.save(path)
    assert path.read_bytes() == blob
    assert os.listdir(tmp_path) == ["cache"]
    with pytest.raises(OSError, match="No such file"):
        bigger.save(tmp_path / "no such folder" / "cache")


def test_saving_over_a_link_keeps_the_link_and_the_usual_mode(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real" / "cache")
    _filled().save(link)
    assert link.is_symlink()
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    target = tmp_path / "real" / "cache"
    assert target.stat().st_mode == plain.stat().st_mode
    cache = RolloutCache()
    cache.load(link)
    assert _content(cache) == _content(_filled())


def test_a_corrupt_entry_is_dropped_instead_of_saved(tmp_path: Path) -> None:
    cache = _filled()
    for key, sample_id in ((A, 0), (C, 0)):
        (entry,) = cache._store.get_many([key], [sample_id])
        assert entry is not None
        damaged = entry._replace(token_ids=b"\xff\0\0\0")
        cache._store.put_many([(key, {sample_id: damaged})])
    cache.save(tmp_path / "cache")
    assert cache.stats.corrupt == 2
    loaded = RolloutCache()
    loaded.load(tmp_path / "cache")
    assert rows_of(loaded.lookup([A, A, B, C], [0, 5, 1, 0], max_tokens=9)) == [[], [4], [5, 6], []]
