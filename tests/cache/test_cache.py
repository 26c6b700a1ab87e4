from __future__ import annotations

import gc
import sys
import threading
import tracemalloc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_samples import check_integrity, logprob_rows_of, make_rollouts, reused, rows_of

from spec_rollout.cache import MemoryStore, RolloutCache, Store, file
from spec_rollout.cache.entry import UNREADABLE
from spec_rollout.types import FinishReason, Rollouts

A, B, C = b"prompt-a", b"prompt-b", b"prompt-c"


def test_rows_come_back_by_key_and_sample_whatever_the_order_and_batch() -> None:
    cache = RolloutCache()
    cache.store([A, A, B], [0, 1, 0], make_rollouts([[1, 2, 3], [4], [5, 6]]))
    drafts = cache.lookup([B, C, A, B, A, A], [0, 0, 1, 1, 0, 1], max_tokens=10)
    assert rows_of(drafts) == [[5, 6], [], [4], [], [1, 2, 3], [4]]
    assert logprob_rows_of(drafts)[4] == [-1 / 8, -2 / 8, -3 / 8]
    assert drafts.finished.tolist() == [True, False, True, False, True, True]
    stats = cache.stats
    assert (stats.hits, stats.misses, stats.num_groups, stats.num_samples) == (4, 2, 2, 3)


def test_a_lookup_of_nothing_and_an_empty_batch_are_empty_drafts_with_logprobs() -> None:
    cache = RolloutCache()
    cache.store([], [], make_rollouts([]))
    assert rows_of(cache.lookup([], [], max_tokens=5)) == []
    drafts = cache.lookup([A], [0], max_tokens=5)
    assert rows_of(drafts) == [[]]
    assert drafts.logprobs is not None
    assert drafts.logprobs.dtype == torch.float32


def test_every_bit_of_tokens_and_logprobs_survives() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 2**31 - 1, (64,), generator=generator, dtype=torch.int32)
    bits = torch.randint(-(2**31), 2**31 - 1, (64,), generator=generator).to(torch.int32)
    logprobs = bits.view(torch.float32)  # every kind of float, NaN payloads too
    rollouts = replace(make_rollouts([list(range(40)), list(range(24))]), response_ids=tokens)
    rollouts = replace(rollouts, logprobs=logprobs)
    cache = RolloutCache()
    cache.store([A, B], [3, 2**62], rollouts, trainer_logprobs=logprobs.flip(0))
    drafts = cache.lookup([A, B], torch.tensor([3, 2**62]), max_tokens=99)
    assert torch.equal(drafts.token_ids, tokens)
    assert torch.equal(drafts.logprobs.view(torch.int32), bits)
    drafts = cache.lookup([A, B], np.array([3, 2**62]), max_tokens=99, trainer_logprobs=True)
    assert torch.equal(drafts.logprobs.view(torch.int32), bits.flip(0))


def test_a_draft_over_the_new_limit_is_cut_and_no_longer_finished() -> None:
    cache = RolloutCache()
    cache.store([A, A, A], [0, 1, 2], make_rollouts([[1, 2, 3, 4], [5, 6, 7], [8]]))
    drafts = cache.lookup([A, A, A], [0, 1, 2], max_tokens=3)
    assert rows_of(drafts) == [[1, 2, 3], [5, 6, 7], [8]]
    assert logprob_rows_of(drafts)[0] == [-1 / 8, -2 / 8, -3 / 8]
    assert drafts.finished.tolist() == [False, True, True]
    whole = cache.lookup([A], [0], max_tokens=4)
    assert rows_of(whole) == [[1, 2, 3, 4]]  # the cut was of the copy
    assert whole.finished.tolist() == [True]


def test_a_draft_that_the_old_limit_cut_is_to_be_continued() -> None:
    cache = RolloutCache()
    reasons = [FinishReason.LENGTH, FinishReason.STOP]
    cache.store([A, A], [0, 1], make_rollouts([[1, 2], [3, 4]], finish_reasons=reasons))
    assert cache.lookup([A, A], [0, 1], max_tokens=9).finished.tolist() == [False, True]


