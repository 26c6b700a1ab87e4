"""SuffixIndex against a brute-force search, on text that repeats itself a lot."""

from __future__ import annotations

import random

import pytest
import torch

from spec_rollout import _C

START = -1


def brute_force(
    rows: list[list[int]] | dict[int, list[int]], order: list[tuple[int, int]], row: int, cap: int
):
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
    assert index.num_bytes / index.num_tokens < 26.5


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


@pytest.mark.parametrize("cap", [1, 3, 32])
@pytest.mark.parametrize("vocab", [1, 2, 6, 200])
def test_removed_rows_are_never_found_and_all_others_are(vocab: int, cap: int) -> None:
    """The longest match is that of a search over the rows that are left; of equally long ones any
    may be found, as long as it is there."""
    rng = random.Random(f"{vocab}:{cap}")
    for _ in range(12):
        index = _C.SuffixIndex(cap)
        rows: dict[int, list[int]] = {}
        order: list[tuple[int, int]] = []
        for _ in range(200):
            if len(rows) < 2 or (len(rows) < 6 and rng.random() < 0.1):
                row = index.add_row(rng.choice((0, 50)))
                assert row not in rows
                rows[row] = []
            elif rng.random() < 0.06:
                gone = rng.choice(list(rows))
                index.remove_row(gone)
                del rows[gone]
                order = [place for place in order if place[0] != gone]
            else:
                row = rng.choice(list(rows))
                again = rows[row] and rng.random() < 0.5
                token = rows[row][-1] if again else rng.randrange(vocab)
                order.append((row, len(rows[row])))
                rows[row].append(token)
                index.extend(row, [token])
            asked = rng.choice(list(rows))
            match_len, _ = brute_force(rows, order, asked, cap)
            got, got_len = index.propose(asked, 3, 1, 100.0)
            # Of more than eight equal contexts not all are remembered.
            assert got_len == match_len or (got_len < match_len and min(vocab, cap) < 6)
            if got_len:
                context = [START, *rows[asked]][-got_len:]
                places = [
                    [START, *rows[r]][max(0, o + 1 - len(context)) : o + 1 + len(got)]
                    for r, o in order
                ]
                assert context + got in places
        for row in list(rows):
            index.remove_row(row)
        assert index.num_rows == index.num_tokens == 0


@pytest.mark.parametrize("firsts", [(5, 7, 6), (7, 5, 6)])
def test_of_equally_long_matches_the_newest_row_left_is_found(firsts: tuple[int, ...]) -> None:
    """The last row's node was the root; the older two are on both sides of it."""
    index = _C.SuffixIndex(32)
    for row, first in enumerate(firsts):
        index.extend(index.add_row(3), [first, 2, 10 + row])
    index.extend(index.add_row(2), [4, 2])
    assert index.propose(3, 1, 1, 1.0) == ([12], 1)
    index.remove_row(2)
    assert index.propose(3, 1, 1, 1.0) == ([11], 1)
    index.remove_row(1)
    assert index.propose(3, 1, 1, 1.0) == ([10], 1)


def test_memory_of_removed_rows_is_used_again() -> None:
    generator = torch.Generator().manual_seed(2)
    index = _C.SuffixIndex(32)
    sizes, visits = [], []
    for round_number in range(60):
        ids = torch.randint(0, 50, (400,), generator=generator).tolist()
        row = index.add_row(len(ids))
        index.extend(row, ids)
        before = index.num_visits
        if round_number >= 10:
            index.remove_row((row + 1) % 11)  # the oldest
            visits.append((index.num_visits - before) / len(ids))
        sizes.append(index.num_bytes)
    assert max(sizes[11:]) == sizes[11]
    assert index.num_rows == 10
    assert max(visits) < 40  # about as an insertion takes, and no more towards the end
    assert sum(visits[-10:]) < 1.2 * sum(visits[:10])


def test_a_loop_is_removed_as_fast_as_any_row() -> None:
    """Contexts that agree in full are one list, which must not be walked for each of them."""
    index = _C.SuffixIndex(32)
    for _ in range(3):
        index.extend(index.add_row(0), [5] * 20_000)
    before = index.num_visits
    for row in (1, 0):
        index.remove_row(row)
    assert index.num_visits - before < 2 * 20_000 * 10
    assert index.propose(2, 1, 1, 1.0)[0] == [5]
    counting = _C.SuffixIndex(32)  # contexts of one token in ascending order: as deep as can be
    for _ in range(2):
        counting.extend(counting.add_row(0), [x for n in range(2, 20_000) for x in (n, 1)])
    before = counting.num_visits
    counting.remove_row(0)
    assert counting.num_visits - before < 40_000 * 300


def test_a_removed_row_is_no_row() -> None:
    index = _C.SuffixIndex(8)
    row = index.add_row(0)
    index.remove_row(row)
    for call in (lambda: index.extend(row, [1]), lambda: index.remove_row(row)):
        with pytest.raises(ValueError, match="row: expected one that is there, got removed row 0"):
            call()
    assert index.num_rows == 0
    assert index.add_row(0) == row
