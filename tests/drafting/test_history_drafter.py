"""Proposals from history, and how many of them are worth computing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from laws import assert_rate

from spec_rollout import ops
from spec_rollout._native import _C
from spec_rollout.drafting import HistoryDrafter, MatchShares, NoiseLaw
from spec_rollout.packed import cu_lens_from
from spec_rollout.types import History

A, B, C, D, STOP = 1, 2, 3, 4, 9


def history(rows: dict[int, list[list[int]]], requests: list[int]) -> History:
    """Rows by group; the group of each request."""
    flat = [(group, row) for group, group_rows in rows.items() for row in group_rows]
    return History(
        torch.tensor([token for _, row in flat for token in row], dtype=torch.int32),
        cu_lens_from(torch.tensor([len(row) for _, row in flat], dtype=torch.int64)),
        torch.tensor([group for group, _ in flat], dtype=torch.int64),
        torch.tensor(requests, dtype=torch.int64),
    )


def extend(drafter: HistoryDrafter, rows: dict[int, list[int]]) -> None:
    drafter.extend(
        np.array(list(rows)),
        np.array([token for row in rows.values() for token in row], dtype=np.int32),
        np.array([len(row) for row in rows.values()]),
    )


def propose(
    drafter: HistoryDrafter, requests: list[int], limit: int = 8, least: float = 0.0
) -> list[list[int]]:
    limits = np.full(len(requests), limit)
    proposals = drafter.propose(np.array(requests), limits, least)
    ends = np.cumsum(proposals.lens)
    return [
        proposals.token_ids[end - count : end].tolist()
        for end, count in zip(ends, proposals.lens, strict=True)
    ]


def test_proposes_what_followed_in_the_own_group() -> None:
    drafter = HistoryDrafter(history({0: [[A, B, C, D]], 1: [[A, B, D, C]]}, [0, 1, 1]))
    extend(drafter, {0: [A, B], 1: [A, B], 2: [C]})
    assert propose(drafter, [0, 1], limit=2) == [[C, D], [D, C]]
    assert propose(drafter, [1], limit=1) == [[D]]
    assert propose(drafter, [1, 0], limit=0) == [[], []]
    assert drafter.num_tokens == 8 + 5
    assert drafter.num_bytes > 0


def test_where_the_own_group_has_said_nothing_others_have() -> None:
    drafter = HistoryDrafter(history({0: [[A, B, C, D]]}, [1]))
    extend(drafter, {0: [A, B]})
    assert propose(drafter, [0], limit=2) == [[C, D]]


@pytest.mark.parametrize(("num_words", "expected"), [(4, D), (2000, C)])
def test_how_long_a_context_must_be_to_be_the_prompts_own(num_words: int, expected: int) -> None:
    """The own group went on with C after [A, B] once, all others with D: two tokens of a large
    vocabulary say what this is about, two of a small one do not.
    """
    rng = np.random.default_rng(0)
    others = [[A, B, D, *rng.integers(10, 10 + num_words, 20).tolist()] for _ in range(200)]
    rows = {0: [[10, A, B, C]], **{g + 1: [row] for g, row in enumerate(others)}}
    drafter = HistoryDrafter(history(rows, [0]))
    extend(drafter, {0: [11, A, B]})
    assert propose(drafter, [0], limit=1) == [[expected]]


def test_a_draft_is_followed_until_it_is_left() -> None:
    drafter = HistoryDrafter(history({0: [[A, B, A, B, A, B]]}, [0, 0, 0]), stop_token_ids=[STOP])
    draft = np.array([A, B, C, D, A, STOP], np.int32)
    drafter.follow(0, draft, np.full(6, -1e-3, np.float32))
    keys = {"keys": np.zeros(1, np.int64), "positions": np.array([2])}
    extend(drafter, {0: [A, B]})
    for _ in range(2):  # not of what the group says: of the draft, to its stop token
        found = drafter.propose(np.array([0]), np.array([8]), 0.3, **keys)
        assert found.token_ids.tolist() == [C, D, A]
        assert found.own_lens.tolist() == [3]
    assert drafter.followed_lens.tolist() == [2, 0, 0]
    extend(drafter, {0: [C]})
    assert drafter.followed_lens.tolist() == [3, 0, 0]
    extend(drafter, {0: [B, A, B]})  # never mind that the draft goes on like that
    assert drafter.followed_lens.tolist() == [3, 0, 0]
    found = drafter.propose(np.array([0]), np.array([2]), 0.0, **keys)
    assert found.token_ids.tolist() == [A, B]
    assert found.own_lens.tolist() == [0]
    # Another noise than the draft's says nothing about it.
    drafter.follow(1, draft, np.zeros(6, np.float32))
    extend(drafter, {1: [A, B]})
    assert propose(drafter, [1], limit=1) == [[A]]


def test_a_draft_is_believed_as_far_as_no_other_token_came_near() -> None:
    """The policy moves a little: drafts that won by little are those that change, and the drafter
    says which."""
    n = 4_000
    rng = np.random.default_rng(0)
    keys, positions = rng.integers(-(2**63), 2**63 - 1, n), np.ones(n, np.int64)
    probs = np.array([0.0, 0.6, 0.2, 0.1, 0.1])
    moved = probs * [0, 0.75, 1.6, 1.0, 1.3]

    def drawn(p: np.ndarray) -> np.ndarray:
        return _drawn({t: v for t, v in enumerate(p / p.sum()) if v}, keys, positions)

    drafts, truth = drawn(probs), drawn(moved)
    drafter = HistoryDrafter(history({}, [0] * n))
    requests = np.arange(n)
    for r in requests:
        row = np.array([7, drafts[r]], np.int32)
        drafter.follow(r, row, np.array([0.0, np.log(probs[drafts[r]])], np.float32))
    drafter.extend(requests, np.full(n, 7, np.int32), np.ones(n, np.int64))

    def passing(least: float) -> np.ndarray:
        found = drafter.propose(
            requests, np.ones(n, np.int64), least, keys=keys, positions=positions
        )
        return (found.token_ids == truth[found.lens > 0]), found.lens

    passed, lens = passing(0.0)
    assert lens.sum() == n
    drafter.observe(requests, passed.astype(np.int64))
    sure, lens = passing(0.85)
    assert 0.2 * n < lens.sum() < 0.9 * n
    assert sure.mean() > 0.98 > 0.88 > passed.mean() > 0.75


def test_all_together_stay_within_the_limit_and_only_what_is_left_is_tested() -> None:
    past = history({0: [[A, B, C, D, A, B, C, D]], 1: [[C, A]]}, [0, 0, 1])
    drafters = [HistoryDrafter(past) for _ in range(2)]
    for drafter in drafters:
        extend(drafter, {0: [A, B], 1: [A, B], 2: [C]})
    limits = np.array([6, 6, 1])
    cut = drafters[0].propose(np.arange(3), limits, 0.0, max_total=8)
    assert cut.lens.tolist() == [3, 3, 1]  # the longest are cut, evenly
    assert cut.token_ids.tolist() == [C, D, A, C, D, A, A]
    same = drafters[1].propose(np.arange(3), np.array([3, 3, 1]), 0.0)
    assert same.token_ids.tolist() == cut.token_ids.tolist()
    for drafter in drafters:
        drafter.observe(np.arange(3), np.array([3, 1, 1]))
    assert drafters[0]._native.acceptance == drafters[1]._native.acceptance
    assert drafters[0].propose(np.arange(3), limits, 0.0, max_total=0).token_ids.size == 0


def test_threads_do_not_change_proposals() -> None:
    rng = np.random.default_rng(0)
    rows = {g: [rng.integers(0, 6, 60).tolist() for _ in range(3)] for g in range(20)}
    past = history(rows, list(range(20)) * 3)
    found = []
    threads = torch.get_num_threads()
    try:
        for num in (1, 4):
            torch.set_num_threads(num)
            drafter = HistoryDrafter(past)
            extend(drafter, {r: rows[r % 20][0][: r % 9] for r in range(60)})
            found.append(propose(drafter, list(range(60)), limit=12, least=0.02))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]
    assert sum(map(len, found[0])) > 60


def test_live_requests_see_each_other() -> None:
    drafter = HistoryDrafter(history({}, [0, 0, 1]))
    extend(drafter, {0: [A, B, C, D], 2: [A, B, D]})
    extend(drafter, {1: [A, B]})
    assert propose(drafter, [1]) == [[C, D]]


def test_a_request_that_has_not_begun_gets_nothing_and_one_at_its_start_what_others_began_with() -> (
    None
):
    drafter = HistoryDrafter(history({0: [[A, B]]}, [0, 0]))
    assert propose(drafter, [0, 1]) == [[], []]
    extend(drafter, {0: []})
    assert propose(drafter, [0]) == [[A, B]]


def test_nothing_from_a_stop_token_on_is_proposed() -> None:
    past = history({0: [[A, B, STOP, C], [C, STOP]]}, [0, 0])
    drafter = HistoryDrafter(past, stop_token_ids=[7, STOP])
    extend(drafter, {0: [A], 1: [C]})
    assert propose(drafter, [0, 1]) == [[B], []]


def test_looping_text_proposes_the_loop() -> None:
    """Thousands of equal tokens: neither slow nor deep."""
    drafter = HistoryDrafter(history({0: [[A] * 70_000]}, [0]))
    extend(drafter, {0: [A] * 5_000})
    assert propose(drafter, [0], limit=32) == [[A] * 32]


def test_what_fails_is_proposed_less() -> None:
    """The estimate follows the request's own fate and that of matches of the same length."""
    drafter = HistoryDrafter(history({0: [[A, B, C, D] * 8]}, [0, 0]))
    extend(drafter, {0: [A, B], 1: [A, B]})
    before = propose(drafter, [0], least=0.3)[0]
    assert len(before) >= 2
    for _ in range(40):
        propose(drafter, [0], least=0.0)
        drafter.observe(np.array([0]), np.array([0]))
    assert propose(drafter, [0], least=0.3) == [[]]
    for _ in range(200):  # and for the other request it recovers
        passed = propose(drafter, [1], least=0.0)[0]
        drafter.observe(np.array([1]), np.array([len(passed)]))
    assert len(propose(drafter, [1], least=0.3)[0]) >= len(before)


