"""A drafter that outlives its requests: what it remembers, what it forgets, and at which price."""

from __future__ import annotations

import itertools
import random
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from drafting_samples import (
    SMALL_TABLE,
    STOP,
    A,
    B,
    C,
    D,
    X,
    Y,
    Z,
    finish,
    generate,
    kept,
    proposed,
)

from spec_rollout import ops
from spec_rollout.drafting import NO_TAG, Drafter, HistoryDrafter, KeptRows
from spec_rollout.drafting.history_file import packed
from spec_rollout.keys import prompt_key
from spec_rollout.packed import cu_lens_from
from spec_rollout.types import History


def test_what_a_request_generated_is_history_once_it_has_left_and_before() -> None:
    drafter = Drafter()
    first = drafter.join(X)
    assert not drafter.has_history(first)
    assert proposed(drafter, first) == []  # it has not begun
    generate(drafter, first, [A, B, C, D])
    assert not drafter.has_history(first)
    second = drafter.join(X)
    assert drafter.has_history(second)
    generate(drafter, second, [A, B])
    assert proposed(drafter, second) == [C, D]
    drafter.leave(first)
    assert proposed(drafter, second) == [C, D]
    drafter.leave(second, keep=False)
    assert kept(drafter) == {X: [[A, B, C, D]]}
    info = drafter.info()
    assert (info.num_groups, info.num_live, info.num_sequences) == (1, 0, 1)
    assert (info.num_tokens, info.num_learned_tokens) == (4, 6)
    assert info.num_evicted_groups == info.num_evicted_sequences == 0
    assert 4 * 18 < info.history_bytes < 2_000
    # Elsewhere the same words go on otherwise. Where a prompt has no history, others' serves.
    finish(drafter, Y, [D, C, B, A, B, D])
    for key, expected in ((X, [C, D]), (Y, [D])):
        third = drafter.join(key)
        generate(drafter, third, [D, C, B, A, B] if key == Y else [A, B])
        assert proposed(drafter, third)[: len(expected)] == expected
        drafter.leave(third, keep=False)
    drafter.leave(drafter.join(Z))  # it generated nothing
    assert list(kept(drafter)) == [X, Y]
    assert drafter.info().num_groups == 2


def test_nothing_from_a_requests_own_stop_tokens_on_is_proposed() -> None:
    drafter = Drafter()
    finish(drafter, X, [A, B, STOP, C])
    for stops, expected in (([STOP], [B]), ([7, C], [B, STOP]), ([], [B, STOP, C])):
        handle = drafter.join(X, stop_token_ids=stops)
        generate(drafter, handle, [A])
        assert proposed(drafter, handle, limit=3) == expected
        drafter.leave(handle, keep=False)


def test_the_newest_rollout_with_a_tag_is_recalled_and_followed() -> None:
    drafter = Drafter()
    for tokens, tag in (([A, B], 5), ([C, D], 5), ([A], 6), ([B, B], None)):
        handle = drafter.join(X, tag=tag)
        logprobs = np.full(len(tokens), -0.5, np.float32)
        drafter.extend(
            np.array([handle]), np.array(tokens, np.int32), np.array([len(tokens)]), logprobs
        )
        drafter.leave(handle)
    assert drafter.recall(X, 7) is None
    assert drafter.recall(Y, 5) is None
    found = drafter.recall(X, 5)
    assert found is not None
    assert found[0].tolist() == [C, D]
    assert found[1].tolist() == [-0.5, -0.5]
    handle = drafter.join(X, tag=5)
    drafter.follow(handle, *found)
    generate(drafter, handle, [C])
    noise = {"keys": np.zeros(1, np.int64), "positions": np.ones(1, np.int64)}
    proposals = drafter.propose(np.array([handle]), np.array([1]), 0.3, **noise)
    assert (proposals.token_ids.tolist(), proposals.own_lens.tolist()) == ([D], [1])
    generate(drafter, handle, [D, A])
    assert drafter.followed_len(handle) == 2


