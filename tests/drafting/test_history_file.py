"""History that is exported and imported: whole and unchanged, or not at all."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from drafting_samples import SMALL_TABLE, A, B, C, D, X, Y, Z, finish, kept

from spec_rollout.drafting import Drafter


def filled() -> Drafter:
    drafter = Drafter(max_table_bytes=SMALL_TABLE)
    for key, tokens, tag in ((X, [A, B, C], 3), (Y, [C], None), (X, [D], -4), (Z, [B, A], 0)):
        finish(drafter, key, tokens, tag)
    handle = drafter.join(Y)
    drafter.extend(
        np.array([handle]), np.array([D, A], np.int32), np.array([2]), np.float32([-0.3, np.nan])
    )
    drafter.leave(handle)
    return drafter


def test_exported_history_is_imported_with_its_order_and_tags(tmp_path: Path) -> None:
    drafter = filled()
    data = drafter.export_bytes()
    drafter.save(tmp_path / "history")
    assert (tmp_path / "history").read_bytes() == data
    by_bytes, by_file = (Drafter(max_table_bytes=SMALL_TABLE) for _ in range(2))
    assert by_bytes.import_bytes(data) == by_file.load(tmp_path / "history") == 5
    for other in (by_bytes, by_file):
        assert kept(other) == kept(drafter)
        assert list(kept(other)) == [X, Z, Y]
        assert other.export_bytes() == data
        assert other.info().num_learned_tokens == 9
        found = other.recall(X, -4)
        assert found is not None
        assert found[0].tolist() == [D]
    assert np.isnan(by_file.recall(X, 3)[1]).all()  # type: ignore[index]
    logprobs = by_file._native.kept_rows()[2][1][1][2]
    np.testing.assert_array_equal(np.frombuffer(logprobs, np.float32), np.float32([-0.3, np.nan]))
    # Where there is no room for all, the last used stay.
    for key in (X, Z):
        by_bytes.leave(by_bytes.join(key))
    assert list(kept(by_bytes)) == [Y, X, Z]
    small = Drafter(max_bytes=by_bytes.info().history_bytes // 2, max_table_bytes=SMALL_TABLE)
    small.import_bytes(data)
    assert list(kept(small)) == [Y]
    # Twice is twice.
    assert by_file.import_bytes(data) == 5
    assert kept(by_file)[X] == 2 * [[A, B, C], [D]]
    assert Drafter().import_bytes(Drafter().export_bytes()) == 0


def test_data_that_is_not_whole_and_unchanged_is_refused(tmp_path: Path) -> None:
    data = filled().export_bytes()
    drafter = Drafter(max_table_bytes=SMALL_TABLE)
    for size in range(len(data)):
        with pytest.raises(ValueError, match="history: expected"):
            drafter.import_bytes(data[:size])
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 0x55
        with pytest.raises(ValueError, match="history: expected"):
            drafter.import_bytes(bytes(changed))
    with pytest.raises(ValueError, match="history: expected"):
        drafter.import_bytes(data + b"\0")
    (tmp_path / "cut").write_bytes(data[:-1])
    with pytest.raises(ValueError, match=r"cut: history: expected .* bytes after the header"):
        drafter.load(tmp_path / "cut")
    with pytest.raises(OSError, match="none"):
        drafter.load(tmp_path / "none")
    assert drafter.info().num_groups == 0


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (24, 2**62, "rows and"),  # num_rows
        (32, 2**62, "tokens after the header"),  # num_tokens
        (40 + 5 * 24, 2**31, "rows of at most"),  # the first row's length
        (40 + 5 * 28, -(2**31), "token ids >= 0"),
    ],
)
def test_lengths_are_compared_with_the_size_before_they_are_believed(
    place: int, value: int, message: str
) -> None:
    """A right checksum over wrong contents."""
    data = bytearray(filled().export_bytes())
    if place < 40:
        data[place : place + 8] = struct.pack("<Q", value)
    else:
        data[place : place + 4] = struct.pack("<I", value % 2**32)
    data[12:16] = struct.pack("<I", zlib.crc32(bytes(data[40:])))
    with pytest.raises(ValueError, match=message):
        Drafter(max_table_bytes=SMALL_TABLE).import_bytes(bytes(data))
