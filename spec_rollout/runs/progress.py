"""How far something long is: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Literal, Self, TextIO

EVERY = 30.0  # seconds between lines


def clock_time(seconds: float) -> str:
    """1:05 for 65 seconds, 2:00:00 for two hours."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def progress(
    total: int,
    unit: str,
    *,
    initial: int = 0,
    shown: Literal["auto", "on", "off"] = "auto",
) -> Any:
    """A context manager with tqdm's `update`, `set_description` and `set_postfix`.

    Args:
        total: How many there are to do.
        unit: What, in the singular.
        initial: How many are done already.
        shown: "auto" is a bar if stderr is a terminal, and lines if not; "on" is the bar anyway;
            "off" is neither.
    """
    if shown == "on" or (shown == "auto" and sys.stderr.isatty()):
        from tqdm import tqdm

        return tqdm(total=total, initial=initial, unit=unit, dynamic_ncols=True)
    every = float("inf") if shown == "off" else EVERY
    return ProgressLines(total, unit, initial=initial, every=every)


class Ticker:
    """A context in which a thread calls `tick_once` every second."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def __enter__(self) -> Self:
        threading.Thread(target=self._tick, name="progress", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def tick_once(self) -> None:
        """What is done every second."""
        raise NotImplementedError

    def _tick(self) -> None:
        while not self._stop.wait(1.0):
            self.tick_once()


class ProgressLines(Ticker):
    """Says on stderr how far it is, at most once in `every` seconds, and so often at least.

    Nothing is said of what takes less time than that.

    Args:
        total, unit, initial: As in `progress`.
        every: Seconds; infinity says nothing.
        stream: Where lines go; None is stderr.
        clock: Seconds since any moment.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        *,
        initial: int = 0,
        every: float = EVERY,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._total = total
        self._unit = unit
        self._first = self._done = initial
        self._every = every
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._begin = self._said = clock()
        self._doing = ""
        self._figures: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self if self._every == float("inf") else super().__enter__()

    def update(self, n: int) -> None:
        """So many more are done."""
        with self._lock:
            self._done += n
        self.say_if_due()

    def set_description(self, doing: str) -> None:
        """What is going on now."""
        self._doing = doing

    def set_postfix(self, **figures: str) -> None:
        """What to show beside it, by name."""
        self._figures = figures

    def line(self) -> str:
        """How far it is."""
        gone = self._clock() - self._begin
        done = self._done - self._first
        parts = [f"{self._done} of {self._total} {self._unit}s", f"{clock_time(gone)} gone"]
        if done:
            parts.append(f"about {clock_time(gone / done * (self._total - self._done))} left")
        parts += [f"{name.replace('_', ' ')} {value}" for name, value in self._figures.items()]
        return (f"{self._doing}: " if self._doing else "") + ", ".join(parts)

    def tick_once(self) -> None:
        """See `Ticker`."""
        self.say_if_due()

    def say_if_due(self) -> None:
        """A line, if the last one is `every` seconds old."""
        with self._lock:
            now = self._clock()
            if self._stop.is_set() or now - self._said < self._every:
                return
            self._said = now
            with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
                print(self.line(), file=self._stream, flush=True)
