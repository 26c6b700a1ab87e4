"""Rewards: plain callables `f(prompt, response, answer, **columns) -> float | None`; None leaves
the response out."""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from spec_rollout.config.sections import ConfigError, RewardConfig

RewardFunction = Callable[..., "float | None"]

# Digits in groups of any size, so that "1,2000" is one number as written rather than two.
_NUMBER = re.compile(r"-?\d+(?:,\d+)*(?:\.\d+)?")


class RewardError(RuntimeError):
    """A reward function raised or returned something that is not a number; the message names
    function and row."""


def exact_match(prompt: str, response: str, answer: Any) -> float:
    """1 if the response, stripped, is the answer, else 0."""
    return float(response.strip() == str(answer).strip())


def last_number(prompt: str, response: str, answer: Any) -> float:
    """1 if the last numbers of response and answer are equal, else 0 (so an answer may be a worked
    solution)."""
    numbers = _NUMBER.findall(response), _NUMBER.findall(str(answer))
    if not all(numbers):
        return 0.0
    given, expected = (float(found[-1].replace(",", "")) for found in numbers)
    return float(given == expected)


BUILTIN: Mapping[str, RewardFunction] = {"exact_match": exact_match, "last_number": last_number}


def resolve(name: str) -> RewardFunction:
    """The function behind a built-in name or "package.module:function".

    Raises:
        ConfigError: if there is none.
    """
    if name in BUILTIN:
        return BUILTIN[name]
    module_name, colon, attribute = name.partition(":")
    if not (colon and module_name and attribute):
        raise ConfigError(
            f"reward.functions: expected 'package.module:function' or one of {', '.join(BUILTIN)}, "
            f"got {name!r}"
        )
    try:
        function: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            function = getattr(function, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"reward.functions: cannot load {name!r}: {error}") from error
    if not callable(function):
        raise ConfigError(
            f"reward.functions: expected a callable, got {type(function).__name__} at {name!r}"
        )
    return function


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    function: RewardFunction
    weight: float
    takes: frozenset[str] | None  # names of the columns it takes; None: all


class Rewards:
    """The weighted sum of a run's reward functions.

    Columns of the data are passed to the functions that name them (or take `**columns`).
    """

    def __init__(self, config: RewardConfig) -> None:
        weights = config.weights or (1.0,) * len(config.functions)
        self._entries = [
            _entry(name, weight) for name, weight in zip(config.functions, weights, strict=True)
        ]

    def __call__(
        self, prompt: str, response: str, answer: Any, columns: Mapping[str, Any], source: str = "?"
    ) -> float | None:
        """Reward of one response: sum over functions, those that return None left out; None if all
        do.

        Args:
            source: Where the prompt comes from, for messages.

        Raises:
            RewardError: if a function raises or returns something else than a finite number or
                None.
        """
        total: float | None = None
        for entry in self._entries:
            extra = columns
            if entry.takes is not None:
                extra = {k: columns[k] for k in entry.takes if k in columns}
            try:
                value = entry.function(prompt, response, answer, **extra)
            except Exception as error:
                raise RewardError(
                    f"reward {entry.name}: raised {type(error).__name__}: {error} (prompt of "
                    f"{source})"
                ) from error
            if value is None:
                continue
            try:
                number = float(value)
            except (TypeError, ValueError):
                number = math.nan
            if not math.isfinite(number):
                raise RewardError(
                    f"reward {entry.name}: expected a finite number or None, got {value!r} (prompt "
                    f"of {source})"
                )
            total = (total or 0.0) + entry.weight * number
        return total


def _entry(name: str, weight: float) -> _Entry:
    function = resolve(name)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # built-in callables may have no signature
        return _Entry(name, function, weight, None)
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return _Entry(name, function, weight, None)
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return _Entry(name, function, weight, frozenset(named - {"prompt", "response", "answer"}))
