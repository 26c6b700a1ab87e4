"""Storing off the caller's thread: in order, bounded, and no error lost."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from cache_samples import make_rollouts, rows_of

from spec_rollout.cache import MemoryStore, RolloutCache
from spec_rollout.cache.writer import Staging, Writer

A, B = b"prompt-a", b"prompt-b"


class Gate(MemoryStore):
    """A store whose puts wait for `open`, and fail if told to."""

    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Event()
        self.fails = False

    def put_many(self, groups, max_bytes=None):
        assert self.open.wait(30)
        if self.fails:
            raise OSError(28, "No space left on device")
        return super().put_many(groups, max_bytes)


def test_what_is_stored_is_what_was_given_and_is_found_at_once() -> None:
    store, writer = Gate(), Writer()
    cache = RolloutCache(store=store, writer=writer)
    plain = RolloutCache()
    rollouts = make_rollouts([[1, 2, 3], [4]])
    rows = [rollouts, make_rollouts([[5, 6], [7, 8]]), make_rollouts([[9], []])]
    for step in rows:
        plain.store([A, B], [0, 0], step)
        cache.store([A, B], [0, 0], step)
    for step in rows:
        step.response_ids.fill_(-1)  # what the caller does afterwards is not stored
        step.logprobs.fill_(1.0)
    store.open.set()
    a, b = (c.lookup([A, B], [0, 0], max_tokens=9) for c in (plain, cache))
    assert rows_of(a) == rows_of(b) == [[9], [7, 8]]
    assert torch.equal(a.logprobs, b.logprobs)
    assert cache.stats.num_bytes == plain.stats.num_bytes
    writer.close()


def test_who_stores_too_much_at_once_waits() -> None:
    writer = Writer(max_bytes=100)
    hold, done = threading.Event(), []
    writer.submit(lambda: done.append(hold.wait(30)), 80)
    late = threading.Thread(target=lambda: writer.submit(lambda: done.append("late"), 30))
    late.start()
    late.join(0.2)
    assert late.is_alive()
    hold.set()
    late.join(30)
    assert not late.is_alive()
    writer.submit(lambda: done.append("larger than the bound"), 1000)  # alone
    writer.close()
    assert done == [True, "late", "larger than the bound"]


@pytest.mark.parametrize(
    ("key", "bound", "waits"), [(A, None, True), (B, None, False), (B, 10**6, True)]
)
def test_a_lookup_waits_only_for_what_could_change_it(
    key: bytes, bound: int | None, waits: bool
) -> None:
    store, writer = Gate(), Writer()
    cache = RolloutCache(bound, store=store, writer=writer)
    cache.store([A], [0], make_rollouts([[1]]))
    found: list[int] = []

    def look_up() -> None:
        found.extend(cache.lookup([key], [0], max_tokens=9).lens.tolist())

    thread = threading.Thread(target=look_up)
    thread.start()
    thread.join(0.3 if waits else 30)
    assert thread.is_alive() == waits
    store.open.set()
    thread.join(30)
    assert found == [int(key == A)]
    writer.close()


class Interrupted(Writer):
    """Where another thread does something at one moment of the calls of this one."""

    def __init__(self) -> None:
        super().__init__()
        self.meanwhile = dict.fromkeys(("submit", "flush", "idle"), lambda: None)

    def _interrupt(self, moment: str) -> None:
        other, self.meanwhile[moment] = self.meanwhile[moment], lambda: None
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(30)
        assert not thread.is_alive()

    def submit(self, job, num_bytes=0):
        self._interrupt("submit")
        super().submit(job, num_bytes)

    def flush(self):
        super().flush()
        self._interrupt("flush")

    def idle(self):
        is_idle = super().idle()
        self._interrupt("idle")
        return is_idle


@pytest.mark.parametrize("moment", ["submit", "flush", "idle"])
def test_what_is_stored_while_another_thread_waits_is_found_at_once(moment: str) -> None:
    """It is waited for: that the other has seen everything written was before."""
    store, writer = Gate(), Interrupted()
    cache = RolloutCache(store=store, writer=writer)
    store.open.set()
    cache.store([A], [0], make_rollouts([[1]]))
    cache.flush()

    def store_again() -> None:
        store.open.clear()
        cache.store([A], [0], make_rollouts([[2]]))

    if moment == "submit":
        writer.meanwhile["submit"] = cache.flush
        store_again()
    else:
        cache.store([A], [0], make_rollouts([[1]]))
        writer.flush()
        writer.meanwhile[moment] = store_again
        if moment == "flush":
            cache.flush()
        else:
            cache.lookup([B], [0], max_tokens=9)
    threading.Timer(0.2, store.open.set).start()
    assert rows_of(cache.lookup([A], [0], max_tokens=9)) == [[2]]
    cache.flush()
    assert not cache._unwritten
    writer.close()


def test_an_error_is_raised_by_all_that_follows() -> None:
    store, writer = Gate(), Writer()
    cache = RolloutCache(store=store, writer=writer)
    store.fails = True
    cache.store([A], [0], make_rollouts([[1]]))
    store.open.set()
    for call in (
        lambda: cache.lookup([A], [0], max_tokens=9),
        lambda: cache.store([A], [0], make_rollouts([[1]])),
        lambda: cache.stats,
        cache.flush,
        writer.close,
    ):
        with pytest.raises(OSError, match="No space left"):
            call()
    assert store.size().num_groups == 0
    writer._thread.join(30)
    assert not writer._thread.is_alive()


@pytest.mark.slow
def test_a_program_that_ends_stores_first(tmp_path: Path) -> None:
    code = """
import sys, time
from spec_rollout.cache.writer import Writer
writer = Writer()
writer.submit(lambda: (time.sleep(0.3), open(sys.argv[1], "w").write("stored")))
"""
    path = tmp_path / "file"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
    assert path.read_text() == "stored"


def test_buffers_are_used_again() -> None:
    staging = Staging()
    first = staging.copy(memoryview(bytes(range(200))))
    assert first[:200].tolist() == list(range(200))
    staging.release([first])
    assert staging.copy(memoryview(b"x" * 220)) is first
    assert staging.copy(memoryview(b"x" * 220)) is not first
    staging.release([first])
    assert staging.copy(memoryview(b"x" * 20)) is not first  # which would hold ten times its size
