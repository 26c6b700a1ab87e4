"""SuffixIndex against a brute-force search, on text that repeats itself a lot."""

from __future__ import annotations

import random

import pytest
import torch

from spec_rollout import _C

START = -1


def brute_force(rows: list[list[int]], order: list[tuple[int, int]], row: int, cap: int):
    """(match length, proposal) of the longest context, the most recently completed one of
    equals."""

    def token(r: int, offset: int) -> int:
        return START if offset == 0 else rows[r][offset - 1]

    best_len, best = 0, None
    for r, offset in order:
        here, k = len(rows[row]), 0
        while k < cap and token(row, here - k) == token(r, offset - k):
            k += 1
            if token(row, here - k + 1) == START:
                k = cap
        if k >= best_len and k > 0:
            best_len, best = k, (r, offset)
    return best_len, [] if best is None else rows[best[0]][best[1] :]


@pytest.mark.parametrize("cap", [1, 3, 64])
@pytest.mark.parametrize("vocab", [1, 2, 6])
def test_finds_the_longest_and_latest_match(vocab: int, cap: int) -> None:
    rng = random.Random(f"{vocab}:{cap}")
    for _ in range(15):
        index = _C.SuffixIndex(cap)
        rows: list[list[int]] = [[] for _ in range(4)]
        order: list[tuple[int, int]] = []  # contexts in the order in which their next token came
        for row in range(4):
            assert index.add_row(rng.choice((0, 50))) == row
        for _ in range(120):
            row = rng.randrange(4)
            again = rows[row] and rng.random() < 0.7
            token = rows[row][-1] if again else rng.randrange(vocab)
            order.append((row, len(rows[row])))
            rows[row].append(token)
            index.extend(row, [token])
            asked = rng.randrange(4)
            match_len, proposal = brute_force(rows, order, asked, cap)
            got, got_len = index.propose(asked, 5, 1, 100.0)
            assert (got_len, got) == (match_len, proposal[:5])


def test_bulk_rows_equal_rows_one_by_one() -> None:
    rng = random.Random(3)
    rows = [[rng.randrange(5) for _ in range(n)] for n in (0, 1, 30, 200)]
    bulk, single = _C.SuffixIndex(64), _C.SuffixIndex(64)
    cu = torch.tensor([0, 0, 1, 31, 231])
    assert bulk.add_rows(torch.tensor([t for row in rows for t in row], dtype=torch.int32), cu) == 0
    for row in rows:
        single.extend(single.add_row(len(row)), row)
    for row in range(4):
        assert bulk.propose(row, 9, 1, 9.0) == single.propose(row, 9, 1, 9.0)
    assert bulk.num_rows == 4
    assert bulk.num_tokens == 231


def test_an_empty_row_continues_like_other_starts() -> None:
    index = _C.SuffixIndex(64)
    row = index.add_row(0)
    assert index.propose(row, 4, 1, 1.0) == ([], 0)
    index.add_rows(torch.tensor([7, 8, 9]), torch.tensor([0, 3]))
    assert index.propose(row, 2, 1, 1.0) == ([7, 8], 64)


def test_proposal_length_and_minimum_match() -> None:
    index = _C.SuffixIndex(64)
    index.add_rows(torch.tensor([1, 2, 3, 4, 5, 6, 7, 8]), torch.tensor([0, 8]))
    row = index.add_row(8)
    index.extend(row, [9, 2, 3])
    assert index.propose(row, 8, 1, 1.5) == ([4, 5, 6], 2)  # 1.5 tokens for each matched one
    assert index.propose(row, 2, 1, 9.0) == ([4, 5], 2)
    assert index.propose(row, 8, 3, 9.0) == ([], 2)


def test_a_loop_costs_neither_depth_nor_memory() -> None:
    index = _C.SuffixIndex(32)
    row = index.add_row(0)
    index.extend(row, [5] * 50_000)
    assert index.propose(row, 4, 1, 1.0) == (
        [5],
        32,
    )  # the latest match: one token is known after it
    assert index.num_bytes / index.num_tokens < 24.5


def test_bytes_per_token_with_known_lengths() -> None:
    tokens = torch.randint(0, 16_000, (20_000,), generator=torch.Generator().manual_seed(1))
    index = _C.SuffixIndex(64)
    index.add_rows(tokens, torch.arange(0, 20_001, 1000))
    assert index.num_bytes / index.num_tokens < 24


def test_errors_name_the_argument_and_write_nothing() -> None:
    with pytest.raises(ValueError, match="max_match: expected >= 1, got 0"):
        _C.SuffixIndex(0)
    index = _C.SuffixIndex(8)
    with pytest.raises(ValueError, match="row: expected 0 <= value < 0, got 0"):
        index.extend(0, [1])
    with pytest.raises(ValueError, match="row: expected 0 <= value < 0, got 2"):
        index.propose(2, 1, 1, 1.0)
    with pytest.raises(ValueError, match="token_ids: expected 0 <= id < 2\\^31, got -3 at index 1"):
        index.add_rows(torch.tensor([1, -3]), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="cu_lens: expected offsets from 0 to 2, got 0 to 1"):
        index.add_rows(torch.tensor([1, 3]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"cu_lens: expected row lengths.*got -1 in row 1"):
        index.add_rows(torch.tensor([1, 3]), torch.tensor([0, 3, 2]))
    assert index.num_rows == 0
