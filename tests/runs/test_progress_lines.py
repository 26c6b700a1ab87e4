from __future__ import annotations

import contextlib
import io
import os
import pty
import subprocess
import sys
import termios
import threading
from typing import Any

import pytest

from spec_rollout.runs.progress import ProgressLines, clock_time, progress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (65.9, "1:05"),
        (600, "10:00"),
        (3599, "59:59"),
        (3600, "1:00:00"),
        (7384, "2:03:04"),
    ],
)
def test_times_are_those_of_a_clock(seconds: float, text: str) -> None:
    assert clock_time(seconds) == text


def _lines(clock: Clock, **given: Any) -> tuple[ProgressLines, io.StringIO]:
    out = io.StringIO()
    return ProgressLines(10, "step", every=30.0, stream=out, clock=clock, **given), out


def test_a_line_says_how_far_it_is_and_how_long_the_rest_takes() -> None:
    clock = Clock()
    lines, out = _lines(clock, initial=2)
    lines.set_description("run: epoch 0 rollout")
    clock.now = 30.0
    lines.say_if_due()
    assert out.getvalue() == "run: epoch 0 rollout: 2 of 10 steps, 0:30 gone\n"
    clock.now = 90.0
    lines.set_postfix(reward="0.250", tokens_per_second="512")
    lines.update(2)
    # Two steps in 90 seconds, six to go.
    assert out.getvalue().splitlines()[1] == (
        "run: epoch 0 rollout: 4 of 10 steps, 1:30 gone, about 4:30 left, reward 0.250, "
        "tokens per second 512"
    )


def test_lines_come_no_more_often_than_they_may() -> None:
    clock = Clock()
    lines, out = _lines(clock)
    for second in range(100):
        clock.now = float(second)
        lines.update(0)
        lines.say_if_due()
    assert [line.split(", ")[1] for line in out.getvalue().splitlines()] == [
        "0:30 gone", "1:00 gone", "1:30 gone",
    ]  # fmt: skip


def test_what_is_over_says_nothing_more_and_a_closed_stream_is_no_error() -> None:
    clock = Clock()
    lines, out = _lines(clock)
    with lines:
        clock.now = 31.0
        lines.update(1)
    clock.now = 99.0
    lines.say_if_due()
    assert len(out.getvalue().splitlines()) == 1
    lines, out = _lines(clock)
    out.close()
    clock.now = 200.0
    lines.update(1)


@pytest.mark.slow
def test_a_long_silence_is_broken_although_nothing_is_done() -> None:
    said = threading.Event()

    class Stream(io.StringIO):
        def write(self, text: str) -> int:
            said.set()
            return super().write(text)

    with ProgressLines(10, "rollout", every=0.01, stream=Stream()):
        assert said.wait(60.0)


_SCRIPT = """
import sys
from spec_rollout.runs import progress
progress.EVERY = 0.0
with progress.progress(4, "step", shown=sys.argv[1]) as shown:
    shown.set_description("run")
    shown.update(2)
"""


def _stderr_of(shown: str, *, terminal: bool) -> str:
    argv = [sys.executable, "-c", _SCRIPT, shown]
    if not terminal:
        return subprocess.run(argv, capture_output=True, text=True, check=True).stderr
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 100))
    try:
        try:
            subprocess.run(argv, stderr=slave, check=True)
        finally:
            os.close(slave)
        said = b""
        # One read gives what has come through so far; behind the last there is an error.
        with contextlib.suppress(OSError):
            while part := os.read(master, 65536):
                said += part
        return said.decode()
    finally:
        os.close(master)


def test_a_bar_on_a_terminal_and_lines_elsewhere() -> None:
    assert "run: 2 of 4 steps" in _stderr_of("auto", terminal=False)
    assert "2/4" in _stderr_of("auto", terminal=True)
    assert "2/4" in _stderr_of("on", terminal=False)
    assert _stderr_of("off", terminal=False) == ""


def test_nothing_is_said_of_what_is_over_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(4, "step") as shown:
        shown.update(4)
    assert capsys.readouterr().err == ""
