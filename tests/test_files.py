"""Files that appear whole, in the place of whatever was there."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from spec_rollout.files import place_of, replacing


def write(path: Path, data: bytes, **options: bool) -> None:
    with replacing(path, **options) as file:
        file.write(data)


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path, b"old")
    with pytest.raises(KeyError), replacing(path) as file:  # noqa: PT012
        file.write(b"half")
        assert path.read_bytes() == b"old"
        raise KeyError
    assert path.read_bytes() == b"old"
    write(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("relative", [False, True])
def test_links_are_followed_and_stay(tmp_path: Path, relative: bool) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    target, first, second = folder / "target", tmp_path / "first", tmp_path / "second"
    first.symlink_to("elsewhere/target" if relative else target)
    second.symlink_to("first" if relative else first)
    for data in (b"one", b"two"):  # a link to nothing, then to a file
        write(second, data)
        assert target.read_bytes() == data
    assert first.is_symlink()
    assert second.is_symlink()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["elsewhere", "first", "second", "target"]


def test_permissions_stay(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.touch(mode=0o600)
    write(path, b"new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("seekable", [False, True])
def test_a_pipe_is_written_to(tmp_path: Path, seekable: bool) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link):
        read: list[bytes] = []
        reader = threading.Thread(target=lambda got=read: got.append(pipe.read_bytes()))
        reader.start()
        with replacing(path, seekable=seekable) as file:
            file.write(b"??cdef")
            if seekable:
                file.seek(0)
                file.write(b"ab")
        reader.join(10)
        assert read == [b"abcdef" if seekable else b"??cdef"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert link.is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "pipe"]


def test_a_pipe_without_a_reader_is_an_error_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    monkeypatch.setattr("spec_rollout.files._PATIENCE_SECONDS", 0.05)
    with pytest.raises(OSError, match="expected a pipe that is read"), replacing(pipe):
        pytest.fail("the block was entered")
    assert stat.S_ISFIFO(pipe.stat().st_mode)


_TO_STDOUT = """
import sys
from pathlib import Path
from spec_rollout.files import replacing
print("before", flush=True)
with replacing(Path(sys.argv[1])) as file:
    file.write(b"within\\n")
print("after")
"""


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
@pytest.mark.parametrize("to", ["pipe", "file"])
def test_standard_output_is_what_it_is(tmp_path: Path, name: str, to: str) -> None:
    path = tmp_path / name
    if name == "link":
        path.symlink_to("/dev/stdout")
    command = [sys.executable, "-c", _TO_STDOUT, str(path)]
    if to == "pipe":
        out = subprocess.run(command, capture_output=True, check=True).stdout
    else:
        with (tmp_path / "log").open("wb") as log:
            subprocess.run(command, stdout=log, check=True)
        out = (tmp_path / "log").read_bytes()
    assert out == b"before\nwithin\nafter\n"


def test_a_device_stays_one() -> None:
    write(Path("/dev/null"), b"gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(OSError, match="No space left"):
        write(Path("/dev/full"), b"does not fit")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_what_cannot_be_a_file_is_an_error_before_the_block(tmp_path: Path) -> None:
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    for path in (tmp_path, circle, tmp_path / "absent" / "file"):
        with pytest.raises(OSError), replacing(path):  # noqa: PT011
            pytest.fail("the block was entered")
    assert list(tmp_path.iterdir()) == [circle]


def test_a_long_name_is_no_trouble(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    write(path, b"x")
    assert list(tmp_path.iterdir()) == [path]


def test_places(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("folder/../file")
    (tmp_path / "folder").mkdir()
    assert place_of(tmp_path / "link") == ("file", tmp_path / "file")
    assert place_of(tmp_path / "folder") == ("folder", tmp_path / "folder")
    assert place_of("/dev/null") == ("stream", Path("/dev/null"))