def test_tokens_after_the_first_failure_were_not_tested() -> None:
    one, many = (HistoryDrafter(history({0: [[A, B, C, D]]}, [0])) for _ in range(2))
    for drafter, limit in ((one, 1), (many, 8)):
        extend(drafter, {0: [A]})
        propose(drafter, [0], limit=limit)
        drafter.observe(np.array([0]), np.array([0]))
    assert one._native.acceptance == many._native.acceptance


def test_what_one_call_learns_the_next_one_knows() -> None:
    shares = MatchShares()
    past = history({0: [[A, B, C, D] * 8]}, [0])

    def call(num_tests: int, accepted: int) -> int:
        """Length of the first proposal, and that many tests afterwards."""
        drafter = HistoryDrafter(past, shares=shares)
        extend(drafter, {0: [A, B]})
        first = len(propose(drafter, [0], least=0.3)[0])
        for _ in range(num_tests):
            propose(drafter, [0], least=0.0, limit=1)
            drafter.observe(np.array([0]), np.array([accepted]))
        return first

    unlearned = call(100, 0)
    assert unlearned >= 1
    assert call(0, 0) == 0  # all of these failed
    # Nothing is proposed and tested now, so it is given another chance after some calls.
    assert unlearned / 2 < [call(0, 0) for _ in range(12)][-1] <= unlearned
    call(100, 1)
    assert call(0, 0) >= 1


