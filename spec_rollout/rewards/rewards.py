"""The weighted sum of a run's reward functions."""

from __future__ import annotations

import math
import numbers
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spec_rollout.config.sections import ConfigError, RewardConfig
from spec_rollout.rewards.builtin import ANSWER_CHECKS, RewardFunction
from spec_rollout.rewards.guard import process_kept
from spec_rollout.rewards.maths import MathVerify, math_verify, problem_with_installation
from spec_rollout.rewards.resolve import resolve
from spec_rollout.rewards.signature import Sample, Signature, SignatureError, signature_of

# Losses are sums in float32, which goes to 3e38.
_LARGEST = 1e30


class RewardError(RuntimeError):
    """A reward function raised or returned something that is not a number; the message names
    function and row."""


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    label: str
    function: RewardFunction
    weight: float
    signature: Signature
    answer_check: Callable[[Any], str | None] | None


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the rewards say about some responses.

    Attributes:
        totals: Weighted sum of each response; None where no function judged it.
        by_function: What each function gave, unweighted, by its label.
    """

    totals: list[float | None]
    by_function: dict[str, list[float | None]]


class Rewards:
    """A run's reward functions and their weights.

    Args:
        config: Names the functions.
        columns: Columns of the data, for a check of what the functions take; None checks nothing.

    Raises:
        ConfigError: if a function cannot be loaded, or takes what there is not.
    """

    def __init__(self, config: RewardConfig, columns: Collection[str] | None = None) -> None:
        weights = config.weights or (1.0,) * len(config.functions)
        labels = _labels(config.functions)
        self._entries = [
            _entry(name, label, weight, config, columns)
            for name, label, weight in zip(config.functions, labels, weights, strict=True)
        ]

    @property
    def labels(self) -> list[str]:
        """A short name of each function, for logs."""
        return [entry.label for entry in self._entries]

    def problem_of(self, answer: Any, columns: Mapping[str, Any]) -> str | None:
        """What keeps a row from being judged; None if nothing."""
        for entry in self._entries:
            missing = sorted(entry.signature.required - set(columns))
            if missing:
                return f"expected a column {missing[0]!r}, which reward {entry.name} takes"
            problem = None if entry.answer_check is None else entry.answer_check(answer)
            if problem is not None:
                return f"reward {entry.name}: {problem}"
        return None

    def judge(self, samples: Sequence[Sample]) -> Judgement:
        """Judges responses.

        A function that returns None leaves the response out; the sum is over the others.

        Raises:
            RewardError: if a function raises, exits, or returns something else than a finite number
                of at most 1e30, or None.
        """
        totals: list[float | None] = [None] * len(samples)
        by_function: dict[str, list[float | None]] = {}
        for entry in self._entries:
            with process_kept():
                values = _values(entry, samples)
            by_function[entry.label] = values
            for index, value in enumerate(values):
                if value is None:
                    continue
                total = (totals[index] or 0.0) + entry.weight * value
                _check_size(entry, "sum of the rewards", total, samples[index].source)
                totals[index] = total
        return Judgement(totals, by_function)


def _values(entry: _Entry, samples: Sequence[Sample]) -> list[float | None]:
    """What a function gives each response."""
    if not entry.signature.batched:
        return [
            _number(entry, _called(entry, [sample], sample.source), sample.source)
            for sample in samples
        ]
    if not samples:
        return []
    source = f"{samples[0].source} to {samples[-1].source}"
    result = _called(entry, samples, source)
    if hasattr(result, "tolist"):  # arrays and tensors
        result = result.tolist()
    if not isinstance(result, list | tuple) or len(result) != len(samples):
        got = f"{len(result)}" if isinstance(result, list | tuple) else f"{result!r:.80}"
        raise RewardError(
            f"reward {entry.name}: expected a list of {len(samples)} numbers, got {got} (prompts "
            f"of {source})"
        )
    return [
        _number(entry, value, sample.source) for value, sample in zip(result, samples, strict=True)
    ]


def _called(entry: _Entry, samples: Sequence[Sample], source: str) -> Any:
    try:
        return entry.signature.call(entry.function, samples)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit, too: the run must not end as if all were well
        raise RewardError(
            f"reward {entry.name}: raised {type(error).__name__}: {error} (prompt of {source})"
        ) from error


def _number(entry: _Entry, value: Any, source: str) -> float | None:
    if entry.signature.scores and isinstance(value, Mapping) and "score" in value:
        value = value["score"]
    if value is None:
        return None
    number = math.nan
    if isinstance(value, numbers.Number) or hasattr(value, "item"):
        try:
            number = float(value)  # type: ignore[arg-type]  # one number, or it raises
        except (TypeError, ValueError, RuntimeError, OverflowError):
            number = math.nan
    if not math.isfinite(number):
        raise RewardError(
            f"reward {entry.name}: expected a finite number or None, got {value!r:.200} (prompt of "
            f"{source})"
        )
    _check_size(entry, "number", number, source)
    return number


def _check_size(entry: _Entry, what: str, value: float, source: str) -> None:
    """Sums and squares of a batch's rewards have to be numbers, too."""
    if abs(value) > _LARGEST:
        raise RewardError(
            f"reward {entry.name}: expected a {what} of at most {_LARGEST:g}, got {value:g} "
            f"(prompt of {source})"
        )


def _entry(
    name: str,
    label: str,
    weight: float,
    config: RewardConfig,
    columns: Collection[str] | None,
) -> _Entry:
    function = resolve(name, config.folder)
    if function is math_verify:
        problem = problem_with_installation()
        if problem is not None:
            raise ConfigError(f"reward.functions: {name!r} {problem}")
        function = MathVerify(config.answer_seconds)
    try:
        signature = signature_of(function, columns)
    except SignatureError as error:
        raise ConfigError(f"reward.functions: {name!r}: {error}") from None
    return _Entry(name, label, function, weight, signature, ANSWER_CHECKS.get(name))


def _labels(names: Sequence[str]) -> list[str]:
    """The name of each function, with its module where two have the same."""
    # `reward_std` and `reward_seconds` are other figures.
    short = [re.sub(r"\W", "_", name.rpartition(":")[2]) for name in names]
    counts = Counter(short)
    whole = [re.sub(r"\W", "_", name) for name in names]
    labels = [
        s if counts[s] == 1 and s not in ("std", "seconds") else w
        for s, w in zip(short, whole, strict=True)
    ]
    # One function twice, with two weights.
    seen: Counter[str] = Counter()
    numbered = []
    for label in labels:
        seen[label] += 1
        numbered.append(label if seen[label] == 1 else f"{label}_{seen[label]}")
    return numbered