@pytest.mark.parametrize("with_noise", [None, [True, False, True, False, True]])
def test_who_has_more_to_go_is_asked_for_less(with_noise: list[bool] | None) -> None:
    """What is proposed is what it is for each request alone at the probability computed here, with
    its noise or without."""
    flags = None if with_noise is None else np.array(with_noise)
    rng = np.random.default_rng(0)
    text = rng.integers(0, 50, 600).astype(np.int32)
    drafter = Drafter(max_table_bytes=SMALL_TABLE)

    def lived(key: bytes, length: int) -> None:
        handle = drafter.join(key)
        tokens, logprobs = text[:length], np.full(length, -0.4, np.float32)
        drafter.extend(np.array([handle]), tokens, np.array([length]), logprobs)
        drafter.leave(handle)

    w, v = prompt_key([1]), prompt_key([2])
    for key, lengths in (
        (X, [10, 3, 30]),  # of those longer than four, 6 and 26 more: 16
        (Y, [8]),  # 4
        (w, [500, *[10] * 16]),  # the sixteen newest: 6
        (Z, [4]),  # none came further: nothing is known
    ):
        for length in lengths:
            lived(key, length)
    handles = np.array([drafter.join(key) for key in (X, Y, w, Z, v)])
    drafter.follow(int(handles[4]), text[:138], np.full(138, -0.4, np.float32))  # 134
    drafter.extend(handles, np.tile(text[:4], 5), np.full(5, 4), np.full(20, -0.4, np.float32))
    mean = (16 + 4 + 6 + 134) / 4
    factors = [mean / 16, 4.0, 4.0, 1.0, mean / 134]
    noise = {"keys": np.arange(5), "positions": np.full(5, 4)}
    limits, seen = np.full(5, 24), set()
    for least in (0.02, 0.1, 0.2, 0.3, 0.5, 0.97):
        found = drafter.propose(
            handles, limits, least, favours_longest=True, **noise, with_noise=flags
        )
        for i, factor in enumerate(factors):
            one = {name: value[i : i + 1] for name, value in noise.items()}
            one = one if flags is None or flags[i] else {}
            asked = min(least * factor, max(least, 0.95))
            alone = drafter.propose(handles[i : i + 1], limits[:1], asked, **one)
            end = found.lens[: i + 1].sum()
            assert found.token_ids[end - found.lens[i] : end].tolist() == alone.token_ids.tolist()
            even = drafter.propose(handles[i : i + 1], limits[:1], least, **one)
            seen.add((i, int(np.sign(alone.lens[0] - even.lens[0]))))
    assert {(0, -1), (1, -1), (2, -1), (4, 1)} <= seen  # it does make a difference
    assert (3, 1) not in seen
    assert (3, -1) not in seen


def test_requests_without_noise_share_the_room_with_the_others() -> None:
    drafter = Drafter()
    for key in (X, Y):
        handle = drafter.join(key)
        tokens = np.arange(1, 13, dtype=np.int32) + 20 * (key == Y)
        drafter.extend(np.array([handle]), tokens, np.array([12]), np.zeros(12, np.float32))
        drafter.leave(handle)
    handles = np.array([drafter.join(key) for key in (X, Y)])
    drafter.extend(handles, np.array([1, 21], np.int32), np.ones(2, np.int64))
    noise = {"keys": np.arange(2), "positions": np.ones(2, np.int64)}
    for flags in ([True, False], [False, True], [False, False]):
        found = drafter.propose(
            handles, np.full(2, 8), 0.0, max_total=6, **noise, with_noise=np.array(flags)
        )
        assert found.lens.tolist() == [3, 3]
        assert found.token_ids.tolist() == [2, 3, 4, 22, 23, 24]
    with pytest.raises(ValueError, match="with_noise"):
        drafter.propose(handles, np.full(2, 8), 0.0, **noise, with_noise=np.ones(3, bool))
    with pytest.raises(ValueError, match="with_noise"):
        drafter.propose(handles, np.full(2, 8), 0.0, **noise, with_noise=np.ones(2, np.int64))


