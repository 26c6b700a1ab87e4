"""Writes in the order they were asked for, off the caller's thread."""

from __future__ import annotations

import atexit
import threading
from collections import deque
from collections.abc import Callable

import numpy as np
import torch

_MOST_BYTES = 1 << 30


class Writer:
    """One thread that does jobs in turn; who asks for too much at once waits.

    The first job that fails is the last one: what comes after it would be stored without it. Its
    error is raised by every later call, so nothing is lost in silence.

    Args:
        max_bytes: Of the jobs that wait and the one that runs. A larger job waits to be alone.

    Attributes:
        holds_back: Whether jobs have put aside what a later one is to store, so that not all is
            stored when none waits. Set in jobs.
    """

    def __init__(self, max_bytes: int = _MOST_BYTES) -> None:
        self.max_bytes = max_bytes
        self.holds_back = False
        self._changed = threading.Condition()
        self._jobs: deque[tuple[Callable[[], None], int]] = deque()
        self._num_bytes = 0
        self._error: BaseException | None = None
        self._closed = False
        self._thread: threading.Thread | None = None  # started when there is something to do

    def submit(self, job: Callable[[], None], num_bytes: int = 0) -> None:
        """Has a job done after all those before.

        Args:
            num_bytes: What it keeps in memory until it is done.

        Raises:
            Exception: that an earlier job failed with; this one is not done then.
        """
        with self._changed:
            self._wait_for_room(num_bytes)
            if self._closed:
                raise ValueError("writer: expected an open one, got one that was closed")
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._work, name="rollout writer", daemon=True
                )
                self._thread.start()
                atexit.register(self._finish)
            self._jobs.append((job, num_bytes))
            self._num_bytes += num_bytes
            self._changed.notify_all()

    def wait_for_room(self, num_bytes: int) -> None:
        """Waits as `submit` does, before what is to be submitted takes memory. Raises as it."""
        with self._changed:
            self._wait_for_room(num_bytes)

    def _wait_for_room(self, num_bytes: int) -> None:
        self._changed.wait_for(
            lambda: (
                self._error is not None
                or self._num_bytes == 0
                or self._num_bytes + num_bytes <= self.max_bytes
            )
        )
        self._check()

    def idle(self) -> bool:
        """Whether all jobs are done. Raises as `submit`."""
        with self._changed:
            self._check()
            return not self._jobs

    def flush(self) -> None:
        """Waits until all jobs are done. Raises as `submit`; in a job it does nothing."""
        if threading.current_thread() is self._thread:
            return
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or not self._jobs)
            self._check()

    def close(self) -> None:
        """`flush`, and no more jobs."""
        try:
            self.flush()
        finally:
            self._finish()

    def _finish(self) -> None:
        """Ends the thread when it has done what it was asked for."""
        atexit.unregister(self._finish)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if not self._jobs or self._error is not None:
                    return
                job, num_bytes = self._jobs[0]
            error: BaseException | None = None
            try:
                job()
            except BaseException as raised:
                error = raised
            del job
            with self._changed:
                self._jobs.popleft()
                self._num_bytes -= num_bytes
                self._error = error
                self._changed.notify_all()
                if error is not None:
                    return


class Staging:
    """Buffers that are used again from step to step: copying into fresh memory takes the time of
    the system's handing it out, which is more than that of copying."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []
        self._lock = threading.Lock()

    def copy(self, view: memoryview) -> np.ndarray:
        """A buffer that begins with these bytes; to be given back by `release`."""
        size = len(view)
        with self._lock:
            fitting = [buffer for buffer in self._free if size <= buffer.size <= 4 * size]
            buffer = min(fitting, key=len, default=None)
            self._free = [other for other in self._free if other is not buffer]
        if buffer is None:
            buffer = np.empty(size + size // 4, np.uint8)
        source = torch.from_numpy(np.frombuffer(view, np.uint8))
        torch.from_numpy(buffer[:size]).copy_(source)  # with torch's threads
        return buffer

    def release(self, buffers: list[np.ndarray]) -> None:
        """Of all that were given out, the newest few are kept."""
        with self._lock:
            self._free = [*buffers, *self._free][:5]
