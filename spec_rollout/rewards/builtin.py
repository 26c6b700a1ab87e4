"""Rewards that come with the package."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

from spec_rollout.rewards.maths import math_verify

# Digits in groups of any size, so that "1,2000" is one number as written rather than two.
_NUMBER = re.compile(r"-?\d+(?:,\d+)*(?:\.\d+)?")
_WHOLE_NUMBER = re.compile(r"[+-]?(?:\d+(?:,\d+)*\.?\d*|\.\d+)(?:[eE][+-]?\d{1,4})?")


def exact_match(prompt: str, response: str, answer: Any) -> float:
    """1 if the response, stripped, is the answer, else 0.

    Args:
        answer: Text; a number, which is compared as one ("72.0" is 72); or a list of them, of which
            any will do.
    """
    given = response.strip()
    return float(any(_is_same(given, item) for item in _accepted(answer)))


def last_number(prompt: str, response: str, answer: Any) -> float:
    """1 if the last numbers of response and answer are equal, else 0.

    Args:
        answer: Text, perhaps a worked solution; a number; or a list of them, of which any will do.
    """
    given = _last_number(response)
    if given is None:
        return 0.0
    return float(any(given == _last_number(item) for item in _accepted(answer)))


def problem_with_text(answer: Any) -> str | None:
    """What `exact_match` cannot compare about an answer; None if nothing."""
    try:
        _accepted(answer)
    except TypeError as error:
        return str(error)
    return None


def problem_with_number(answer: Any) -> str | None:
    """What `last_number` cannot compare about an answer; None if nothing."""
    problem = problem_with_text(answer)
    if problem is None:
        for item in _accepted(answer):
            if _last_number(item) is None:
                return f"expected an answer with a number in it, got {item!r:.80}"
    return problem


def problem_with_mathematics(answer: Any) -> str | None:
    """What `math_verify` cannot compare about an answer; None if nothing."""
    problem = problem_with_text(answer)
    if problem is None and any(isinstance(i, str) and not i.strip() for i in _accepted(answer)):
        return f"expected an answer that is not empty, got {answer!r:.80}"
    return problem


RewardFunction = Callable[..., Any]

BUILTIN: Mapping[str, RewardFunction] = {
    "exact_match": exact_match,
    "last_number": last_number,
    "math_verify": math_verify,
}
# By name: what keeps an answer from being compared.
ANSWER_CHECKS: Mapping[str, Callable[[Any], str | None]] = {
    "exact_match": problem_with_text,
    "last_number": problem_with_number,
    "math_verify": problem_with_mathematics,
}


def _accepted(answer: Any) -> list[Any]:
    """The answers of which any will do.

    Raises:
        TypeError: saying what was expected and what came.
    """
    accepted = answer if isinstance(answer, list) else [answer]
    for item in accepted:
        if isinstance(item, str) or _is_number(item):
            continue
        raise TypeError(f"expected an answer that is text, a number or a list, got {_told(item)}")
    if not accepted:
        raise TypeError("expected an answer that is text, a number or a list, got an empty list")
    return accepted


def _told(item: Any) -> str:
    if item is None:
        return "nothing (null)"
    if isinstance(item, Mapping):
        keys = ", ".join(map(repr, item))
        return f"a table with {keys} (a dotted data.answer_column names one of them)"
    return f"{type(item).__name__} {item!r:.80}"


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, int | Decimal) or (isinstance(value, float) and math.isfinite(value))


def _decimal(value: float | Decimal) -> Decimal:
    # Of a float the shortest digits that give it: 0.1 is 0.1.
    return Decimal(repr(value)) if isinstance(value, float) else Decimal(value)


def _is_same(given: str, expected: Any) -> bool:
    if isinstance(expected, str):
        return given == expected.strip()
    if not _WHOLE_NUMBER.fullmatch(given):
        return False
    return Decimal(given.replace(",", "")) == _decimal(expected)


def _last_number(value: Any) -> Decimal | None:
    if not isinstance(value, str):
        return _decimal(value)
    found = _NUMBER.findall(value)
    # Decimals have any number of digits: as floats, numbers of 400 digits would all be infinite.
    return Decimal(found[-1].replace(",", "")) if found else None
