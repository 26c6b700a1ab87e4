"""Signals that ask to stop (Ctrl-C, SIGTERM, a terminal that goes away): heeded at the next safe
place, not wherever the signal happened to arrive."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from spec_rollout.engines.base import RolloutEngine

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Aborted(Exception):
    """Raised in the middle of a rollout or an evaluation because a signal asked to stop."""


class RunInterrupted(SystemExit):
    """A run ended by a signal, its checkpoint written.

    `code` is 128 + the signal's number (130, 143, 129).
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(128 + signum)
        self.signum = signum
        self.message = message

    def __str__(self) -> str:
        return self.message


class StopRequest:
    """Notes the first SIGINT, SIGTERM or SIGHUP while active; a second one has its usual effect at
    once. A SIGHUP that is ignored (`nohup`) stays so.

    Outside the main thread, where Python delivers no signals, only `request` asks to stop.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for signum in _SIGNALS:
                if signum == signal.SIGHUP and signal.getsignal(signum) is signal.SIG_IGN:
                    continue
                self._previous[signum] = signal.signal(signum, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def request(self, signum: int = signal.SIGINT) -> None:
        """Asks to stop, as a signal would."""
        self.signum = signum

    def check(self) -> None:
        """Raises `Aborted` if a stop was asked for."""
        if self.signum is not None:
            raise Aborted

    @contextmanager
    def aborting(self, engine: RolloutEngine) -> Iterator[None]:
        """Within this block a stop request aborts before the engine's next step, and on entry."""
        self.check()
        before, engine.before_step = engine.before_step, self.check
        try:
            yield
        finally:
            engine.before_step = before

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        self.request(signum)
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            signum, handler = self._previous.popitem()
            signal.signal(signum, handler)