def test_aborted_and_empty_rollouts_leave_what_was_cached() -> None:
    cache = RolloutCache()
    cache.store([A, B], [0, 0], make_rollouts([[1, 2], [3]]))
    reasons = [FinishReason.ABORT, FinishReason.LENGTH, FinishReason.ABORT]
    cache.store([A, B, C], [0, 0, 0], make_rollouts([[7], [], [8]], finish_reasons=reasons))
    assert rows_of(cache.lookup([A, B, C], [0, 0, 0], max_tokens=9)) == [[1, 2], [3], []]
    assert cache.stats.num_groups == 2


def test_storing_again_replaces_and_other_samples_stay() -> None:
    cache = RolloutCache()
    cache.store([A] * 4, range(4), make_rollouts([[1], [2], [3], [4]]))
    cache.store([A] * 2, range(2), make_rollouts([[5, 5], [6]]))  # fewer samples this epoch
    assert rows_of(cache.lookup([A] * 4, range(4), max_tokens=9)) == [[5, 5], [6], [3], [4]]
    cache.store([A, A], [7, 7], make_rollouts([[8], [9]]))
    assert rows_of(cache.lookup([A], [7], max_tokens=9)) == [[9]]  # the last of equal rows


def test_neither_the_stored_nor_the_returned_tensors_are_shared() -> None:
    cache = RolloutCache()
    rollouts = make_rollouts([[1, 2], [3]])
    trainer = torch.tensor([-0.5, -1.0, -2.0], requires_grad=True)
    cache.store([A, B], [0, 0], rollouts, trainer)
    rollouts.response_ids.fill_(99)
    rollouts.logprobs.fill_(99)
    with torch.no_grad():
        trainer.fill_(99)
    first = cache.lookup([A, B], [0, 0], max_tokens=9)
    first.token_ids.fill_(77)
    first.logprobs.fill_(77)
    again = cache.lookup([A, B], [0, 0], max_tokens=9)
    assert rows_of(again) == [[1, 2], [3]]
    assert again.logprobs.tolist() == [-1 / 8, -2 / 8, -3 / 8]
    again = cache.lookup([A, B], [0, 0], max_tokens=9, trainer_logprobs=True)
    assert again.logprobs.tolist() == [-0.5, -1.0, -2.0]
    assert not again.logprobs.requires_grad
    assert cache.stats.corrupt == 0


def test_a_stored_slice_does_not_keep_the_whole_tensor_alive() -> None:
    whole = np.zeros(1 << 20, dtype=np.int32)
    alive = weakref.ref(whole)
    rollouts = replace(make_rollouts([[0, 0]]), response_ids=torch.from_numpy(whole)[7:9])
    cache = RolloutCache()
    cache.store([A], [0], rollouts)
    del rollouts, whole
    gc.collect()
    assert alive() is None
    assert rows_of(cache.lookup([A], [0], max_tokens=9)) == [[0, 0]]


def test_strided_tensors_are_stored_by_value() -> None:
    rollouts = make_rollouts([[1, 2, 3]])
    strided = torch.tensor([1, 0, 2, 0, 3, 0], dtype=torch.int32)[::2]
    cache = RolloutCache()
    cache.store([A], [0], replace(rollouts, response_ids=strided))
    assert rows_of(cache.lookup([A], [0], max_tokens=9)) == [[1, 2, 3]]


def _group_bytes(num_samples: int, num_tokens: int) -> int:
    cache = RolloutCache()
    rollouts = make_rollouts([[1] * num_tokens] * num_samples)
    cache.store([A] * num_samples, range(num_samples), rollouts)
    return cache.stats.num_bytes


def test_the_least_recently_used_group_goes_first() -> None:
    cache = RolloutCache(max_bytes=3 * _group_bytes(1, 10))
    row = make_rollouts([[1] * 10])
    for key in (A, B, C):
        cache.store([key], [0], row)
    cache.lookup([A], [0], max_tokens=9)  # touches A: B is now the oldest
    cache.store([b"prompt-d"], [0], row)
    found = cache.lookup([A, B, C, b"prompt-d"], [0] * 4, max_tokens=10).lens.tolist()
    assert found == [10, 0, 10, 10]
    assert cache.stats.evictions == 1
    cache.store([A], [0], row)  # storing touches too
    cache.store([B], [0], row)
    found = cache.lookup([A, B, C, b"prompt-d"], [0] * 4, max_tokens=10).lens.tolist()
    assert found == [10, 10, 0, 10]


