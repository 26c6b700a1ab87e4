"""Work done in processes of its own, which may be killed at any moment.

Forked, not started anew: importing torch takes longer than what is tried. The parent opens no store.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple


class Ended(NamedTuple):
    """How a child ended.

    Attributes:
        said: What it said, in order.
        signal: That ended it; None if it ended by itself.
        error: Its traceback; empty if there was none.
    """

    said: list[Any]
    signal: int | None
    error: str


class Child:
    """A forked process that does `work(say)`; what it says arrives here, whatever becomes of it."""

    def __init__(self, work: Callable[[Callable[[Any], None]], None]) -> None:
        self._pipe, pipe = os.pipe()
        self._text = b""
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._pipe)
            _work(work, pipe)
        os.close(pipe)

    def wait_for_word(self, seconds: float = 60.0) -> None:
        """Until it has said something, or ended."""
        while b"\n" not in self._text and seconds > 0:
            came = self._read(1.0)
            if came is False:
                return
            seconds -= came is None

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def end(self, seconds: float = 120.0) -> Ended:
        """Waits until it has ended; kills it if that takes too long.

        Seconds are counted one by one: a machine that stands still meanwhile loses one.
        """
        while (came := self._read(1.0)) is not False and seconds > 0:
            seconds -= came is None
        if came is not False:
            self.kill()
        _, status = os.waitpid(self.pid, 0)
        os.close(self._pipe)
        lines = self._text.split(b"\n")[:-1]  # a line that was cut short was not said
        said = [json.loads(line) for line in lines]
        error = ""
        if said and isinstance(said[-1], dict) and "traceback" in said[-1]:
            error = said.pop()["traceback"]
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        return Ended(said, number, error)

    def _read(self, seconds: float) -> bool | None:
        """Whether something came; False at the end, None if nothing did for so long."""
        if not select.select([self._pipe], [], [], seconds)[0]:
            return None
        data = os.read(self._pipe, 1 << 16)
        self._text += data
        return bool(data)


def run(work: Callable[[Callable[[Any], None]], None]) -> Ended:
    """Does work in a child that nobody kills."""
    return Child(work).end()


def _work(work: Callable[[Callable[[Any], None]], None], pipe: int) -> None:
    def say(what: Any) -> None:
        os.write(pipe, json.dumps(what).encode() + b"\n")

    status = 0
    try:
        work(say)
    except BaseException:
        say({"traceback": traceback.format_exc()})
        status = 1
    finally:
        os._exit(status)  # nothing of the parent is to be closed or flushed here
