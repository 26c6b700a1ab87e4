"""Deterministic problems, disjoint splits, and a reward that grades the final answer only."""

from __future__ import annotations

import json
import random
import re

import pytest

from spec_rollout.demo.task import (
    ANSWER_MARKER,
    MAX_RESPONSE_TOKENS,
    Problem,
    Teacher,
    draw_problem,
    format_prompt,
    heldout_problems,
    problems,
    reward,
    split_of,
    teacher_response,
    training_problems,
    write_jsonl,
)

PERFECT = Teacher(plain_error=0.0, hedged_error=0.0)


def test_same_seed_gives_the_same_problems_and_longer_lists_extend_shorter_ones() -> None:
    assert training_problems(300, seed=5) == training_problems(300, seed=5)
    assert training_problems(300, seed=5)[:40] == training_problems(40, seed=5)
    assert training_problems(40, seed=5) != training_problems(40, seed=6)


def test_problems_are_pinned_across_machines_and_versions() -> None:
    # Literal rows: a change of generator would silently change every recorded figure.
    assert training_problems(2) == PINNED_TRAIN
    assert heldout_problems(1) == PINNED_HELDOUT


def test_splits_are_disjoint_whatever_the_seed() -> None:
    train = {p.prompt for seed in range(4) for p in training_problems(400, seed)}
    heldout = {p.prompt for seed in range(4) for p in heldout_problems(400, seed)}
    pretrain = {p.prompt for seed in range(4) for p in problems("pretrain", 400, seed)}
    assert len(training_problems()) == len({p.prompt for p in training_problems()}) == 256
    assert train.isdisjoint(heldout)
    assert pretrain.isdisjoint(train | heldout)
    assert {split_of(p) for p in heldout} == {"heldout"}


def test_ground_truth_is_the_sum_of_the_prompt() -> None:
    for problem in training_problems(100) + heldout_problems(100):
        assert re.fullmatch(r"\d\d( [+-]\d){4,5} =\?\n", problem.prompt)
        numbers = re.findall(r"[+-]?\d+", problem.prompt)
        assert int(problem.answer) == sum(int(n) for n in numbers) >= 0


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("from 62. add 22 is 84. answer: 84", 1.0),
        ("nonsense steps, 1 and 1 is 3. answer: 84", 1.0),  # the steps are not graded
        ("answer: 84\n", 1.0),
        ("answer: 12. answer: 84", 1.0),  # the last marker counts
        ("answer: 84. answer: 12", 0.0),
        ("from 62. add 22 is 84.", 0.0),  # no marker
        ("", 0.0),
        ("answer:", 0.0),
        ("answer: ", 0.0),
        ("answer:84", 0.0),  # not the marker
        ("answer: 8", 0.0),  # cut short
        ("answer: 845", 0.0),
        ("answer: 84 or 85", 0.0),
        ("answer: -84", 0.0),
        ("answer: 084", 0.0),
        ("answer: eighty", 0.0),
    ],
)
def test_reward_on_hand_cases(response: str, expected: float) -> None:
    assert reward("62 +22 =?\n", response, "84") == expected


def test_a_perfect_teacher_is_always_right_and_every_clause_adds_up() -> None:
    rng = random.Random(0)
    for _ in range(300):
        start, terms = draw_problem(rng, "pretrain")
        response = teacher_response(start, terms, rng, PERFECT)
        assert reward(format_prompt(start, terms), response, str(start + sum(terms))) == 1.0
        assert len(response) < MAX_RESPONSE_TOKENS
        total, left = start, sorted(terms)
        for clause in re.split(r"[.,;] ", response)[1:-1]:
            *_, size, result = (int(n) for n in re.findall(r"\d+", clause))
            sign = -1 if re.search(r"take|minus|less", clause) else 1
            left.remove(sign * size)
            total += sign * size
            assert result == total
        assert left == []
        assert response.endswith(f"{ANSWER_MARKER}{total}")


def test_hedged_clauses_carry_the_errors_they_are_given() -> None:
    rng = random.Random(1)
    always_hedged = Teacher(hedge_prob=1.0, plain_error=0.0, hedged_error=1.0)
    never_hedged = Teacher(hedge_prob=0.0, plain_error=0.0, hedged_error=1.0)
    start, terms = 60, [5, 7, -3, 9]
    for _ in range(50):
        first = teacher_response(start, terms[:1], rng, always_hedged)
        assert first.endswith(ANSWER_MARKER + "65") is False
        assert teacher_response(start, terms, rng, never_hedged).endswith(ANSWER_MARKER + "78")


def test_responses_differ_in_order_and_phrasing() -> None:
    rng = random.Random(2)
    responses = [teacher_response(60, [5, 7, -3, 9], rng, PERFECT) for _ in range(200)]
    orders = {tuple(re.findall(r"(?:add|plus|with|take|minus|less) (\d+)", r)) for r in responses}
    assert len(orders) == 24  # every permutation of four terms
    assert len(set(responses)) == 200


def test_jsonl_rows_read_back(tmp_path) -> None:
    rows = training_problems(5)
    write_jsonl(rows, tmp_path / "train.jsonl")
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    assert [Problem(**json.loads(line)) for line in lines] == rows


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="split"):
        problems("test", 1)
    with pytest.raises(ValueError, match="num"):
        problems("train", -1)
    with pytest.raises(ValueError, match="hedge_prob"):
        Teacher(hedge_prob=1.5)


PINNED_TRAIN = [
    Problem("36 -6 +7 -9 +2 =?\n", "30"),
    Problem("44 -5 +3 -8 +4 =?\n", "38"),
]
PINNED_HELDOUT = [
    Problem("69 +6 -7 +5 +3 =?\n", "76"),
]