def _guesses(
    probs: dict[int, float],
    keyed: bool,
    known: bool = True,
    law: NoiseLaw = NoiseLaw.PHILOX,
) -> tuple[np.ndarray, ...]:
    """4,000 requests at the same text, which each token of `probs` followed once: proposed tokens,
    keys, positions."""
    n = 4_000
    rows = [[A, B, token] for token in probs]
    logprobs = torch.tensor([[0.0, 0.0, np.log(p)] for p in probs.values()]).flatten()
    past = history({0: rows}, [0] * n)
    drafter = HistoryDrafter(replace(past, logprobs=logprobs.float() if known else None), noise=law)
    requests = np.arange(n)
    drafter.extend(requests, np.tile(np.array([A, B], np.int32), n), np.full(n, 2))
    keys = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, n)
    positions = np.full(n, 2) + requests % 7
    noise = {"keys": keys, "positions": positions} if keyed else {}
    proposals = drafter.propose(requests, np.ones(n, np.int64), 0.0, **noise)
    assert proposals.lens.tolist() == [1] * n
    return proposals.token_ids, keys, positions


def _drawn(probs: dict[int, float], keys: np.ndarray, positions: np.ndarray) -> np.ndarray:
    logits = torch.full((keys.size, 8), -torch.inf)
    for token, p in probs.items():
        logits[:, token] = np.log(p)
    drawn = ops.sample_tokens(
        logits, keys=torch.from_numpy(keys), positions=torch.from_numpy(positions)
    )
    return drawn.token_ids.numpy()