def test_a_missed_sample_still_touches_its_group() -> None:
    cache = RolloutCache(max_bytes=2 * _group_bytes(1, 10))
    row = make_rollouts([[1] * 10])
    cache.store([A], [0], row)
    cache.store([B], [0], row)
    cache.lookup([A], [5], max_tokens=10)
    cache.store([C], [0], row)
    assert cache.lookup([A, B, C], [0] * 3, max_tokens=10).lens.tolist() == [10, 0, 10]


def test_a_group_over_the_bound_is_dropped_whole_and_the_others_stay() -> None:
    cache = RolloutCache(max_bytes=2 * _group_bytes(1, 10))
    cache.store([A, B], [0, 0], make_rollouts([[1] * 10, [2] * 10]))
    cache.store([B, B], [1, 2], make_rollouts([[3] * 200, [4] * 200]))
    found = cache.lookup([A, B, B, B], [0, 0, 1, 2], max_tokens=10).lens.tolist()
    assert found == [10, 0, 0, 0]
    assert cache.stats.evictions == 1
    assert cache.stats.num_bytes == _group_bytes(1, 10)


def test_a_bound_of_nothing_holds_nothing() -> None:
    cache = RolloutCache(max_bytes=0)
    cache.store([A, B], [0, 0], make_rollouts([[1], [2]]))
    assert cache.lookup([A, B], [0, 0], max_tokens=9).lens.tolist() == [0, 0]
    assert cache.stats.num_bytes == 0
    assert cache.stats.evictions == 2


