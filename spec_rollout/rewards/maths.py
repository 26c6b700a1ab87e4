"""Answers judged by mathematical equality (math-verify), in processes that can be stopped.

math-verify's own time limit is an alarm signal: it works in the main thread only, and does not end
a computation that Python waits for. Here each answer has its limit in any thread, and no response
takes the trainer with it (`maths_worker`).
"""

from __future__ import annotations

import atexit
import json
import math
import os
import select
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from importlib.util import find_spec
from typing import Any

from spec_rollout.extras import install_command
from spec_rollout.rewards import maths_worker

_MOST_PROCESSES = 8
# Rounds of a second to wait for a process, beyond ten times an answer's limit. A limit of time on
# the clock for what uses no processor; no such thing is known.
_PATIENCE = 120


@dataclass(frozen=True, slots=True)
class Grade:
    """What came of a response.

    Attributes:
        correct: It states the answer.
        out_of_time: It could not be judged within its time or memory; it is not correct then.
    """

    correct: bool
    out_of_time: bool = False


def grade_answers(
    responses: Sequence[str], answers: Sequence[Any], *, seconds: float = 5.0
) -> list[Grade]:
    r"""Whether each response states its answer: whether the two are mathematically equal.

    A response states what its last \boxed{...} holds, else what follows its last "####" (no
    heading), else the number or formula after the last "answer is" or "answer:" in it, else the
    last one (docs/data.md has more of it). An answer is such a text, too (a worked solution, say),
    a bare expression, a number, or a list of these of which any will do.

    May be called from any thread. The processes that judge, as many as there are processors but at
    most 8, are started by the first call and stay.

    Args:
        responses: Texts.
        answers: Of the same length.
        seconds: Processor time for each.

    Raises:
        ImportError: if math-verify is not installed.
    """
    if len(responses) != len(answers):
        raise ValueError(
            f"answers: expected one per response ({len(responses)}), got {len(answers)}"
        )
    requests = [
        [response, [_text(item) for item in (answer if isinstance(answer, list) else [answer])]]
        for response, answer in zip(responses, answers, strict=True)
    ]
    return _pool().grade(requests, seconds) if requests else []


class MathVerify:
    """`grade_answers` as a reward: 1 for a correct response, else 0.

    Attributes:
        num_out_of_time: Responses of the last call that could not be judged in time.
    """

    def __init__(self, seconds: float = 5.0) -> None:
        self._seconds = seconds
        self.num_out_of_time = 0

    def __call__(self, responses: Sequence[str], answers: Sequence[Any]) -> list[float]:
        grades = grade_answers(responses, answers, seconds=self._seconds)
        self.num_out_of_time = sum(grade.out_of_time for grade in grades)
        return [float(grade.correct) for grade in grades]


def math_verify(responses: Sequence[str], answers: Sequence[Any]) -> list[float]:
    """1 for each response that states its answer, else 0; see `grade_answers`."""
    return MathVerify()(responses, answers)


def problem_with_installation() -> str | None:
    """Why answers cannot be judged; None if they can."""
    if find_spec("math_verify") is not None:
        return None
    return f"needs math-verify ({install_command('math_verify')}), found no module math_verify"


def _text(answer: Any) -> str:
    if isinstance(answer, float) and math.isfinite(answer):
        # The shortest digits that give it, without an exponent: to mathematics e is a number. With
        # 0.0 added, -0 is 0.
        answer = Decimal(repr(float(answer) + 0.0)).normalize()
    if isinstance(answer, Decimal):
        return f"{answer:f}"
    return str(answer)


class _WorkerDied(Exception):
    """The process ended, or was ended, over an answer."""