def test_the_noise_says_which_follower_will_be_drawn() -> None:
    """Without looking at the noise no better than the mode; with it as good as the followers seen
    are complete."""
    probs = {3: 0.5, 4: 0.3, 5: 0.2}
    guessed, keys, positions = _guesses(probs, keyed=True)
    # Log-probs are kept in 16 bits, so a near-tie can go the other way.
    assert (guessed == _drawn(probs, keys, positions)).mean() > 0.998
    blind, keys, positions = _guesses(probs, keyed=False)
    assert set(blind) == {3}
    assert_rate(blind == _drawn(probs, keys, positions), 0.5)


@pytest.mark.parametrize("law", [NoiseLaw.VLLM, NoiseLaw.VLLM64])
def test_the_noise_may_be_vllms(law: NoiseLaw) -> None:
    probs = {3: 0.5, 4: 0.3, 5: 0.2}
    guessed, keys, positions = _guesses(probs, keyed=True, law=law)
    noise = [
        [_C.vllm_gumbel(key, at, token, law is NoiseLaw.VLLM64) for token in probs]
        for key, at in zip(keys.tolist(), positions.tolist(), strict=True)
    ]
    drawn = np.array([*probs])[(np.log([*probs.values()]) + noise).argmax(1)]
    assert (guessed == drawn).mean() > 0.998
    for token, p in probs.items():
        assert_rate(drawn == token, p)


def test_what_was_never_seen_is_all_that_fails() -> None:
    seen = {3: 0.5, 4: 0.2}
    guessed, keys, positions = _guesses(seen, keyed=True)
    drawn = _drawn(seen | {5: 0.3}, keys, positions)
    assert_rate(guessed == drawn, 0.7)
    assert (guessed == drawn)[drawn != 5].mean() > 0.998


def test_followers_without_logprobs_count_by_their_number() -> None:
    guessed, keys, positions = _guesses({3: 0.9, 4: 0.1}, keyed=True, known=False)
    drawn = _drawn({3: 0.5, 4: 0.5}, keys, positions)
    np.testing.assert_array_equal(guessed, drawn)


def test_certain_tokens_that_differ_share_by_their_number() -> None:
    """Six rollouts were sure of one token and two of another: it depends on what this context does
    not show."""
    n = 4_000
    tokens = [3, 3, 4, 3, 3, 3, 4, 3]
    past = history({0: [[A, B, token] for token in tokens]}, [0] * n)
    drafter = HistoryDrafter(replace(past, logprobs=torch.zeros(3 * len(tokens))))
    requests = np.arange(n)
    drafter.extend(requests, np.tile(np.array([A, B], np.int32), n), np.full(n, 2))
    keys = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, n)
    ones = np.ones(n, np.int64)
    found = drafter.propose(requests, ones, 0.0, keys=keys, positions=2 * ones)
    assert_rate(found.token_ids == 3, 0.75)


def test_all_followers_of_a_shared_beginning_are_found() -> None:
    """Contexts equal back to the start of their rows are one node of the index."""
    probs = {3: 0.25, 4: 0.25, 5: 0.25, 6: 0.25}
    guessed, keys, positions = _guesses(probs, keyed=True)
    assert set(guessed) == set(probs)
    np.testing.assert_array_equal(guessed, _drawn(probs, keys, positions))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs": torch.zeros(3)}, r"logprobs: expected float32 of shape \[2\]"),
        ({"logprobs": torch.zeros(2).double()}, "logprobs: expected float32"),
        ({"row_groups": torch.tensor([-1])}, "row_groups: expected groups >= 0, got -1"),
        ({"row_groups": torch.tensor([0.0])}, "row_groups: expected int64"),
        ({"token_ids": torch.tensor([1, -2], dtype=torch.int32)}, "token_ids: expected ids >= 0"),
        ({"token_ids": torch.tensor([1, 2])}, "token_ids: expected int32"),
        ({"cu_lens": torch.tensor([0, 3])}, r"token_ids: expected shape \[3\]"),
    ],
)
def test_history_is_checked(change: dict[str, torch.Tensor], message: str) -> None:
    arguments = {
        "token_ids": torch.tensor([1, 2], dtype=torch.int32),
        "cu_lens": torch.tensor([0, 2]),
        "row_groups": torch.tensor([0]),
        "request_groups": torch.tensor([0]),
    }
    History(**arguments)
    with pytest.raises(ValueError, match=message):
        History(**{**arguments, **change})