@pytest.mark.parametrize(
    ("num_groups", "num_samples", "num_tokens"),
    [
        (2000, 1, 1),  # all overhead
        (500, 8, 5),
        (20, 8, 2000),  # all payload
    ],
)
def test_num_bytes_is_the_memory_used(num_groups: int, num_samples: int, num_tokens: int) -> None:
    keys = [(i // num_samples).to_bytes(16, "little") for i in range(num_groups * num_samples)]
    ids = np.arange(len(keys)) % num_samples + 1000  # not CPython's cached small integers
    rollouts = make_rollouts([[1] * num_tokens] * len(keys), policy_version=1000)
    cache = RolloutCache()
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    cache.store([bytes(bytearray(key)) for key in keys], ids, rollouts)
    gc.collect()
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert cache.stats.num_bytes == pytest.approx(used, rel=0.25)


def _corrupt(store: Store, key: bytes, sample_id: int, field: str) -> None:
    """Damages one field of a cached entry as a bad memory cell would: the checksum stays."""
    (entry,) = store.get_many([key], [sample_id])
    assert entry is not None
    value = getattr(entry, field)
    damaged = bytes([value[0] ^ 1]) + value[1:] if isinstance(value, bytes) else value ^ 1
    store.put_many([(key, {sample_id: entry._replace(**{field: damaged})})])


@pytest.mark.parametrize(
    "field",
    [
        *("token_ids", "logprobs", "trainer_logprobs", "finish_reason", "policy_version"),
        *("checksum", "behaviour_logprobs", "ages"),
    ],
)
def test_a_corrupt_entry_is_a_miss_is_counted_and_is_gone(store: Store, field: str) -> None:
    cache = RolloutCache(store=store)
    rollouts = reused(make_rollouts([[1, 2], [3], [4]]))
    cache.store([A, A, B], [0, 1, 0], rollouts, rollouts.logprobs * 2)
    _corrupt(store, A, 0, field)
    _corrupt(store, B, 0, field)
    drafts = cache.lookup([A, A, B], [0, 1, 0], max_tokens=9)
    assert rows_of(drafts) == [[], [3], []]
    assert drafts.finished.tolist() == [False, True, False]
    stats = cache.stats
    assert (stats.corrupt, stats.hits, stats.misses) == (2, 1, 2)
    assert (stats.num_groups, stats.num_samples) == (1, 1)
    assert cache.lookup([A], [0], max_tokens=9).lens.tolist() == [0]
    assert cache.stats.corrupt == 2  # dropped, so not found corrupt again
    cache.store([A, B], [0, 0], make_rollouts([[5], [6]]))
    assert rows_of(cache.lookup([A, A, B], [0, 1, 0], max_tokens=9)) == [[5], [3], [6]]


def test_swapped_entries_are_corrupt(store: Store) -> None:
    """The checksum covers what an entry belongs to, not just its content."""
    cache = RolloutCache(store=store)
    cache.store([A, B], [0, 1], make_rollouts([[1], [1]]))
    (a, b) = store.get_many([A, B], [0, 1])
    store.put_many([(A, {0: b}), (B, {1: a})])
    assert cache.lookup([A, B], [0, 1], max_tokens=9).lens.tolist() == [0, 0]
    assert cache.stats.corrupt == 2


def test_an_unreadable_record_is_a_corrupt_entry(store: Store, tmp_path: Path) -> None:
    cache = RolloutCache(store=store)
    cache.store([A, A], [0, 1], make_rollouts([[1], [2]]))
    store.put_many([(A, {0: UNREADABLE}), (B, {0: UNREADABLE})])
    assert rows_of(cache.lookup([A, A, A], [0, 0, 1], max_tokens=9)) == [[], [], [2]]
    assert cache.stats.corrupt == 1  # one entry, looked up twice
    cache.save(tmp_path / "cache")
    assert cache.stats.corrupt == 2
    assert [key for key, _ in store.iterate()] == [A]
    assert list(file.read(tmp_path / "cache").groups) == [A]  # no group of nothing


def test_a_cache_takes_over_what_its_store_holds(store: Store) -> None:
    first = RolloutCache(store=store)
    first.store([A, B, C], [0, 0, 0], make_rollouts([[1, 2], [3], [4]]))
    first.lookup([A], [0], max_tokens=9)
    size = first.stats.num_bytes
    second = RolloutCache(max_bytes=size - 1, store=store)
    assert second.stats.evictions == 1
    assert rows_of(second.lookup([A, B, C], [0, 0, 0], max_tokens=9)) == [[1, 2], [], [4]]
    assert (second.stats.hits, second.stats.misses) == (2, 1)
    assert (first.stats.hits, first.stats.misses, first.stats.evictions) == (1, 0, 0)
    second.store([B], [1], make_rollouts([[5]]))
    assert rows_of(first.lookup([B], [1], max_tokens=9)) == [[5]]


def test_without_logprobs_drafts_have_none() -> None:
    cache = RolloutCache(keep_logprobs=False)
    cache.store([A], [0], make_rollouts([[1, 2]]))
    drafts = cache.lookup([A], [0], max_tokens=9)
    assert drafts.logprobs is None
    assert rows_of(drafts) == [[1, 2]]
    assert cache.lookup([A], [0], max_tokens=9, trainer_logprobs=True).logprobs is None
    assert cache.stats.num_bytes == _group_bytes(1, 2) - 8


def test_a_rollout_takes_the_bytes_that_say_something() -> None:
    rollouts = make_rollouts([[1, 2, 3]])
    for options, fresh, partly_reused in (
        ({}, 8, 14),  # ids and log-probs; behaviour log-probs and ages beside them
        ({"keep_behaviour": False}, 8, 8),
        ({"keep_logprobs": False}, 4, 4),
        ({"keep_logprobs": False, "keep_behaviour": True}, 8, 10),
    ):
        for given, num_bytes in ((rollouts, fresh), (reused(rollouts), partly_reused)):
            cache = RolloutCache(**options)
            cache.store([A], [0], given)
            assert cache.stats.num_bytes == _group_bytes(1, 1) - 8 + 3 * num_bytes


def test_origins_come_back_an_epoch_older(store: Store) -> None:
    cache = RolloutCache(store=store)
    cache.store([A, B], [0, 0], make_rollouts([[1, 2], [3]]))
    drafts = cache.lookup([A, B], [0, 0], max_tokens=9)
    assert (drafts.behaviour_logprobs, drafts.ages) == (None, None)  # log-probs; 1 each
    cache.store([A], [0], reused(make_rollouts([[1, 2]])))
    drafts = cache.lookup([B, A, C, A], [0, 0, 0, 0], max_tokens=1)
    assert drafts.behaviour_logprobs is not None
    assert drafts.ages is not None
    # B is of log-probs -3/8; A was reused, with 1 added to its log-probs of -1/8 and -2/8.
    assert drafts.behaviour_logprobs.tolist() == [-3 / 8, 7 / 8, 7 / 8]
    assert drafts.ages.tolist() == [1, 4, 4]


@pytest.mark.parametrize(
    ("prompt_keys", "sample_ids", "match"),
    [
        ([A, B], [0], r"sample_ids: expected 2 integers.*\[1\]"),
        ([A], [[0]], r"sample_ids: expected 1 integers.*\[1, 1\]"),
        ([A], [0.0], "sample_ids: .*float64"),
        ([A], [True], "sample_ids: .*bool"),
        ([A], [-1], "sample_ids: expected 0 <= .*-1"),
        ([A], [2**63], "sample_ids: expected 0 <= "),
        (["a"], [0], "prompt_keys: expected non-empty bytes, row 0 is 'a'"),
        ([A, b""], [0, 0], "prompt_keys: .*row 1 is b''"),
    ],
)
def test_bad_rows_are_refused(prompt_keys: list, sample_ids: list, match: str) -> None:
    cache = RolloutCache()
    with pytest.raises(ValueError, match=match):
        cache.lookup(prompt_keys, sample_ids, max_tokens=9)
    with pytest.raises(ValueError, match=match):
        cache.store(prompt_keys, sample_ids, make_rollouts([[1]] * len(prompt_keys)))
    assert cache.stats.num_groups == 0


def _bad_stores() -> list[tuple[Rollouts, torch.Tensor | None, str]]:
    good = make_rollouts([[1, 2]])
    return [
        (make_rollouts([[1], [2]]), None, "rollouts: expected 1 rows, got 2"),
        (good, torch.zeros(3), r"trainer_logprobs: expected torch.float32 of shape \[2\].*\[3\]"),
        (good, torch.zeros(2, dtype=torch.float64), "trainer_logprobs: .*float64"),
        (good, torch.zeros(1, 2), r"trainer_logprobs: .*\[1, 2\]"),
    ]


@pytest.mark.parametrize(("rollouts", "trainer_logprobs", "match"), _bad_stores())
def test_bad_stores_are_refused_and_store_nothing(
    rollouts: Rollouts, trainer_logprobs: torch.Tensor | None, match: str
) -> None:
    cache = RolloutCache()
    with pytest.raises(ValueError, match=match):
        cache.store([A], [0], rollouts, trainer_logprobs)
    assert cache.stats.num_groups == 0


def test_bad_limits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"max_bytes: .*-1"):
        RolloutCache(max_bytes=-1)
    with pytest.raises(ValueError, match=r"max_tokens: .*0"):
        RolloutCache().lookup([A], [0], max_tokens=0)


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Threads that change as often as the interpreter lets them."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("eager_threads")
def test_threads_see_whole_rollouts_and_the_byte_count_stays_right() -> None:
    store = MemoryStore()
    cache = RolloutCache(max_bytes=6 * _group_bytes(4, 30), store=store)
    keys = [bytes([key]) * 8 for key in range(10)]
    errors: list[str] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for step in range(150):
            batch = [int(b) for b in rng.integers(0, len(keys), 6)]
            ids = [int(s) for s in rng.integers(0, 4, 6)]
            # A response says whose it is; its length says nothing, its tokens are all equal.
            responses = [
                [100 * b + s] * int(rng.integers(1, 40)) for b, s in zip(batch, ids, strict=True)
            ]
            if step % 2:
                cache.store([keys[b] for b in batch], ids, make_rollouts(responses))
                continue
            drafts = cache.lookup([keys[b] for b in batch], ids, max_tokens=50)
            for b, s, row in zip(batch, ids, rows_of(drafts), strict=True):
                if set(row) - {100 * b + s}:
                    errors.append(f"sample {s} of key {b} came back as {row}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    stats = cache.stats
    assert stats.corrupt == 0
    assert stats.evictions > 0
    check_integrity(store)
    assert stats.hits + stats.misses == 4 * 75 * 6
