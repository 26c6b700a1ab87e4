"""The event loop in which `async` reward functions run: one of the process, in a thread of its own.

One that stays, for what a function keeps between two steps (a semaphore, the connections of a
client) belongs to the loop that it was first used in. In a thread, for the caller's may have a loop
already.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_loop: asyncio.AbstractEventLoop | None = None
_lock = threading.Lock()


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """What a coroutine returns, from any thread but the loop's. An interrupt cancels it, and does
    not wait for that."""
    loop = _running()
    tasks: list[asyncio.Task[Any] | None] = []
    is_over = False

    async def noted() -> T:
        if is_over:
            coroutine.close()
            raise asyncio.CancelledError
        tasks.append(asyncio.current_task())
        return await coroutine

    def cancel() -> None:
        for task in tasks:
            if task is not None:
                task.cancel()

    try:
        return asyncio.run_coroutine_threadsafe(noted(), loop).result()
    except BaseException:
        # Not by the future: an interrupt may come before that is known here.
        is_over = True
        loop.call_soon_threadsafe(cancel)
        raise


def _running() -> asyncio.AbstractEventLoop:
    global _loop
    with _lock:
        if _loop is None:
            loop = asyncio.new_event_loop()
            threading.Thread(
                target=loop.run_forever, name="spec_rollout-rewards", daemon=True
            ).start()
            _loop = loop
        return _loop


def _forget() -> None:
    """The thread is left behind in the parent of a fork, which may have held the lock."""
    global _loop, _lock
    _loop, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
