"""A store in which the rollouts of a training step appear when the step is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

from spec_rollout.cache import Store, StoreSize
from spec_rollout.cache.entry import Entry
from spec_rollout.cache.store import Groups
from spec_rollout.cache.writer import Writer


class StepStore:
    """What is put waits for `keep`; `drop` forgets it.

    So a step that fails half way leaves the drafts as it found them, and doing it again gives what
    it would have given.
    """

    def __init__(self, inner: Store, writer: Writer | None = None) -> None:
        """A step's store.

        Args:
            inner: Where steps are kept.
            writer: Of the cache that puts here: keeping and dropping take their turn with it.
        """
        self.inner = inner
        self.writer = writer
        self._waiting: list[tuple[list[tuple[bytes, Mapping[int, Entry]]], int | None]] = []

    def keep(self) -> None:
        """Puts what waits into the store."""
        self._in_turn(self._keep)

    def drop(self) -> None:
        """Forgets what waits."""
        self._in_turn(self._drop)

    def _keep(self) -> None:
        if self._waiting:
            # Of all calls at once: a store on disk has a step whole or not at all.
            _, max_bytes = self._waiting[-1]
            self.inner.put_many([g for groups, _ in self._waiting for g in groups], max_bytes)
        self._drop()

    def _drop(self) -> None:
        self._waiting.clear()
        self._holds_back(False)

    def _holds_back(self, something: bool) -> None:
        if self.writer is not None:
            self.writer.holds_back = something

    def _in_turn(self, job: Callable[[], None]) -> None:
        if self.writer is None:
            job()
        else:
            self.writer.submit(job)

    def put_many(self, groups: Groups, max_bytes: int | None = None) -> int:
        """See `Store.put_many`; none is dropped for space before `keep`."""
        self._waiting.append((list(groups), max_bytes))
        self._holds_back(True)
        return 0

    def size(self) -> StoreSize:
        """See `Store.size`; without what waits. So are the others."""
        return self.inner.size()

    def get_many(
        self, prompt_keys: Sequence[bytes], sample_ids: Sequence[int]
    ) -> list[Entry | None]:
        """See `Store.get_many`."""
        return self.inner.get_many(prompt_keys, sample_ids)

    def borrow_many(
        self, prompt_keys: Sequence[bytes], sample_ids: Sequence[int]
    ) -> AbstractContextManager[list[Entry | None]]:
        """See `Store.borrow_many`."""
        return self.inner.borrow_many(prompt_keys, sample_ids)

    def drop_many(
        self, prompt_keys: Sequence[bytes], sample_ids: Sequence[int], entries: Sequence[Entry]
    ) -> int:
        """See `Store.drop_many`."""
        return self.inner.drop_many(prompt_keys, sample_ids, entries)

    def evict(self, max_bytes: int) -> int:
        """See `Store.evict`."""
        return self.inner.evict(max_bytes)

    def replace_all(self, groups: Groups, max_bytes: int | None = None) -> int:
        """See `Store.replace_all`."""
        return self.inner.replace_all(groups, max_bytes)

    def iterate(self) -> Iterator[tuple[bytes, Mapping[int, Entry]]]:
        """See `Store.iterate`."""
        return self.inner.iterate()
