"""The lock of a run: one holder, named; free again however the holder ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spec_rollout.runs.files import check_new_run_dir
from spec_rollout.runs.lock import RunInUseError, RunLock

HOLD = """
import sys, time
from pathlib import Path
from spec_rollout.runs.lock import RunLock
lock = RunLock(Path(sys.argv[1]), "resume")
print("held", flush=True)
time.sleep(60)
"""
COUNT = """
import sys, time
from pathlib import Path
from spec_rollout.runs.lock import RunInUseError, RunLock
folder = Path(sys.argv[1])
for _ in range(50):
    while True:
        try:
            lock = RunLock(folder, "resume")
        except RunInUseError:
            time.sleep(1e-3)  # who holds it may need the processor
            continue
        break
    number = int((folder / "number").read_text())
    (folder / "number").write_text(str(number + 1))
    lock.release()
"""


def test_the_second_one_is_refused_and_told_who_has_it(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, "resume")
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    with pytest.raises(
        RunInUseError,
        match=rf"^resume: expected a run that no process works on, got {str(tmp_path)!r}, on "
        rf"which {re.escape(holder)} \(since \d{{4}}-.*\) works$",
    ):
        RunLock(tmp_path, "resume")
    check_new_run_dir(tmp_path)  # the lock's own file makes a folder no less empty
    lock.release()
    assert list(tmp_path.iterdir()) == []
    lock.release()
    second = RunLock(tmp_path, "resume")
    lock.release()  # which has nothing to do with the second one
    with pytest.raises(RunInUseError):
        RunLock(tmp_path, "resume")
    second.release()


def test_a_killed_holder_holds_no_more(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(RunInUseError, match=rf"process {process.pid} on"):
        RunLock(tmp_path, "resume")
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
    lock = RunLock(tmp_path, "resume")
    assert f"process {os.getpid()} on" in (tmp_path / "run.lock").read_text()
    lock.release()


def test_a_forked_process_does_not_inherit_it(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, "resume")
    here, there = socket.socketpair()
    child = os.fork()
    if child == 0:
        here.close()
        there.send(b"up")
        there.recv(1)  # until the parent's end is closed
        os._exit(0)
    there.close()
    assert here.recv(2) == b"up"
    # The parent ends without a word, as when it is killed: its file is closed, that is all.
    lock._close()
    RunLock(tmp_path, "resume").release()
    here.close()
    assert os.waitpid(child, 0)[1] == 0


def test_a_forked_process_does_not_lift_it_either(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, "resume")
    child = os.fork()
    if child == 0:
        lock.release()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    with pytest.raises(RunInUseError):
        RunLock(tmp_path, "resume")
    lock.release()


def test_a_file_removed_before_it_is_locked_is_not_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = RunLock(tmp_path, "resume")
    real = os.open

    def late(*args, **kwargs):
        number = real(*args, **kwargs)
        first.release()  # which removes the file that is open now
        return number

    monkeypatch.setattr(os, "open", late)
    second = RunLock(tmp_path, "resume")
    monkeypatch.undo()
    with pytest.raises(RunInUseError):
        RunLock(tmp_path, "resume")
    second.release()


def test_no_two_of_many_hold_it_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "number").write_text("0")
    command = [sys.executable, "-c", COUNT, str(tmp_path)]
    processes = [subprocess.Popen(command) for _ in range(3)]
    deadline = time.monotonic() + 120
    for process in processes:
        assert process.wait(timeout=max(1, deadline - time.monotonic())) == 0
    assert (tmp_path / "number").read_text() == "150"
