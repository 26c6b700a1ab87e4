"""Rows of a distributed trainer, with ranks in threads that meet in a barrier."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import SAMPLING, build

sys.path.insert(0, str(Path(__file__).parents[1] / "cache"))
from cache_samples import LocalParts

from spec_rollout.acceptance import Coupled
from spec_rollout.adapters.rows import NamedRollouts, RowNumbers, row_user_key, share, split_rows
from spec_rollout.cache import RolloutCache
from spec_rollout.cache.writer import Writer
from spec_rollout.engines import TransformersEngine
from spec_rollout.keys import prompt_key
from spec_rollout.rollout import RolloutSession

A, B, C = (prompt_key([i]) for i in range(3))


class Ranks:
    """Ranks that gather as processes do: all wait, all get everything in the order of ranks."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._barrier = threading.Barrier(count)
        self._values: list[Any] = [None] * count

    def gather(self, rank: int) -> Callable[[Any], list[Any]]:
        def gather(value: Any) -> list[Any]:
            self._values[rank] = value
            self._barrier.wait(30)
            values = list(self._values)
            self._barrier.wait(30)
            return values

        return gather

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        results: list[Any] = [None] * self.count

        def call(rank: int) -> None:
            try:
                results[rank] = work(rank)
            except BaseException as error:
                self._barrier.abort()
                results[rank] = error

        threads = [threading.Thread(target=call, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results


def numbered(ranks: Ranks, *calls: tuple[int, Sequence[Sequence[bytes]]]) -> list[list[list[int]]]:
    """Per call (version, keys of each rank), the sample ids of each rank."""
    numbers = [RowNumbers(ranks.gather(rank), rank) for rank in range(ranks.count)]
    return [
        [ids.tolist() for ids in ranks.run(lambda r, k=keys, v=version: numbers[r].next(k[r], v))]
        for version, keys in calls
    ]


def test_a_group_that_straddles_ranks_is_numbered_through() -> None:
    assert numbered(Ranks(2), (0, [[A, A, A], [A, B, B]])) == [[[0, 1, 2], [3, 0, 1]]]


def test_numbers_do_not_depend_on_the_order_of_the_data_nor_on_the_rank() -> None:
    first = [[A, A, B], [B, C, C]]
    shuffled = [[C, C, A], [A, B, B]]
    before, after = numbered(Ranks(2), (0, first), (7, shuffled))

    def names(keys: list[list[bytes]], ids: list[list[int]]) -> set[tuple[bytes, int]]:
        return {
            (k, i)
            for ks, rows in zip(keys, ids, strict=True)
            for k, i in zip(ks, rows, strict=True)
        }

    assert names(first, before) == names(shuffled, after)
    assert len(names(first, before)) == 6


def test_a_prompt_that_comes_again_before_the_weights_change_counts_on() -> None:
    calls = numbered(Ranks(1), (3, [[A, A]]), (3, [[A, B]]), (4, [[A]]))
    assert calls == [[[0, 1]], [[2, 0]], [[0]]]


def test_a_rank_without_rows_takes_part() -> None:
    assert numbered(Ranks(2), (0, [[], [A, A]]), (0, [[A], []])) == [[[], [0, 1]], [[2], []]]


def test_data_sources_and_items_keep_equal_prompts_apart() -> None:
    keys = {
        row_user_key(*names) for names in (("", ""), ("a", ""), ("", "a"), ("a", 1), ("a1", ""))
    }
    assert len(keys) == 5
    assert row_user_key() == ""
    assert row_user_key("gsm8k", 3) == row_user_key("gsm8k", "3")


@pytest.mark.parametrize("shared", [True, False])
def test_a_row_finds_its_draft_on_the_other_rank(shared: bool) -> None:
    """Two ranks swap their prompts in the second epoch; `Coupled` then keeps every token."""
    ranks = Ranks(2)
    prompts = [[5, 6, 7], [8, 9]]
    models = [build("llama") for _ in range(ranks.count)]  # seeds are the process's, not a thread's

    def work(rank: int) -> tuple[list[list[int]], list[list[int]], int]:
        cache = RolloutCache()
        session = RolloutSession(TransformersEngine(models[rank]), Coupled(), cache=cache)
        responses, reused = [], 0
        for epoch in range(2):
            rows = [prompts[(rank + epoch) % 2]] * 3
            rollouts = session.rollout_rows(rows, [0, 1, 2], SAMPLING, step=epoch, epoch=epoch)
            if shared:
                named = NamedRollouts([prompt_key(row) for row in rows], np.arange(3), rollouts)
                share(cache, [named], ranks.gather(rank), rank)
            responses.append(split_rows(rollouts.response_ids, rollouts.cu_response_lens))
            reused = rollouts.stats.num_reused_tokens
        return responses[0], responses[1], reused

    (first0, second0, reused0), (first1, second1, reused1) = ranks.run(work)
    assert (first0, first1) == (second1, second0)
    assert first0 != first1
    num_tokens = sum(map(len, second0)), sum(map(len, second1))
    assert (reused0, reused1) == (num_tokens if shared else (0, 0))


def test_ranks_with_one_store_wait_for_each_other_and_send_nothing() -> None:
    ranks = Ranks(2)
    store = LocalParts(3)
    prompts = [[5, 6, 7], [8, 9]]
    models = [build("llama") for _ in range(ranks.count)]

    def work(rank: int) -> tuple[int, int]:
        gather = ranks.gather(rank)
        cache = RolloutCache(store=store, writer=Writer())
        session = RolloutSession(TransformersEngine(models[rank]), Coupled(), cache=cache)
        for epoch in range(2):
            rows = [prompts[(rank + epoch) % 2]] * 3
            rollouts = session.rollout_rows(rows, [0, 1, 2], SAMPLING, step=epoch, epoch=epoch)
            named = NamedRollouts([prompt_key(row) for row in rows], np.arange(3), rollouts)
            share(cache, [named], gather, rank)
            assert store.size()[:2] == (2, 6)
        return rollouts.stats.num_reused_tokens, rollouts.response_ids.numel()

    for num_reused, num_tokens in ranks.run(work):
        assert num_reused == num_tokens > 0
    assert sum("put" in call.values() for call in store.asked) == 4  # each rank its own, twice


def test_a_rank_that_generated_nothing_still_gets_the_others_rollouts() -> None:
    ranks = Ranks(2)

    def work(rank: int) -> int:
        cache = RolloutCache()
        named = []
        if rank == 0:
            session = RolloutSession(TransformersEngine(build("llama")), Coupled(), cache=cache)
            rollouts = session.rollout_rows([[5, 6]], [4], SAMPLING, step=0, epoch=0)
            named = [NamedRollouts([prompt_key([5, 6])], np.array([4]), rollouts)]
        share(cache, named, ranks.gather(rank), rank)
        return cache.lookup([prompt_key([5, 6])], [4], max_tokens=99).token_ids.numel()

    first, second = ranks.run(work)
    assert first == second > 0


def test_packed_values_as_lists() -> None:
    assert split_rows(torch.tensor([1, 2, 3]), torch.tensor([0, 2, 2, 3])) == [[1, 2], [], [3]]