class _Worker:
    """A process that judges one answer after the other."""

    def __init__(self) -> None:
        # -P: this folder's modules are not to be found by their bare names.
        command = [sys.executable, "-P", maths_worker.__file__]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0)
        self._ready = False

    def ask(self, response: str, answers: list[str], seconds: float) -> str:
        """What the process says of a response.

        Raises:
            _WorkerDied: if it says nothing.
            RuntimeError: if it never could.
        """
        if not self._ready:
            self._wait_until_ready()
        line = json.dumps([response, answers, seconds]).encode() + b"\n"
        assert self._process.stdin is not None
        try:
            remaining = memoryview(line)
            while remaining:
                remaining = remaining[self._process.stdin.write(remaining) or 0 :]
        except OSError:
            raise _WorkerDied from None
        return self._answer(int(10 * seconds) + _PATIENCE)

    def _wait_until_ready(self) -> None:
        try:
            said = self._answer(_PATIENCE)
        except _WorkerDied:
            said = ""
        if said != maths_worker.READY:
            self.kill()
            assert self._process.stderr is not None
            reason = self._process.stderr.read().decode(errors="replace").strip()
            raise RuntimeError(
                f"the process that judges answers did not start: {reason[-500:] or repr(said)}"
            )
        self._ready = True

    def _answer(self, rounds: int) -> str:
        """The next line.

        Args:
            rounds: Of a second each. They are counted, for a clock goes on while both processes are
                stopped from outside.
        """
        assert self._process.stdout is not None
        read = b""
        for _ in range(rounds):
            if not select.select([self._process.stdout], [], [], 1.0)[0]:
                continue
            part = self._process.stdout.read(100)
            if not part:
                break
            read += part
            if read.endswith(b"\n"):
                return read[:-1].decode()
        self.kill()
        raise _WorkerDied

    @property
    def has_ended(self) -> bool:
        """Whether somebody ended the process between two answers."""
        return self._process.poll() is not None

    def close(self) -> None:
        """Lets the process end."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


class _Pool:
    """Processes that judge side by side."""

    def __init__(self) -> None:
        self._workers: list[_Worker | None] = [None] * min(_MOST_PROCESSES, _num_processors())
        self._lock = threading.Lock()

    def grade(self, requests: Sequence[list[Any]], seconds: float) -> list[Grade]:
        """Grades of [response, answers] each."""
        grades: list[Grade] = [Grade(False)] * len(requests)
        todo = iter(enumerate(requests))
        size = min(len(self._workers), len(requests))
        with self._lock, ThreadPoolExecutor(size) as threads:
            lock = threading.Lock()
            futures = [
                threads.submit(self._work, slot, todo, lock, seconds, grades)
                for slot in range(size)
            ]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                with lock:
                    for _ in todo:  # nobody takes another one
                        pass
                self._kill()
                raise
        return grades

    def _work(
        self,
        slot: int,
        todo: Iterator[tuple[int, list[Any]]],
        lock: threading.Lock,
        seconds: float,
        grades: list[Grade],
    ) -> None:
        while True:
            with lock:
                index, request = next(todo, (-1, None))
            if request is None:
                return
            worker = self._workers[slot]
            if worker is None or worker.has_ended:
                worker = self._workers[slot] = _Worker()
            response, answers = request
            try:
                said = worker.ask(response, answers, seconds)
            except _WorkerDied:
                worker.kill()
                self._workers[slot] = None
                said = maths_worker.OUT_OF_TIME
            except BaseException:
                self._workers[slot] = None
                raise
            grades[index] = Grade(
                said == maths_worker.RIGHT, out_of_time=said == maths_worker.OUT_OF_TIME
            )

    def _kill(self) -> None:
        for worker in self._workers:
            if worker is not None:
                worker.kill()

    def close(self) -> None:
        for worker in self._workers:
            if worker is not None:
                worker.close()


def _num_processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_shared: _Pool | None = None


def _pool() -> _Pool:
    global _shared
    if _shared is None:
        problem = problem_with_installation()
        if problem is not None:
            raise ImportError(f"judging mathematical answers {problem}")
        _shared = _Pool()
    return _shared


@atexit.register
def _close() -> None:
    if _shared is not None:
        _shared.close()


def _forget() -> None:
    """The processes belong to the parent of a fork."""
    global _shared
    _shared = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
