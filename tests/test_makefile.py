"""Recipes that run tests beside others: they fail where one of them does, and leave none running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# In place of the environments' Python: a line for each call, its arguments in brackets. In one write,
# as calls at the same time would mix their parts.
FAKE = """#!/bin/sh
arguments=$(printf '<%s>' "$@")
echo "$$ $arguments" >> "$STARTED"
[ "$3" != "$FAILING" ] || exit 3
[ -z "$LASTING" ] || exec sleep 600
"""
# The parts of `make test`, by their first argument behind `-m pytest`.
PARTS = (
    "tests/engines/vllm_plugin",
    "tests/engines/vllm_v2",
    "tests/ablate",
    "--ignore=tests/engines/vllm_plugin",
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there is vLLM on Linux only")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An environment that has nothing but a Python that notes what it is called with."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(FAKE)
    (tmp_path / "bin" / "python").chmod(0o755)
    (tmp_path / ".installed").touch()
    return tmp_path


@pytest.fixture(params=["/bin/sh", "/bin/bash"])
def shell(request: pytest.FixtureRequest) -> str:
    if not Path(request.param).exists():
        pytest.skip(f"there is no {request.param}")
    return request.param


def start(folder: Path, target: str, shell: str, **variables: str) -> subprocess.Popen[bytes]:
    command = ["make", "--no-print-directory", "-o", "venv-vllm", target, f"SHELL={shell}"]
    # Nothing is installed or built.
    command += ["MAKE=true", "PYTHON=true", f"VENV={folder}", f"VENV_VLLM={folder}"]
    plain = {"STARTED": str(folder / "started"), "FAILING": "none", "LASTING": ""}
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **plain, **variables}, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        # What is run in the background ignores it, and so would all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def started(folder: Path) -> Iterator[tuple[int, str]]:
    """Process and arguments of each call so far."""
    path = folder / "started"
    for line in path.read_text().splitlines() if path.exists() else ():
        pid, _, arguments = line.partition(" ")
        yield int(pid), arguments


def runs(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


@pytest.mark.parametrize("failing", ["none", *PARTS])
def test_make_test_runs_every_part_and_fails_where_one_does(
    folder: Path, shell: str, failing: str
) -> None:
    process = start(folder, "test", shell, FAILING=failing)
    assert process.wait(60) == (0 if failing == "none" else 2)
    calls = [arguments.split("><") for _, arguments in started(folder)]
    assert sorted(call[2].rstrip(">") for call in calls) == sorted(PARTS)
    (v2,) = (call for call in calls if call[2] == "tests/engines/vllm_v2")
    assert v2[3:] == ["-m", "not v2_large>"]


@pytest.mark.parametrize("target", ["test", "test-v2"])
def test_tests_that_run_beside_others_end_with_them(folder: Path, shell: str, target: str) -> None:
    process = start(folder, target, shell, LASTING="yes")
    pids: list[int] = []
    try:
        deadline = time.monotonic() + 60
        while len(pids) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
            pids = [pid for pid, _ in started(folder)]
        assert len(pids) == 2
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) != 0
        while any(map(runs, pids)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not any(map(runs, pids))
    finally:
        (folder / "bin" / "python").unlink()  # nothing more is started
        for pid in (process.pid, *(pid for pid, _ in started(folder))):
            if runs(pid):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def test_what_python_compiles_is_kept(tmp_path: Path) -> None:
    """In a container that says otherwise, every process of the tests would compile torch anew."""
    (tmp_path / "Makefile").write_text(
        (ROOT / "Makefile").read_text() + "\nshow:\n\t@env\n", encoding="utf-8"
    )
    done = subprocess.run(
        ["make", "--no-print-directory", "show"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "KEPT": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    names = {line.partition("=")[0] for line in done.stdout.splitlines()}
    assert "KEPT" in names
    assert "PYTHONDONTWRITEBYTECODE" not in names
