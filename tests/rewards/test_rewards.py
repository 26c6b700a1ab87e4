"""Rewards: built-in ones, dotted paths, columns, skipping, and errors that name function and
row."""

from __future__ import annotations

import math

import pytest

from spec_rollout.config.sections import ConfigError, RewardConfig
from spec_rollout.rewards.rewards import RewardError, Rewards, exact_match, last_number, resolve

HERE = __name__


def length(prompt, response, answer):
    return len(response)


def scaled(prompt, response, answer, level, scale=10):
    return level * scale


def everything(prompt, response, answer, **columns):
    return sum(columns.values())


def skip(prompt, response, answer):
    return None


def skip_empty(prompt, response, answer):
    return 1 if response else None


def broken(prompt, response, answer):
    raise KeyError("unit")


def not_a_number(prompt, response, answer):
    return "good" if response == "text" else math.nan


def rewards(*names, weights=None):
    return Rewards(RewardConfig(tuple(f"{HERE}:{n}" for n in names), weights))


def test_builtin():
    assert exact_match("p", " 42\n", 42) == 1.0
    assert exact_match("p", "42.", "42") == 0.0
    assert last_number("p", "3 apples cost 1,200.50 in all", "1200.5") == 1.0
    assert last_number("p", "from 7 to -3", -3) == 1.0
    assert last_number("p", "7 then 8", 7) == 0.0
    assert last_number("p", "no digits", 0) == 0.0
    assert last_number("p", "7", "seven") == 0.0
    assert last_number("p", "so it is 72.", "48 / 2 = 24, 48 + 24 = 72\n#### 72") == 1.0
    assert last_number("p", "it is 1,", 1.0) == 1.0


def test_weighted_sum_and_columns():
    columns = {"level": 2, "other": 5}
    assert rewards("length")("p", "abc", None, columns) == 3.0
    assert rewards("scaled")("p", "abc", None, columns) == 20.0
    assert rewards("everything")("p", "abc", None, columns) == 7.0
    total = rewards("length", "scaled", weights=(0.5, -1.0))
    assert total("p", "abc", None, columns) == 1.5 - 20.0


def test_none_is_left_out():
    assert rewards("skip")("p", "abc", None, {}) is None
    assert rewards("skip", "length")("p", "abc", None, {}) == 3.0
    assert rewards("skip_empty")("p", "", None, {}) is None


@pytest.mark.parametrize(
    ("name", "response", "message"),
    [
        ("broken", "x", r"reward .*:broken: raised KeyError: 'unit' \(prompt of d\.jsonl:7\)"),
        ("not_a_number", "x", r"expected a finite number or None, got nan .*d\.jsonl:7"),
        ("not_a_number", "text", r"expected a finite number or None, got 'good'"),
        ("scaled", "x", r"reward .*:scaled: raised TypeError: .*'level'"),
    ],
)
def test_errors_name_function_and_row(name, response, message):
    with pytest.raises(RewardError, match=message):
        rewards(name)("p", response, None, {}, "d.jsonl:7")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "exact",
            "expected 'package.module:function' or one of exact_match, last_number, got 'exact'",
        ),
        ("no_such_module_:f", "cannot load 'no_such_module_:f': No module named"),
        (f"{HERE}:absent", "cannot load .*has no attribute 'absent'"),
        (f"{HERE}:HERE", "expected a callable, got str"),
    ],
)
def test_bad_names(name, message):
    with pytest.raises(ConfigError, match=f"reward.functions: {message}"):
        resolve(name)
