"""Finished rollouts of this engine for others of the machine, and theirs for this one."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from spec_rollout.drafting import NO_TAG, Drafter, HistoryFolder, HistoryIdentity, KeptRows

_POLL_SECONDS = 0.25
# What waits to be written, and what was read and waits for a step.
_MOST_WAITING_BYTES = 1 << 24
_TOKEN_BYTES = 8
# What a step takes in: some milliseconds.
_STEP_TOKENS = 1 << 12

Finished = tuple[bytes, int, np.ndarray, np.ndarray]


@dataclass(slots=True)
class SharingCounters:
    """Since the engine started.

    Attributes:
        num_shared: Rollouts written for others.
        num_unshared: That were not: the folder failed or was too slow, or they were too long.
        num_received: Rollouts of others taken in.
        num_damaged_records: Of others, left out (`HistoryFolder.num_damaged`).
        num_share_errors: Times that the folder could not be read or written.
    """

    num_shared: int = 0
    num_unshared: int = 0
    num_received: int = 0
    num_damaged_records: int = 0
    num_share_errors: int = 0


class HistorySharing:
    """A folder of rollouts, read and written by a thread of its own.

    Steps never wait for it: what it has no room for is not shared, and counted. A folder that fails
    is said once in the log, counted, and tried again with what comes next.

    Args:
        folder: None: there is none to be had.
        write_log: Takes a line for the log.
        poll_seconds: Between two looks at the folder.
    """

    def __init__(
        self,
        folder: HistoryFolder | None,
        write_log: Callable[[str], None],
        *,
        poll_seconds: float = _POLL_SECONDS,
    ) -> None:
        self._folder = folder
        self._mail = _Mail(write_log)
        self._poll_seconds = poll_seconds

    @classmethod
    def in_folder(
        cls,
        path: str,
        identity: HistoryIdentity,
        max_bytes: int,
        write_log: Callable[[str], None],
    ) -> HistorySharing:
        """In a folder at `path`; arguments as of `HistoryFolder`.

        Raises:
            ValueError: if it holds another model's rollouts, or something else; naming the path.
        """
        try:
            folder = HistoryFolder(path, identity, max_bytes)
            # In memory a token takes about three times as much as there.
            folder.skip_oldest(max_bytes // 3)
        except OSError as error:
            sharing = cls(None, write_log)
            sharing._mail.failed(error)
            return sharing
        return cls(folder, write_log)

    def start(self, drafter: Drafter) -> None:
        """Adds what is there already, then begins to share.

        Args:
            drafter: Of the engine; used in this call only.
        """
        if self._folder is None:
            return
        self._mail.guarded(_read_all, self._folder, drafter, self._mail)
        thread = threading.Thread(
            target=_exchange,
            args=(self._folder, self._mail, self._poll_seconds),
            name="shared rollouts",
            daemon=True,
        )
        thread.start()
        # An engine is dropped without a word, at the latest when the process ends.
        self.stop = weakref.finalize(self, _end, self._mail, thread)

    def offer(
        self, group: bytes, tag: int | None, token_ids: np.ndarray, logprobs: np.ndarray
    ) -> None:
        """A rollout is finished.

        Args:
            group, tag: As the drafter was told.
            token_ids: [len], int32.
            logprobs: NaN where not known. [len], float32.
        """
        if self._folder is None:
            self._mail.written(0, 1)
        else:
            self._mail.offer((group, NO_TAG if tag is None else tag, token_ids, logprobs))

    def give_to(self, drafter: Drafter) -> None:
        """Adds rollouts that others finished, as many as a step has time for."""
        room = _STEP_TOKENS
        while room > 0 and (rows := self._mail.take()) is not None:
            self._mail.counters.num_received += drafter.add_rows(rows)
            room -= rows.token_ids.size

    def info(self) -> dict[str, int]:
        """Counters."""
        return asdict(self._mail.counters)


class _Mail:
    """What the steps and the thread hand each other; nobody holds the lock for long."""

    def __init__(self, write_log: Callable[[str], None]) -> None:
        self.counters = SharingCounters()
        self._write_log = write_log
        self.ending = threading.Event()
        self._lock = threading.Lock()
        self._finished: list[Finished] = []
        self._finished_tokens = 0
        self._received: deque[KeptRows] = deque()
        self._received_tokens = 0

    def offer(self, rollout: Finished) -> None:
        num_tokens = rollout[2].size
        with self._lock:
            if (self._finished_tokens + num_tokens) * _TOKEN_BYTES > _MOST_WAITING_BYTES:
                self.counters.num_unshared += 1
                return
            self._finished.append(rollout)
            self._finished_tokens += num_tokens

    def finished(self) -> list[Finished]:
        """All that waits to be written."""
        with self._lock:
            rollouts, self._finished, self._finished_tokens = self._finished, [], 0
            return rollouts

    def written(self, num_shared: int, num_lost: int) -> None:
        with self._lock:
            self.counters.num_shared += num_shared
            self.counters.num_unshared += num_lost

    def failed(self, error: Exception) -> None:
        """Counts it; says so the first time."""
        self.counters.num_share_errors += 1
        if self.counters.num_share_errors == 1:
            self._write_log(
                "spec_rollout: rollouts are not shared as they should be, requests are served as "
                f"ever: {error} (said once; num_share_errors counts)"
            )

    def guarded(self, work: Callable[..., None], *args: Any) -> None:
        """Does it; whatever comes of it, the engine goes on."""
        try:
            work(*args)
        except Exception as error:
            self.failed(error)

    def has_room(self) -> bool:
        return self._received_tokens * _TOKEN_BYTES < _MOST_WAITING_BYTES

    def deliver(self, received: list[KeptRows]) -> None:
        with self._lock:
            self._received += received
            self._received_tokens += sum(rows.token_ids.size for rows in received)

    def take(self) -> KeptRows | None:
        if not self._received:  # of most steps
            return None
        with self._lock:
            rows = self._received.popleft()
            self._received_tokens -= rows.token_ids.size
            return rows


def _exchange(folder: HistoryFolder, mail: _Mail, poll_seconds: float) -> None:
    """The thread. It does not know the engine, which may be gone before it."""
    is_ending = False
    while not is_ending:
        is_ending = mail.ending.wait(poll_seconds)
        mail.guarded(_write, folder, mail)
        mail.guarded(_read, folder, mail)
        mail.counters.num_damaged_records = folder.num_damaged
    folder.close()


def _read_all(folder: HistoryFolder, drafter: Drafter, mail: _Mail) -> None:
    while received := folder.read():
        for rows in received:
            mail.counters.num_received += drafter.add_rows(rows)


def _write(folder: HistoryFolder, mail: _Mail) -> None:
    rollouts = mail.finished()
    if not rollouts:
        return
    num_shared = 0
    try:
        num_shared = folder.append(_rows_of(rollouts))
    finally:
        mail.written(num_shared, len(rollouts) - num_shared)


def _read(folder: HistoryFolder, mail: _Mail) -> None:
    while mail.has_room() and not mail.ending.is_set():
        received = folder.read()
        if not received:
            return
        mail.deliver(received)


def _rows_of(rollouts: list[Finished]) -> KeptRows:
    keys, tags, token_ids, logprobs = zip(*rollouts, strict=True)
    lens = [ids.size for ids in token_ids]
    return KeptRows(
        np.frombuffer(b"".join(keys), np.int64).reshape(-1, 2),
        np.array(tags, np.int64),
        np.concatenate([[0], np.cumsum(lens)]).astype(np.int64),
        np.concatenate(token_ids),
        np.concatenate(logprobs),
    )


def _end(mail: _Mail, thread: threading.Thread) -> None:
    """What is finished is written yet, if that is quick."""
    mail.ending.set()
    if thread is not threading.current_thread():  # which may collect the engine
        thread.join(2.0)
