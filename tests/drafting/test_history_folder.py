"""A folder of rollouts: what one writes another reads, or nothing of it."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spec_rollout.drafting import NO_TAG, Drafter, HistoryFolder, HistoryIdentity, KeptRows
from spec_rollout.drafting.history_file import packed
from spec_rollout.keys import prompt_key

VOCAB = 100
IDENTITY = HistoryIdentity("toy", "kind, 2 layers of 8", VOCAB, "0123456789abcdef")
MOST = 1 << 20


def rows_of(*rollouts: tuple[int, list[int]], logprob: float = -0.5) -> KeptRows:
    """Rollouts of prompts by number; tags are their first tokens."""
    return KeptRows.of(
        [
            (
                prompt_key([prompt]),
                [
                    (
                        tokens[0] if tokens else NO_TAG,
                        np.array(tokens, np.int32).tobytes(),
                        np.full(len(tokens), logprob, np.float32).tobytes(),
                    )
                ],
            )
            for prompt, tokens in rollouts
        ]
    )


def folder(path: Path, max_bytes: int = MOST, **other: object) -> HistoryFolder:
    return HistoryFolder(path, replace(IDENTITY, **other), max_bytes)  # type: ignore[arg-type]


def texts(found: list[KeptRows]) -> list[list[int]]:
    return [
        rows.token_ids[begin:end].tolist()
        for rows in found
        for begin, end in zip(rows.cu_lens[:-1], rows.cu_lens[1:], strict=True)
    ]


def segments(path: Path) -> list[Path]:
    return sorted(path.glob("*.rollouts"))


def test_what_one_writes_the_others_read_once(tmp_path: Path) -> None:
    one, other = folder(tmp_path / "a" / "b"), folder(tmp_path / "a" / "b")
    rows = rows_of((1, [3, 4]), (2, [5]), (1, [6, 7, 8]))
    assert one.append(rows) == 3
    (found,) = other.read()
    assert packed(found) == packed(rows)
    assert other.read() == one.read() == []
    assert other.append(rows_of((1, [9]))) == 1
    assert one.append(rows_of((1, [10]))) == 1
    assert texts(one.read()) == [[9]]
    assert texts(other.read()) == [[10]]
    one.close()
    # Who comes later finds everything, and a drafter takes it in.
    late, drafter = folder(tmp_path / "a" / "b"), Drafter()
    for rows in late.read():
        drafter.add_rows(rows)
    recalled = drafter.recall(prompt_key([1]), 6)
    assert recalled is not None
    assert recalled[0].tolist() == [6, 7, 8]
    assert recalled[1].tolist() == [-0.5] * 3
    assert drafter.info().num_sequences == 5
    assert late.num_damaged == other.num_damaged == 0


def test_the_oldest_goes_where_there_is_too_much(tmp_path: Path) -> None:
    writers, reader = [folder(tmp_path), folder(tmp_path)], folder(tmp_path)
    long = [7] * 5000  # of 20 kB with their log-probs
    for number in range(200):
        writers[number % 2].append(rows_of((number, [number % VOCAB, *long])))
        assert sum(path.stat().st_size for path in segments(tmp_path)) <= MOST
    found = [text[0] for text in texts(folder(tmp_path).read())]
    assert sorted(found) == sorted(number % VOCAB for number in range(200 - len(found), 200))
    assert 15 <= len(found) <= 26
    # Who reads too late has missed the oldest, and nothing else.
    assert [text[0] for text in texts(reader.read())] == found
    late = folder(tmp_path)
    late.skip_oldest(MOST // 2)
    part = [text[0] for text in texts(late.read())]
    assert part == found[-len(part) :]
    assert 0 < len(part) <= len(found) / 2
    assert writers[0].append(rows_of((1, [1] * (MOST // 16)))) == 0  # half of the folder by itself
    assert reader.num_damaged == 0


def test_what_is_left_unread_ends_with_a_whole_record(tmp_path: Path) -> None:
    """Whose writer may be in the midst of the next one."""
    one, late = folder(tmp_path), folder(tmp_path)
    for text in ([1], [2, 3]):
        one.append(rows_of((1, text)))
    (segment,) = segments(tmp_path)
    whole = segment.stat().st_size
    one.append(rows_of((1, [4, 5, 6])))
    data = segment.read_bytes()
    for cut in range(whole, len(data)):
        segment.write_bytes(data[:cut])
        late.skip_oldest(0)
        assert late.read() == []
        segment.write_bytes(data)
        assert texts(late.read()) == [[4, 5, 6]]
    late.skip_oldest(0)
    one.append(rows_of((1, [7])))
    assert texts(late.read()) == [[7]]
    assert late.num_damaged == 0
    # Behind a damaged header nobody knows where a record begins.
    segment.write_bytes(b"\0" * whole + data[whole:])
    late.skip_oldest(0)
    assert late.read() == []
    with open(segment, "ab") as file:
        file.write(data)
    assert late.read() == []
    assert late.num_damaged == 1


def test_who_has_lost_a_file_goes_on_in_another(tmp_path: Path) -> None:
    one, reader = folder(tmp_path), folder(tmp_path)
    one.append(rows_of((1, [1])))
    segments(tmp_path)[0].unlink()
    one.append(rows_of((1, [2])))
    assert texts(reader.read()) == [[2]]
    with open(segments(tmp_path)[0], "ab") as file:
        file.write(b"of somebody else")
    one.append(rows_of((1, [3])))
    assert len(segments(tmp_path)) == 2
    assert texts(reader.read()) == [[3]]
    one.append(rows_of((1, [4])))
    shutil.rmtree(tmp_path)
    with pytest.raises(OSError, match=tmp_path.name):
        one.append(rows_of((1, [5])))
    with pytest.raises(OSError, match=tmp_path.name):
        reader.read()


def test_whatever_happens_to_a_file_what_is_read_was_written(tmp_path: Path) -> None:
    """Every byte changed, every length, and bytes that are no records."""
    written = [[3, 4], [5], [6, 7, 8]]
    one, ends = folder(tmp_path / "sound"), []
    for text in written:
        one.append(rows_of((1, text)))
        ends.append(segments(tmp_path / "sound")[0].stat().st_size)
    data = segments(tmp_path / "sound")[0].read_bytes()
    damaged = [data[:n] + bytes([data[n] ^ 0x41]) + data[n + 1 :] for n in range(len(data))]
    cut = [data[:n] for n in range(len(data))]
    others = [data + b"\0" * 200, b"\0" * 200, b"SPECHIST" * 30, data[:-1] + data]
    place = tmp_path / "other"
    folder(place)
    found_all = 0
    for content in damaged + cut + others:
        for path in segments(place):
            path.unlink()
        (place / segments(tmp_path / "sound")[0].name).write_bytes(content)
        reader = folder(place)
        found = texts(reader.read())
        assert all(text in written for text in found)
        assert reader.read() == []
        found_all += len(found) == 3
        if content in damaged:
            assert len(found) < 3
            assert reader.num_damaged == 1
        elif content in cut:  # somebody may be writing the rest
            assert found == written[: sum(end <= len(content) for end in ends)]
            assert reader.num_damaged == 0
    assert found_all == 1  # with zeros behind
    # A record whose content was damaged is left out by itself.
    (place / segments(tmp_path / "sound")[0].name).write_bytes(damaged[ends[0] - 1])
    assert texts(folder(place).read()) == written[1:]


def test_records_that_are_no_rollouts_of_this_vocabulary_are_left_out(tmp_path: Path) -> None:
    one, reader = folder(tmp_path), folder(tmp_path)
    one.append(rows_of((1, [1, VOCAB])))
    one.append(rows_of((1, [2]), logprob=0.5))
    one.append(rows_of((1, [3]), logprob=float("inf")))
    one.append(rows_of((1, [4]), logprob=float("nan")))
    one.append(rows_of((1, [VOCAB - 1]), logprob=1e-6))
    assert texts(reader.read()) == [[4], [VOCAB - 1]]
    assert reader.num_damaged == 3
    (tmp_path / "0000000000-notes.rollouts").write_text("no segment")
    assert reader.read() == []
    assert reader.num_damaged == 3


@pytest.mark.parametrize(
    "other", [{"vocab_size": 99}, {"tokenizer": ""}, {"architecture": "kind, 3 layers of 8"}]
)
def test_rollouts_of_another_model_are_refused_by_name(
    tmp_path: Path, other: dict[str, object]
) -> None:
    folder(tmp_path, model="first")
    folder(tmp_path, model="the same under another name")
    with pytest.raises(ValueError, match=f"{tmp_path}: expected rollouts of second .*those of fir"):
        folder(tmp_path, model="second", **other)


def test_what_is_no_such_folder_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("text")
    with pytest.raises(ValueError, match="file: expected a folder or nothing, got a file"):
        folder(file)
    with pytest.raises(OSError, match="file"):
        folder(file / "inside")
    with pytest.raises(ValueError, match="expected shared rollouts or an empty folder, found 'fi"):
        folder(tmp_path)
    file.unlink()
    (tmp_path / "identity.json").touch()
    (tmp_path / "notes").touch()
    with pytest.raises(OSError, match="expected the identity of rollouts"):
        folder(tmp_path)
    (tmp_path / "identity.json").unlink()
    with pytest.raises(ValueError, match="expected shared rollouts or an empty folder, found 'no"):
        folder(tmp_path)


def test_of_whom_they_are_is_not_guessed(tmp_path: Path) -> None:
    """As if the folder could not be read: it is no other model's as far as anybody knows."""
    folder(tmp_path).append(rows_of((1, [1])))
    wrong = [b"", b"{", b"[]", b'{"version": 2}', b"\xff", b'{"version": 1, "model": "x"}']
    for text in (*wrong, b"[" * 100_000):
        (tmp_path / "identity.json").write_bytes(text)
        with pytest.raises(OSError, match=r"identity\.json: expected the identity .* remove the"):
            folder(tmp_path)
    (tmp_path / "identity.json").unlink()
    with pytest.raises(OSError, match=r"identity\.json: .*it is gone; remove the folder to begin"):
        folder(tmp_path)
    assert not (tmp_path / "identity.json").exists()


def test_an_identity_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, link = os.fsync, os.link

    def synced(file: int) -> None:
        fsync(file)
        path = Path(os.readlink(f"/proc/self/fd/{file}"))
        events.append("folder" if path == tmp_path else f"{path.stat().st_size} bytes")

    def linked(old: Path, new: Path) -> None:
        link(old, new)
        events.append(new.name)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "link", linked)
    folder(tmp_path)
    assert events == [f"{len(IDENTITY.to_json())} bytes", "identity.json", "folder"]
