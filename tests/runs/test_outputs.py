"""Outputs of a command: refused by option before anything is computed, or written as text."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path

import pytest

from spec_rollout.runs.outputs import check_outputs, is_stream, write_text, writing


def refused(message: str, *args: object, **kwargs: object) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        check_outputs(*args, **kwargs)  # type: ignore[arg-type]


def test_what_can_be_written_passes_and_nothing_is_left_behind(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "old").write_text("old")
    (tmp_path / "link").symlink_to("old")
    (tmp_path / "to nothing").symlink_to("absent")
    before = sorted(tmp_path.iterdir())
    names = ["new", "link", "to nothing", "pipe"]
    check_outputs({f"--{name}": tmp_path / name for name in names} | {"--none": None})
    check_outputs({"--out": Path("/dev/null"), "--stats": Path("/dev/null")})
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "old").read_text() == "old"
    assert [name for name in names if is_stream(tmp_path / name)] == ["pipe"]


def test_what_cannot_is_refused_by_option(tmp_path: Path) -> None:
    folder, circle = tmp_path / "folder", tmp_path / "circle"
    folder.mkdir()
    circle.symlink_to(circle)
    (tmp_path / "to a folder").symlink_to(folder)
    (tmp_path / "file").touch()
    (tmp_path / "to nowhere").symlink_to("absent/file")
    cases = {
        folder: f"expected a file, got a folder, {folder}",
        tmp_path / "to a folder": f"expected a file, got a folder, {tmp_path / 'to a folder'}",
        tmp_path
        / "absent"
        / "x": f"expected a file in an existing folder, got {tmp_path / 'absent/x'}",
        tmp_path / "file" / "x": "expected a file",
        tmp_path / "to nowhere": "expected a file in an existing folder",
        circle: "expected a file",
        tmp_path / ("n" * 256): "expected a file",
        tmp_path / "a\0b": "expected a file",
        Path(""): "expected a file, got a folder, .",
        Path("/proc/new"): "expected a folder that can be written, got /proc/new (",
    }
    for path, message in cases.items():
        refused(f"--out: {message}", {"--out": path})
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "circle",
        "file",
        "folder",
        "to a folder",
        "to nowhere",
    ]


def test_streams_that_take_no_writes_are_refused(tmp_path: Path) -> None:
    read, write = os.pipe()
    check_outputs({"--out": Path(f"/dev/fd/{write}")})
    refused("--out: expected what can be written, got /dev/fd/", {"--out": Path(f"/dev/fd/{read}")})
    os.close(read)
    os.close(write)
    refused("--out: expected what can be written, got /dev/fd/", {"--out": Path(f"/dev/fd/{read}")})
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        refused("--out: expected what can be written", {"--out": tmp_path / "socket"})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to what is read-only")
def test_what_is_read_only_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch(mode=0o400)
    refused("--out: expected a file that may be written, got ", {"--out": tmp_path / "file"})
    (tmp_path / "folder").mkdir(mode=0o500)
    refused("--out: expected a folder that can be written, got ", {"--out": tmp_path / "folder/x"})


def test_one_file_twice_is_refused_whatever_its_names(tmp_path: Path) -> None:
    file, link, hard = tmp_path / "file", tmp_path / "link", tmp_path / "hard"
    link.symlink_to(file)
    both = {"--out": file, "--cache-out": link}
    message = f"--cache-out: expected a file of its own, got {link}, which --out writes"
    refused(message, both)  # neither exists
    file.touch()
    refused(message, both)
    hard.hardlink_to(file)
    refused("--stats: expected a file of its own", {"--out": file, "--stats": hard})
    refused(
        "--stats: expected a file of its own", {"--out": file, "--stats": tmp_path / "x/../file"}
    )


def test_what_is_read_is_not_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    inputs = {
        "--prompts": file,
        "--cache-in": file,
        "--absent": tmp_path / "absent",
        "--none": None,
    }
    message = f"--out: expected a file of its own, got {file}, which --prompts reads"
    refused(message, {"--out": file}, inputs=inputs)
    updates = [("--cache-in", "--cache-out")]
    check_outputs({"--cache-out": file}, inputs={"--cache-in": file}, updates=updates)
    refused("--out: ", {"--out": file}, inputs={"--cache-in": file}, updates=updates)


def test_text_is_text_whatever_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    with writing(path) as file:
        file.write(json.dumps("ü\r\n\udc80", ensure_ascii=False) + "\n")
    assert path.read_bytes() == b'"\xc3\xbc\\r\\n\\udc80"\n'
    assert json.loads(path.read_text()) == "ü\r\n\udc80"
    write_text(path, "a\r\nb")
    assert path.read_bytes() == b"a\r\nb"
    with pytest.raises(KeyError), writing(path) as file:  # noqa: PT012
        file.write("half")
        raise KeyError
    assert path.read_bytes() == b"a\r\nb"
    assert list(tmp_path.iterdir()) == [path]
