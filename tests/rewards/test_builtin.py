"""What the built-in rewards compare, and what they say they cannot."""

from __future__ import annotations

import math
from decimal import Decimal

import pytest

from spec_rollout.rewards.builtin import (
    exact_match,
    last_number,
    problem_with_number,
    problem_with_text,
)


@pytest.mark.parametrize(
    ("response", "answer", "value"),
    [
        (" 42\n", "42", 1),
        ("42.", "42", 0),
        ("72.0", "72", 0),  # text is compared as text
        # Numbers are compared as numbers.
        ("42", 42, 1),
        ("72", 72.0, 1),
        ("72.0", 72, 1),
        ("7_2", 72, 0),
        ("1,200", 1200, 1),
        ("0.1", 0.1, 1),
        ("0.10", Decimal("0.1"), 1),
        ("0.1000000000000000055511151231257827", 0.1, 0),
        ("1e-5", 1e-05, 1),
        (".00001", 1e-05, 1),
        ("-3", -3, 1),
        ("3", -3, 0),
        ("nan", 0, 0),
        ("72 apples", 72, 0),
        ("9007199254740993", 9007199254740993, 1),  # not a float
        ("9007199254740992", 9007199254740993, 0),
        # One of several.
        ("b", ["a", "b"], 1),
        ("c", ["a", "b"], 0),
        ("2.0", ["a", 2], 1),
        ("['a', 'b']", ["a", "b"], 0),
    ],
)
def test_exact_match(response, answer, value):
    assert exact_match("p", response, answer) == value


@pytest.mark.parametrize(
    ("response", "answer", "value"),
    [
        ("3 apples cost 1,200.50 in all", "1200.5", 1),
        ("from 7 to -3", -3, 1),
        ("7 then 8", 7, 0),
        ("no digits", 0, 0),
        ("so it is 72.", "48 / 2 = 24, 48 + 24 = 72\n#### 72", 1),
        ("it is 1,", 1.0, 1),
        ("it is 0.00001", 1e-05, 1),  # not the 5 of "1e-05"
        ("it is 5", 1e-05, 0),
        ("it is 3", ["2", 3], 1),
        ("it is 4", ["2", 3], 0),
        ("9" * 400, "8" * 400, 0),  # as floats both would be infinite
    ],
)
def test_last_number(response, answer, value):
    assert last_number("p", response, answer) == value


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, r"got nothing \(null\)"),
        (
            {"ground_truth": "72", "style": "rule-math_v2"},
            r"got a table with 'ground_truth', 'style' \(a dotted data\.answer_column names one",
        ),
        (True, "got bool True"),
        ([], "got an empty list"),
        ([["72"]], r"got list \['72'\]"),
        (["72", None], r"got nothing \(null\)"),
        (math.nan, "got float nan"),
        (math.inf, "got float inf"),
    ],
)
def test_answers_that_cannot_be_compared(answer, message):
    for reward, problem_with in (
        (exact_match, problem_with_text),
        (last_number, problem_with_number),
    ):
        with pytest.raises(TypeError, match=f"expected an answer that is text, .*{message}"):
            reward("p", "72", answer)
        with pytest.raises(TypeError, match=message):
            raise TypeError(problem_with(answer))


def test_last_number_needs_a_number():
    assert problem_with_number("seven") == "expected an answer with a number in it, got 'seven'"
    assert problem_with_number(["7", "seven"]) is not None
    assert problem_with_number("7 days") is None
    assert problem_with_text("seven") is None
