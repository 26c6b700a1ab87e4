"""What holds of every store (`spec_rollout.cache.store.Store`)."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from cache_samples import check_integrity, content_of, entry_of, put

from spec_rollout.cache import Store
from spec_rollout.cache.entry import UNREADABLE, Entry, group_bytes, is_sound
from spec_rollout.cache.store import Groups

A, B, C, D = b"prompt-a", b"prompt-b", b"prompt-c", b"prompt-d"


def _order(store: Store) -> list[bytes]:
    return [key for key, _ in store.iterate()]


def _bytes_of(num_samples: int, num_tokens: int = 10) -> int:
    return group_bytes({s: entry_of(A, s, [1] * num_tokens) for s in range(num_samples)})


def test_a_new_store_is_empty(store: Store) -> None:
    assert store.size() == (0, 0, 0)
    assert store.get_many([A, B], [0, 1]) == [None, None]
    assert list(store.iterate()) == []
    assert store.evict(0) == 0


def test_empty_batches_change_nothing(store: Store) -> None:
    put(store, A, 0)
    put(store, B, 0)
    before = content_of(store)
    assert store.get_many([], []) == []
    assert store.put_many([]) == 0
    assert store.put_many([(A, {}), (C, {})], max_bytes=10**6) == 0
    assert store.drop_many([], [], []) == 0
    assert content_of(store) == before
    check_integrity(store)


def test_what_was_put_comes_back_in_the_order_asked_for(store: Store) -> None:
    a = {0: entry_of(A, 0, [1, 2]), 7: entry_of(A, 7, [3], policy_version=5)}
    b = {0: entry_of(B, 0, [4], logprobs=False)}
    assert store.put_many([(A, a), (B, b)]) == 0
    found = store.get_many([B, A, C, A, B, A, A], [0, 7, 0, 0, 1, 7, 1])
    assert found == [b[0], a[7], None, a[0], None, a[7], None]


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("trainer_logprobs", [False, True])
def test_every_bit_comes_back(store: Store, logprobs: bool, trainer_logprobs: bool) -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 4 * 1024, dtype=np.uint32)
    array = bits.tobytes()  # NaN payloads too
    entry = Entry(
        array,
        array[::-1] if logprobs else None,
        array if trainer_logprobs else None,
        1,
        -(2**63),
        9,
        array[:-4] if logprobs else None,
        array[:8] if trainer_logprobs else None,
    )
    store.put_many([(A, {0: entry})])
    assert store.get_many([A], [0]) == [entry]
    assert content_of(store) == [(A, {0: entry})]


def test_keys_of_any_length_and_all_sample_ids_stay_apart(store: Store) -> None:
    # One key is the start of another; some are longer than a disk store's own keys or pages.
    keys = [b"\0", b"\0\0", b"\0\0\0", b"x" * 600, b"x" * 601, b"\xff", bytes(5000)]
    ids = [0, 1, 255, 256, 2**31, 2**32, 2**63 - 1]
    groups = {k: {s: entry_of(k, s, [row, s % 97]) for s in ids} for row, k in enumerate(keys)}
    store.put_many(groups.items())
    rows = [(key, sample_id) for sample_id in ids for key in keys]
    found = store.get_many([key for key, _ in rows], [sample_id for _, sample_id in rows])
    assert found == [groups[key][sample_id] for key, sample_id in rows]
    assert content_of(store) == list(groups.items())
    check_integrity(store)


def test_an_entry_replaces_its_own_and_other_samples_stay(store: Store) -> None:
    put(store, A, 0, 1, num_tokens=3)
    put(store, B, 0, num_tokens=3)
    longer = entry_of(A, 1, [7] * 50)
    store.put_many([(A, {1: longer, 2: entry_of(A, 2, [8])})])
    kept = entry_of(A, 0, [1] * 3)
    assert store.get_many([A, A, A], [0, 1, 2]) == [kept, longer, entry_of(A, 2, [8])]
    check_integrity(store)
    assert store.put_many([(A, {1: entry_of(A, 1, [7])}), (A, {1: longer})]) == 0
    assert store.get_many([A], [1]) == [longer]  # of equal rows the last one
    check_integrity(store)


def test_bytes_are_counted_alike_on_every_medium(store: Store) -> None:
    put(store, A, 0, 1, num_tokens=10)
    put(store, B, 5, num_tokens=1000)
    store.put_many([(C, {0: entry_of(C, 0, [1] * 7, logprobs=False, trainer_logprobs=True)})])
    # 256 an entry and 448 a group, 4 a token and 4 a log-prob.
    expected = (448 + 2 * (256 + 80)) + (448 + 256 + 8000) + (448 + 256 + 56)
    assert store.size() == (3, 4, expected)


def test_getting_and_putting_use_a_group_and_nothing_else_does(store: Store) -> None:
    for key in (A, B, C, D):
        put(store, key, 0)
    assert _order(store) == [A, B, C, D]
    store.get_many([B, A], [0, 0])
    assert _order(store) == [C, D, B, A]
    store.get_many([C], [99])  # a missed sample uses its group all the same
    assert _order(store) == [D, B, A, C]
    store.get_many([D, b"none", D, B, D], [0, 0, 5, 0, 0])  # the last use counts
    assert _order(store) == [A, C, B, D]
    put(store, A, 1)
    assert _order(store) == [C, B, D, A]
    store.size()
    store.evict(10**9)
    entry = entry_of(C, 0, [1] * 10)
    store.drop_many([B, C], [0, 0], [entry, UNREADABLE])
    assert _order(store) == [C, B, D, A]


def test_dropping_one_sample_leaves_the_groups_place(store: Store) -> None:
    put(store, A, 0, 1)
    put(store, B, 0)
    assert store.drop_many([A], [0], [entry_of(A, 0, [1] * 10)]) == 1
    assert _order(store) == [A, B]
    check_integrity(store)


def test_only_the_very_entry_is_dropped(store: Store) -> None:
    old, new = entry_of(A, 0, [1]), entry_of(A, 0, [2])
    put(store, B, 0)
    store.put_many([(A, {0: old})])
    store.put_many([(A, {0: new})])  # meanwhile
    almost = [new._replace(checksum=new.checksum ^ 1), new._replace(logprobs=None), UNREADABLE]
    assert store.drop_many([A] * 4, [0] * 4, [old, *almost]) == 0
    assert store.drop_many([A, C], [1, 0], [new, new]) == 0
    assert store.get_many([A], [0]) == [new]
    assert store.drop_many([A, A], [0, 0], [new, new]) == 1
    assert store.get_many([A], [0]) == [None]
    assert _order(store) == [B]  # the group went with its last entry
    check_integrity(store)


def test_a_store_checks_nothing(store: Store) -> None:
    """What is corrupt is for the cache to say: it comes back as it is, and can be dropped."""
    wrong = entry_of(A, 0, [1, 2])._replace(checksum=12345)
    swapped = entry_of(B, 3, [1, 2])
    store.put_many([(A, {0: wrong, 1: swapped}), (B, {0: UNREADABLE})])
    found = store.get_many([A, A, B], [0, 1, 0])
    assert found == [wrong, swapped, UNREADABLE]
    check_integrity(store)
    assert store.drop_many([A, A, B], [0, 1, 0], [wrong, swapped, UNREADABLE]) == 3
    assert store.size() == (0, 0, 0)


def test_the_least_recently_used_groups_go_until_the_bound_holds(store: Store) -> None:
    for key in (A, B, C, D):
        put(store, key, 0)
    store.get_many([A], [0])
    one = _bytes_of(1)
    assert store.evict(4 * one) == 0
    assert store.evict(4 * one - 1) == 1
    assert _order(store) == [C, D, A]
    assert store.evict(2 * one - 1) == 2
    assert _order(store) == [A]
    check_integrity(store)
    assert store.evict(0) == 1
    assert store.size() == (0, 0, 0)


def test_the_bound_is_restored_after_every_group(store: Store) -> None:
    put(store, A, 0)
    put(store, B, 0)
    entry = entry_of(A, 1, [1] * 10)
    # C drives A out before A's turn comes, so that A comes back without the sample it had.
    groups = [(C, {0: entry_of(C, 0, [1] * 10)}), (A, {1: entry})]
    assert store.put_many(groups, max_bytes=2 * _bytes_of(1)) == 2
    assert [(key, list(samples)) for key, samples in store.iterate()] == [(C, [0]), (A, [1])]
    check_integrity(store)


def test_a_group_over_the_bound_goes_whole_and_alone(store: Store) -> None:
    put(store, A, 0)
    put(store, B, 0)
    bound = 2 * _bytes_of(1)
    assert store.put_many([(B, {1: entry_of(B, 1, [1] * 400)})], max_bytes=bound) == 1
    assert content_of(store) == [(A, {0: entry_of(A, 0, [1] * 10)})]
    check_integrity(store)
    assert store.put_many([(C, {0: entry_of(C, 0, [1])})], max_bytes=0) == 1
    assert _order(store) == [A]  # which was there before the bound: only `evict` would remove it


def test_a_group_that_fits_exactly_stays(store: Store) -> None:
    groups = [(A, {0: entry_of(A, 0, [1] * 10), 1: entry_of(A, 1, [1] * 10)})]
    assert store.put_many(groups, max_bytes=_bytes_of(2)) == 0
    assert store.put_many(groups, max_bytes=_bytes_of(2)) == 0  # replacing adds nothing
    assert store.put_many(groups, max_bytes=_bytes_of(2) - 1) == 1


def test_replacing_everything_is_putting_into_an_empty_store(store: Store) -> None:
    put(store, A, 0, 1)
    put(store, D, 0)
    groups = {key: {0: entry_of(key, 0, [1] * 10)} for key in (C, B, A)}
    assert store.replace_all(groups.items(), max_bytes=2 * _bytes_of(1)) == 1
    assert content_of(store) == [(B, groups[B]), (A, groups[A])]
    check_integrity(store)
    assert store.replace_all([]) == 0
    assert store.size() == (0, 0, 0)


def _failing(*groups: tuple[bytes, dict[int, Entry]]) -> Groups:
    yield from groups
    raise OSError("no more")


def test_a_failing_replacement_leaves_the_old_content(store: Store) -> None:
    put(store, A, 0)
    put(store, B, 0)
    before = content_of(store)
    with pytest.raises(OSError, match="no more"):
        store.replace_all(_failing((C, {0: entry_of(C, 0, [1])}), (A, {0: entry_of(A, 0, [9])})))
    assert content_of(store) == before
    check_integrity(store)


def test_a_failing_put_leaves_whole_groups(store: Store) -> None:
    put(store, A, 0, 1)
    b = {s: entry_of(B, s, [1]) for s in range(3)}
    with pytest.raises(OSError, match="no more"):
        store.put_many(_failing((B, b)))
    content = dict(content_of(store))
    assert set(content[A]) == {0, 1}
    assert content.get(B, b) == b
    check_integrity(store)
    put(store, C, 0)  # and the store goes on
    assert store.get_many([C], [0]) == [entry_of(C, 0, [1] * 10)]


def test_iterating_is_a_snapshot(store: Store) -> None:
    for key in (A, B, C):
        put(store, key, 0, 1)
    before = content_of(store)
    groups = store.iterate()
    seen = [next(groups)]
    store.drop_many([B], [0], [entry_of(B, 0, [1] * 10)])
    store.get_many([C], [0])
    store.put_many([(C, {0: entry_of(C, 0, [9])}), (D, {0: entry_of(D, 0, [9])})])
    seen += groups
    assert [(key, dict(samples)) for key, samples in seen] == before
    put(store, A, 2)
    groups = store.iterate()
    next(groups)
    store.replace_all([])
    assert len(list(groups)) == 3


def test_what_was_given_back_does_not_change(store: Store) -> None:
    samples = {0: entry_of(A, 0, [1])}
    store.put_many([(A, samples)])
    samples[0] = entry_of(A, 0, [2])
    samples[1] = entry_of(A, 1, [3])
    assert content_of(store) == [(A, {0: entry_of(A, 0, [1])})]
    for _, given in store.iterate():
        kept = dict(given)
        store.put_many([(A, samples)])
        assert given == kept


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Threads that change as often as the interpreter lets them."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("eager_threads")
def test_threads_leave_the_sums_right_and_see_whole_groups(store: Store) -> None:
    """Every put writes samples 0 and 1 of a group with the same tokens: nobody may see others."""
    keys = [bytes([key]) * 8 for key in range(8)]
    bound = 5 * _bytes_of(2, num_tokens=20)
    errors: list[str] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for step in range(120):
            picked = [keys[k] for k in rng.integers(0, len(keys), 4)]
            if step % 3 == 0:
                tokens = [int(rng.integers(1, 99))] * int(rng.integers(1, 20))
                pairs = ((k, {s: entry_of(k, s, tokens) for s in (0, 1)}) for k in picked)
                store.put_many(pairs, bound)
            elif step % 3 == 1:
                for key, samples in store.iterate():
                    if samples[0].token_ids != samples[1].token_ids:
                        errors.append(f"key {key!r} was seen half put")
            else:
                for key, entry in zip(picked, store.get_many(picked, [0] * 4), strict=True):
                    if entry is not None and not is_sound(key, 0, entry):
                        errors.append(f"key {key!r} came back as {entry}")
            if store.size().num_bytes > bound:
                errors.append("the bound did not hold")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert store.size().num_groups > 0
    check_integrity(store)


@pytest.mark.usefixtures("eager_threads")
def test_threads_that_put_into_the_same_groups_lose_nothing(store: Store) -> None:
    def samples_of(key: bytes, thread: int) -> dict[int, Entry]:
        return {s: entry_of(key, s, [thread + 1]) for s in range(100 * thread, 100 * thread + 50)}

    mine = [[(key, samples_of(key, thread)) for key in (A, B)] for thread in range(4)]

    def work(thread: int) -> None:
        for _ in range(100):
            store.put_many(mine[thread])

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check_integrity(store)
    content = dict(content_of(store))
    for groups in mine:
        for key, samples in groups:
            assert samples.items() <= content[key].items()
