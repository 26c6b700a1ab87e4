"""`spec-rollout cache`: real stores, looked at, checked, written out, read in and compacted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from spec_rollout import cli
from spec_rollout.cache import DiskStore, RolloutCache

sys.path.insert(0, str(Path(__file__).parents[1] / "cache"))
from cache_samples import content_of, entry_of, put


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with DiskStore(tmp_path / "store") as store:
        put(store, b"prompt-a", 0, 1)
        put(store, b"prompt-b", 4)
        store.mark()
    return tmp_path / "store"


def test_info_says_what_a_store_holds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cache", "info", str(folder)]) == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert said["prompts"] == "2"
    assert said["rollouts"] == "3"
    assert said["marks"] == "1"


def test_verify_names_what_is_damaged(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cache", "verify", str(folder)]) == 0
    assert capsys.readouterr().out == "3 rollouts are sound, 0 are not\n"
    with DiskStore(folder) as store:
        wrong = entry_of(b"prompt-b", 4, [1])._replace(checksum=5)
        store.put_many([(b"prompt-b", {4: wrong})])
    assert cli.main(["cache", "verify", str(folder)]) == 1
    out = capsys.readouterr().out
    assert f"wrong checksum: prompt key {b'prompt-b'.hex()}, sample 4" in out
    assert out.endswith("2 rollouts are sound, 1 are not\n")


def test_what_is_exported_can_be_imported(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, other = str(tmp_path / "cache.bin"), tmp_path / "other"
    assert cli.main(["cache", "export", str(folder), file]) == 0
    plain = RolloutCache()
    plain.load(file)
    assert plain.stats.num_samples == 3
    assert cli.main(["cache", "import", file, str(other)]) == 0
    with DiskStore(folder) as a, DiskStore(other) as b:
        assert content_of(a) == content_of(b)
    capsys.readouterr()
    assert cli.main(["cache", "import", file, str(other)]) == 2
    assert (
        "expected an empty store (or --replace), got one of 3 rollouts" in capsys.readouterr().err
    )
    assert cli.main(["cache", "import", file, str(other), "--replace"]) == 0


def test_compact_and_mistakes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["cache", "compact", str(folder)]) == 0
    assert "bytes before" in capsys.readouterr().out
    assert cli.main(["cache", "info", str(tmp_path / "nothing")]) == 2
    assert "expected a disk store, found no data.mdb" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [folder]
