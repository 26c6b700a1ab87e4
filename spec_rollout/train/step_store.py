"""A store in which the rollouts of a training step appear when the step is done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from spec_rollout.cache import Store, StoreSize
from spec_rollout.cache.entry import Entry
from spec_rollout.cache.store import Groups


class StepStore:
    """What is put waits for `keep`; `drop` forgets it.

    So a step that fails half way leaves the drafts as it found them, and doing it again gives what
    it would have given.
    """

    def __init__(self, inner: Store) -> None:
        self._inner = inner
        self._waiting: list[tuple[list[tuple[bytes, Mapping[int, Entry]]], int | None]] = []

    def keep(self) -> None:
        """Puts what waits into the store."""
        for groups, max_bytes in self._waiting:
            self._inner.put_many(groups, max_bytes)
        self._waiting.clear()

    def drop(self) -> None:
        """Forgets what waits."""
        self._waiting.clear()

    def put_many(self, groups: Groups, max_bytes: int | None = None) -> int:
        """See `Store.put_many`; none is dropped for space before `keep`."""
        self._waiting.append((list(groups), max_bytes))
        return 0

    def size(self) -> StoreSize:
        """See `Store.size`; without what waits. So are the others."""
        return self._inner.size()

    def get_many(
        self, prompt_keys: Sequence[bytes], sample_ids: Sequence[int]
    ) -> list[Entry | None]:
        """See `Store.get_many`."""
        return self._inner.get_many(prompt_keys, sample_ids)

    def drop_many(
        self, prompt_keys: Sequence[bytes], sample_ids: Sequence[int], entries: Sequence[Entry]
    ) -> int:
        """See `Store.drop_many`."""
        return self._inner.drop_many(prompt_keys, sample_ids, entries)

    def evict(self, max_bytes: int) -> int:
        """See `Store.evict`."""
        return self._inner.evict(max_bytes)

    def replace_all(self, groups: Groups, max_bytes: int | None = None) -> int:
        """See `Store.replace_all`."""
        return self._inner.replace_all(groups, max_bytes)

    def iterate(self) -> Iterator[tuple[bytes, Mapping[int, Entry]]]:
        """See `Store.iterate`."""
        return self._inner.iterate()