@pytest.mark.parametrize(("num_rows", "expected"), [(20, C), (200, D)])
def test_a_handful_of_tokens_does_not_say_how_much_a_token_says(
    num_rows: int, expected: int
) -> None:
    """The own group went on with C after three words, all others with D. Three words of a text of
    few words are not the prompt's own, but whether it is one is only known of many tokens, however
    they came."""
    rng = np.random.default_rng(0)
    others = [[12, A, B, D, *rng.integers(30, 34, 20).tolist()] for _ in range(num_rows)]
    rows = [[10, 12, A, B, C], *others]
    keys = [prompt_key([r]) for r in range(len(rows))]
    added, lived = (Drafter(max_table_bytes=4 * SMALL_TABLE) for _ in range(2))
    for key, row in zip(keys, rows, strict=True):
        added.add([key], torch.tensor(row, dtype=torch.int32), torch.tensor([0, len(row)]))
        finish(lived, key, row)
    for drafter in (added, lived):
        handle = drafter.join(keys[0])
        generate(drafter, handle, [11, 12, A, B])
        assert proposed(drafter, handle, limit=1) == [expected]


def test_it_proposes_what_the_drafter_of_one_call_does() -> None:
    """The same rows as history, whether they were given, or generated by requests that left."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 64, 24).tolist() for _ in range(20)]
    rows += [[*row[:12], *other[12:]] for row, other in itertools.pairwise(rows)]
    groups = [r % 5 for r in range(len(rows))]
    flat = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
    logprobs = torch.from_numpy(-rng.exponential(0.5, flat.numel()).astype(np.float32))
    cu = cu_lens_from(torch.tensor([len(row) for row in rows]))
    call = HistoryDrafter(History(flat, cu, torch.tensor(groups), torch.arange(5), logprobs))
    keys = [prompt_key([g]) for g in range(5)]
    added, lived = (Drafter(max_table_bytes=4 * SMALL_TABLE) for _ in range(2))
    added.add([keys[g] for g in groups], flat, cu, logprobs)
    for row, group, end in zip(rows, groups, cu[1:].tolist(), strict=True):
        handle = lived.join(keys[group])
        lived.extend(
            np.array([handle]),
            np.array(row, np.int32),
            np.array([len(row)]),
            logprobs[end - len(row) : end].numpy(),
        )
        lived.leave(handle)
    assert dict(kept(added)) == dict(kept(lived))
    noise = rng.integers(-(2**63), 2**63 - 1, 5)
    drafters = [(call, np.arange(5))]
    drafters += [(d, np.array([d.join(key) for key in keys])) for d in (added, lived)]
    for step in range(12):
        ids = np.array([rows[g][step] for g in range(5)], np.int32)
        found = []
        for drafter, handles in drafters:
            drafter.extend(handles, ids, np.ones(5, np.int64))
            proposals = drafter.propose(
                handles, np.full(5, 6), 0.05, keys=noise, positions=np.full(5, step + 1)
            )
            drafter.observe(handles, proposals.lens // 2)
            found.append((proposals.token_ids.tolist(), proposals.lens.tolist()))
        assert found[0] == found[1] == found[2]
        assert step < 3 or sum(found[0][1]) > 5


def test_as_many_pass_as_expected() -> None:
    """Drafts under a policy that has moved: the number that passes is the number expected."""
    n = 3_000
    rng = np.random.default_rng(0)
    keys, positions = rng.integers(-(2**63), 2**63 - 1, n), np.ones(n, np.int64)
    probs = np.array([0.6, 0.2, 0.1, 0.1])
    moved = probs * [0.75, 1.6, 1.0, 1.3]

    def drawn(p: np.ndarray) -> np.ndarray:
        logits = torch.from_numpy(np.log(p / p.sum())).float().expand(n, 4).contiguous()
        noise = {"keys": torch.from_numpy(keys), "positions": torch.from_numpy(positions)}
        return ops.sample_tokens(logits, **noise).token_ids.numpy()

    drafts, truth = drawn(probs), drawn(moved)
    drafter = Drafter()
    handles = np.array([drafter.join(prompt_key([r])) for r in range(n)])
    for handle, token in zip(handles.tolist(), drafts.tolist(), strict=True):
        row = np.array([7, token], np.int32)
        drafter.follow(handle, row, np.array([0.0, np.log(probs[token])], np.float32))
    drafter.extend(handles, np.full(n, 7, np.int32), np.ones(n, np.int64))
    for half in (handles[: n // 2], handles[n // 2 :]):
        where = np.isin(handles, half)
        proposals = drafter.propose(
            half, np.ones(half.size, np.int64), 0.0, keys=keys[where], positions=positions[where]
        )
        assert (proposals.lens == 1).all()
        passed = proposals.token_ids == truth[where]
        drafter.observe(half, passed.astype(np.int64))
    assert proposals.expected.min() >= 0
    assert proposals.expected.max() <= 1
    assert proposals.expected.sum() == pytest.approx(passed.sum(), rel=0.03)


def test_fewer_tokens_than_requests_go_to_the_likeliest() -> None:
    drafter = Drafter()
    for key, rows in ((X, [[A, B], [A, C], [A, D]]), (Y, [[D, B]] * 3), (Z, [[C, B], [C, A]])):
        for row in rows:
            finish(drafter, key, row)
    handles = np.array([drafter.join(key) for key in (X, Y, Z)])
    drafter.extend(handles, np.array([A, D, C], np.int32), np.ones(3, np.int64))
    everything = drafter.propose(handles, np.ones(3, np.int64), 0.0)
    assert everything.lens.tolist() == [1, 1, 1]
    order = np.argsort(-everything.expected)
    assert order[0] == 1
    for total in range(3):
        found = drafter.propose(handles, np.full(3, 4), 0.0, max_total=total)
        assert np.flatnonzero(found.lens).tolist() == sorted(order[:total].tolist())
        assert found.lens.sum() == found.token_ids.size == total
        expected = everything.token_ids[sorted(order[:total].tolist())]
        assert found.token_ids.tolist() == expected.tolist()


def test_the_total_cut_is_cut_off_the_expectation_too() -> None:
    drafter = Drafter()
    finish(drafter, X, [A, B, C, D] * 4)
    handle = drafter.join(X)
    generate(drafter, handle, [A, B])
    whole = drafter.propose(np.array([handle]), np.array([6]), 0.0)
    cut = drafter.propose(np.array([handle]), np.array([6]), 0.0, max_total=2)
    short = drafter.propose(np.array([handle]), np.array([2]), 0.0)
    none = drafter.propose(np.array([handle]), np.array([6]), 0.0, max_total=0)
    assert (whole.lens[0], cut.lens[0]) == (6, 2)
    assert cut.expected[0] == short.expected[0] < whole.expected[0] < 6
    assert none.expected[0] == 0.0


ROW_BYTES, TOKEN_BYTES = 88, 20


def test_of_one_prompt_the_newest_rollouts_that_fit_are_kept() -> None:
    """Against a plain list of them."""
    rng = random.Random(0)
    bound = 3_000
    drafter = Drafter(max_group_bytes=bound, max_table_bytes=SMALL_TABLE)
    expected: list[list[int]] = []
    evicted = 0
    for _ in range(300):
        row = [rng.randrange(20) for _ in range(rng.choice((1, 5, 40, 90, 200)))]
        finish(drafter, X, row)
        expected.append(row)
        while sum(ROW_BYTES + TOKEN_BYTES * (len(r) + 1) for r in expected) > bound:
            del expected[0]
            evicted += 1
        assert kept(drafter) == ({X: expected} if expected else {})
        assert drafter.info().num_evicted_sequences == evicted
        assert drafter.info().num_evicted_groups == 0
    assert evicted > 250


def test_rollouts_that_make_room_for_others_of_their_prompt_are_counted() -> None:
    """A prompt has 4,096, live ones among them, whatever room there is."""
    drafter = Drafter(max_group_bytes=2**30, max_table_bytes=SMALL_TABLE)
    num = 4096 + 100

    row = (NO_TAG, np.array([A], np.int32).tobytes(), np.array([-0.5], np.float32).tobytes())
    rows = KeptRows.of([(key, [row] * num) for key in (X, Y)])
    drafter.import_bytes(packed(rows))  # each prompt may be filled by a thread of its own
    info = drafter.info()
    assert (info.num_sequences, info.num_evicted_sequences) == (2 * 4096, 2 * 100)
    finish(drafter, X, [A])
    assert drafter.info().num_evicted_sequences == 2 * 100 + 1
    drafter.clear()
    assert drafter.info().num_evicted_sequences == 2 * 100 + 1


def test_what_goes_first_and_that_nothing_live_goes() -> None:
    """Against an ordered dictionary: rollouts that a newer visit's have followed, those of the prompt
    used last first; then whole prompts, the least recently used first."""
    rng = random.Random(1)
    bound = 40_000
    drafter = Drafter(max_bytes=bound, max_table_bytes=SMALL_TABLE)
    keys = [prompt_key([k]) for k in range(60)]
    used: OrderedDict[bytes, list[list[int]]] = OrderedDict()  # the most recent last
    visiting: Counter[bytes] = Counter()  # rollouts kept since the prompt was last idle
    surplus: Counter[bytes] = Counter()
    num_cut = 0
    live: dict[int, tuple[bytes, list[int]]] = {}
    for _ in range(3_000):
        if len(live) < 6 and rng.random() < 0.5:
            key = rng.choice(keys)
            live[drafter.join(key)] = (key, [])
        elif live:
            handle = rng.choice(list(live))
            key, row = live[handle]
            if len(row) < 40:
                new = [rng.randrange(30) for _ in range(rng.randrange(1, 20))]
                generate(drafter, handle, new)
                row += new
            else:
                keep = rng.random() < 0.8
                drafter.leave(handle, keep=keep)
                del live[handle]
                if keep:
                    used.setdefault(key, []).append(row)
                    visiting[key] += 1
                if key in used:
                    used.move_to_end(key)
                    if all(key != other for other, _ in live.values()):
                        older = len(used[key]) - visiting[key]
                        surplus[key] = min(surplus[key] + visiting.pop(key, 0), older)
        busy = {key for key, _ in live.values()}
        found = kept(drafter)
        idle = [key for key in used if key not in busy]
        left = [key for key in idle if key in found]
        assert left == [key for key in found if key not in busy]
        assert idle[len(idle) - len(left) :] == left
        for key in idle[: len(idle) - len(left)]:
            del used[key], surplus[key]
        cut = []
        for key in left:
            gone = len(used[key]) - len(found[key])
            if gone:
                assert used[key][gone:] == found[key]
                assert gone <= surplus[key]
                used[key] = found[key]
                surplus[key] -= gone
                cut.append(left.index(key))
        with_surplus = [i for i, key in enumerate(left) if surplus[key] > 0]
        if len(left) < len(idle):
            assert not with_surplus
        if cut and with_surplus:
            assert max(with_surplus) <= min(cut)
        num_cut += len(cut)
        assert dict(found) == dict(used)  # those in use are whole
        info = drafter.info()
        assert info.history_bytes <= bound
        assert info.num_live == len(live)
        assert info.num_groups == len(set(used) | busy)
        assert info.num_tokens == sum(map(len, (r for rows in used.values() for r in rows))) + sum(
            len(row) for _, row in live.values()
        )
    assert drafter.info().num_evicted_groups > 100
    assert num_cut > 50
    assert drafter.info().history_bytes > 0.8 * bound


@pytest.mark.parametrize("in_order", [True, False])
def test_room_for_an_epoch_and_a_step_is_enough(in_order: bool) -> None:
    """Every prompt that comes again still has its last rollouts, whatever the order."""
    rng = random.Random(2)
    keys = [prompt_key([k]) for k in range(40)]
    samples, length, step = 4, 200, 5
    one = Drafter(max_table_bytes=SMALL_TABLE)
    for handle in [one.join(X) for _ in range(samples)]:
        generate(one, handle, list(range(length)))
    # What a prompt takes that comes again, of which as many rollouts are there already.
    live_bytes = one.info().history_bytes + samples * (ROW_BYTES + TOKEN_BYTES * (length + 1))
    # What a prompt once had for more rollouts is not given back whole.
    room = int(1.1 * len(keys) * one.info().history_bytes) + step * live_bytes
    drafter = Drafter(max_bytes=room, max_table_bytes=SMALL_TABLE)
    last: dict[bytes, list[list[int]]] = {}
    for _ in range(6):
        order = keys if in_order else rng.sample(keys, len(keys))
        for first in range(0, len(order), step):
            found = kept(drafter)
            live = []
            for key in order[first : first + step]:
                assert found.get(key, [])[-samples:] == last.get(key, [])
                last[key] = []
                live += [(drafter.join(key), key) for _ in range(samples)]
            for handle, key in live:
                row = [rng.randrange(1000) for _ in range(length)]
                generate(drafter, handle, row)
                last[key].append(row)
            for handle, _ in live:
                drafter.leave(handle, keep=True)
    info = drafter.info()
    assert info.num_evicted_groups == 0
    assert info.num_evicted_sequences > 3 * samples * len(keys)


def test_where_all_prompts_are_live_their_kept_rollouts_go() -> None:
    drafter = Drafter(max_bytes=20_000, max_table_bytes=SMALL_TABLE)
    holders = [drafter.join(key) for key in (X, Y)]
    for n in range(50):
        finish(drafter, (X, Y)[n % 2], [n % 7] * 60)
        assert drafter.info().history_bytes <= 20_000
    assert drafter.info().num_evicted_groups == 0
    assert drafter.info().num_evicted_sequences > 20
    assert set(kept(drafter)) == {X, Y}
    # What is live is not forgotten, however much it is.
    generate(drafter, holders[0], [A, B] * 2_000)
    assert drafter.info().history_bytes > 20_000
    assert kept(drafter).get(X) is None
    drafter.leave(holders[0])
    assert drafter.info().history_bytes <= 20_000


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
def test_nothing_grows_and_nothing_gets_slower_over_200_000_requests() -> None:
    """Thousands of prompts, of which some come often, within a bound for some hundreds."""
    rng = np.random.default_rng(0)
    bound, slots = 2_000_000, 50
    drafter = Drafter(max_bytes=bound, max_group_bytes=40_000, max_table_bytes=SMALL_TABLE)
    words = rng.integers(0, 500, 100_000).astype(np.int32)
    keys = [prompt_key([k]) for k in range(5_000)]
    often = rng.zipf(1.3, 200_000) % 5_000
    work = []  # per 20,000 requests: nodes looked at, and tokens
    resident = 0
    requests = np.zeros(slots, np.int64)
    for start in range(0, 200_000, slots):
        for i in range(slots):
            requests[i] = drafter.join(keys[often[start + i]])
        lens = rng.integers(2, 12, slots)
        at = rng.integers(0, words.size - int(lens.sum()))
        drafter.extend(requests, words[at : at + int(lens.sum())], lens)
        if start % 1_000 == 0:
            proposals = drafter.propose(requests, np.full(slots, 3), 0.05)
            drafter.observe(requests, np.minimum(proposals.lens, 1))
        for handle in requests.tolist():
            drafter.leave(handle)
        if (start + slots) % 20_000 == 0:
            info = drafter.info()
            assert info.history_bytes <= bound
            work.append((drafter._native.num_visits[0], info.num_learned_tokens))
            if start < 60_000:
                resident = resident_bytes()
    assert info.num_evicted_groups > 1_000
    assert info.num_evicted_sequences > 50_000
    assert resident_bytes() - resident < 4 * 2**20
    assert drafter.num_bytes < bound + SMALL_TABLE + 2**16
    per_token = np.diff(np.array(work)[:, 0]) / np.diff(np.array(work)[:, 1])
    assert per_token[-1] < 1.15 * per_token[0]
    assert per_token.max() < 40


@pytest.mark.slow
def test_removal_and_lookup_cost_does_not_rise_with_what_was_there_before() -> None:
    """Nodes looked at per token, of a prompt that is asked for again and again."""
    rng = np.random.default_rng(0)
    drafter = Drafter(max_group_bytes=200_000, max_table_bytes=SMALL_TABLE)
    seen = []
    for _ in range(40):
        inserted, looked_up = drafter._native.num_visits
        for _ in range(10):
            handle = drafter.join(X)
            for token in rng.integers(0, 40, 100).tolist():
                generate(drafter, handle, [token])
                proposed(drafter, handle, limit=1)
            drafter.leave(handle)
        after = drafter._native.num_visits
        seen.append((after[0] - inserted, after[1] - looked_up))
    per_token = np.array(seen) / 1_000
    late, early = per_token[-5:].mean(axis=0), per_token[15:20].mean(axis=0)
    assert (late < 1.1 * early).all()
    assert (late < 60).all()


def test_thousands_of_live_requests_of_one_prompt() -> None:
    drafter = Drafter(max_table_bytes=SMALL_TABLE)
    handles = np.array([drafter.join(X) for _ in range(5_000)])
    some = np.array([A, B, C, D, A, B], np.int32)  # one request four tokens, the next one two
    drafter.extend(handles, np.tile(some, 2_500), np.tile([4, 2], 2_500))
    proposals = drafter.propose(handles, np.ones(5_000, np.int64), 0.0)
    assert (proposals.lens[1::2] == 1).all()
    assert (proposals.token_ids == C).sum() == 2_500
    for handle in handles.tolist():
        drafter.leave(handle)
    info = drafter.info()
    assert info.num_live == 0
    assert info.num_groups == 2
    assert info.num_sequences == 5_000
    assert info.history_bytes < 2 * 2**20


def test_cleared_but_for_what_is_live() -> None:
    drafter = Drafter()
    finish(drafter, X, [A, B, C, D])
    finish(drafter, Y, [A, B, D])
    handle = drafter.join(X)
    generate(drafter, handle, [A, B])
    assert proposed(drafter, handle) == [C, D]
    drafter.clear()
    assert proposed(drafter, handle) == []
    info = drafter.info()
    assert (info.num_groups, info.num_sequences, info.num_tokens) == (1, 0, 2)
    drafter.leave(handle)
    assert kept(drafter) == {X: [[A, B]]}


def test_errors_name_the_argument_and_write_nothing() -> None:
    for name, value in (("max_bytes", -1), ("max_group_bytes", -1), ("max_table_bytes", 1_000)):
        with pytest.raises(ValueError, match=f"{name}: expected .* got {value}"):
            Drafter(**{name: value})
    drafter = Drafter(max_table_bytes=SMALL_TABLE)
    for key in (b"short", "text" * 4):
        with pytest.raises(ValueError, match="group_key: expected 16 bytes, got"):
            drafter.join(key)  # type: ignore[arg-type]
    first = drafter.join(X)
    drafter.leave(first)
    second = drafter.join(X)
    assert first != second
    one = np.ones(1, np.int64)
    for gone in (first, -1, 5, second + 2**40):
        handles = np.array([gone])
        for call in (
            lambda handles=handles: drafter.leave(int(handles[0])),
            lambda handles=handles: drafter.propose(handles, one, 0.5),
            lambda handles=handles: drafter.observe(handles, one),
            lambda handles=handles: drafter.extend(handles, np.ones(1, np.int32), one),
            lambda handles=handles: drafter.has_history(int(handles[0])),
            lambda handles=handles: drafter.followed_len(int(handles[0])),
            lambda handles=handles: drafter.follow(
                int(handles[0]), np.ones(1, np.int32), np.zeros(1, np.float32)
            ),
        ):
            with pytest.raises(ValueError, match=f"requests: expected live ones, got {gone}"):
                call()
    with pytest.raises(ValueError, match="requests: expected live ones"):
        drafter.extend(np.array([second, first]), np.array([A, B], np.int32), np.ones(2, np.int64))
    with pytest.raises(ValueError, match="token_ids: expected ids >= 0, got -1 at 1"):
        generate(drafter, second, [A, -1])
    with pytest.raises(ValueError, match="token_ids: expected ids >= 0, got -2 at 0"):
        drafter.add([X], torch.tensor([-2], dtype=torch.int32), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"cu_lens: expected shape \[rows"):
        drafter.add([X], torch.tensor([2, 3], dtype=torch.int32), torch.tensor([0, 1, 2]))
    assert drafter.info().num_tokens == drafter.info().num_learned_tokens == 0


def test_what_live_requests_have_generated_is_written_if_asked_for(tmp_path: Path) -> None:
    drafter = Drafter(max_table_bytes=SMALL_TABLE)
    finish(drafter, X, [A, B], tag=1)
    live, silent = drafter.join(X, tag=2), drafter.join(Y)
    generate(drafter, live, [C, D])
    path = tmp_path / "history"
    drafter.save(path)
    other = Drafter(max_table_bytes=SMALL_TABLE)
    assert other.load(path) == 1
    drafter.save(path, live={live: (X, 2), silent: (Y, None)})
    other.clear()
    assert other.load(path) == 2
    assert kept(other) == {X: [[A, B], [C, D]]}
    found = other.recall(X, 2)
    assert found is not None
    assert found[0].tolist() == [C, D]
    assert kept(drafter) == {X: [[A, B]]}  # nothing changed here
