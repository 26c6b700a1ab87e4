"""The weighted sum of a run's reward functions."""

from __future__ import annotations

import asyncio
import math
import numbers
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from spec_rollout.config.sections import ConfigError, RewardConfig
from spec_rollout.rewards import event_loop
from spec_rollout.rewards.builtin import ANSWER_CHECKS, RewardFunction
from spec_rollout.rewards.guard import process_kept
from spec_rollout.rewards.maths import MathVerify, math_verify, problem_with_installation
from spec_rollout.rewards.resolve import resolve
from spec_rollout.rewards.run_context import Progress, RunContext
from spec_rollout.rewards.signature import Sample, Signature, SignatureError, signature_of

# Losses are sums in float32, which goes to 3e38.
_LARGEST = 1e30
# Failures that are told in full.
_MOST_FAILURES = 3


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
        totals: Weighted sum of each response; None where no function judged it, or one failed.
        by_function: What each function gave, unweighted, by its label.
        num_failed: Responses that are left out because a function failed.
        failures: What failed, with function and row, a line each.
        num_out_of_time: Answers that `math_verify` could not judge in time; None without it.
        logged: What functions logged, by name.
    """

    totals: list[float | None]
    by_function: dict[str, list[float | None]]
    num_failed: int = 0
    failures: tuple[str, ...] = ()
    num_out_of_time: int | None = None
    logged: Mapping[str, list[float]] = field(default_factory=dict)


class Rewards:
    """A run's reward functions and their weights.

    Args:
        config: Names the functions.
        columns: Columns of the data, for a check of what the functions take; None checks nothing.

    Raises:
        ConfigError: if a function cannot be loaded, or takes what there is not.
    """

    def __init__(self, config: RewardConfig, columns: Collection[str] | None = None) -> None:
        self._stops = config.on_error == "stop"
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

    def judge(self, samples: Sequence[Sample], progress: Progress | None = None) -> Judgement:
        """Judges responses.

        The sum is over the functions that do not return None; a response for which all do is left
        out. So is one for which a function fails: what is left of a sum cannot be compared.

        Args:
            samples: The responses.
            progress: For functions that ask how far the run is.

        Raises:
            RewardError: with `reward.on_error = "stop"`, if a function raises, exits, or returns
                something else than a finite number of at most 1e30, or None.
        """
        context = RunContext(progress or Progress())
        totals: list[float | None] = [None] * len(samples)
        by_function: dict[str, list[float | None]] = {}
        failures: list[RewardError] = []
        failed: set[int] = set()
        for entry in self._entries:
            with process_kept():
                values = _values(entry, samples, context, self._stops)
            for index, value in enumerate(values):
                if isinstance(value, float):
                    total = (totals[index] or 0.0) + entry.weight * value
                    source = samples[index].source
                    value = _checked_size(entry, "sum of the rewards", total, source)
                    if isinstance(value, float):
                        totals[index] = value
                if isinstance(value, RewardError):
                    if self._stops:
                        raise value
                    failures.append(value)
                    failed.add(index)
            by_function[entry.label] = [v if isinstance(v, float) else None for v in values]
        return Judgement(
            [None if index in failed else total for index, total in enumerate(totals)],
            by_function,
            len(failed),
            tuple(dict.fromkeys(map(str, failures))),
            self._num_out_of_time() if samples else None,
            context.logged,
        )

    def _num_out_of_time(self) -> int | None:
        judges = [e.function for e in self._entries if isinstance(e.function, MathVerify)]
        return sum(judge.num_out_of_time for judge in judges) if judges else None


def failures_note(num_failed: int, failures: Sequence[str]) -> str:
    """What `Judgement` says of failures, in a line: the first ones in full."""
    more = len(failures) - _MOST_FAILURES
    said = "; ".join(failures[:_MOST_FAILURES]) + (f"; and {more} more" if more > 0 else "")
    return f"{num_failed} responses are left out: {said}"


# What a function gives a response: a number, nothing, or why it failed.
_Value = float | None | RewardError


def _values(
    entry: _Entry, samples: Sequence[Sample], context: RunContext, stops: bool
) -> list[_Value]:
    """What a function gives each response.

    Raises:
        RewardError: with `stops`, at the first failure: no more calls are made.
    """
    if entry.signature.batched:
        return _values_of_all(entry, samples, context) if samples else []
    results = []
    for sample in samples:
        results.append(_result(partial(entry.signature.call, entry.function, [sample], context)))
        if stops and isinstance(results[-1], _Raised):
            break
    results = _awaited(results)
    return [
        _number(entry, result, sample.source)
        for result, sample in zip(results, samples, strict=False)
    ]


def _values_of_all(entry: _Entry, samples: Sequence[Sample], context: RunContext) -> list[_Value]:
    source = f"{samples[0].source} to {samples[-1].source}"
    result = _result(partial(entry.signature.call, entry.function, samples, context))
    (result,) = _awaited([result])
    if hasattr(result, "tolist"):  # arrays and tensors
        result = result.tolist()
    if isinstance(result, _Raised):
        return [_failure(entry, result, source)] * len(samples)
    if not isinstance(result, list | tuple) or len(result) != len(samples):
        got = f"{len(result)}" if isinstance(result, list | tuple) else f"{result!r:.80}"
        error = RewardError(
            f"reward {entry.name}: expected a list of {len(samples)} numbers, got {got} (prompts "
            f"of {source})"
        )
        return [error] * len(samples)
    return [
        _number(entry, value, sample.source) for value, sample in zip(result, samples, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _Raised:
    error: BaseException


def _result(call: Callable[[], Any]) -> Any:
    """What a call returns, or `_Raised`."""
    try:
        return call()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit, too: the run must not end as if all were well
        return _Raised(error)


def _awaited(results: list[Any]) -> list[Any]:
    """The results; in place of those that are awaitable what they give, or `_Raised`. Whether they
    are is seen in the results: an object's call and what wraps a function may be `async`, too."""
    places = [i for i, result in enumerate(results) if isinstance(result, Awaitable)]
    if not places:
        return results

    async def one(awaitable: Awaitable[Any]) -> Any:
        try:
            return await awaitable
        except BaseException as error:
            return _Raised(error)

    async def every() -> list[Any]:
        # All at once: what they wait for is mostly a server.
        return list(await asyncio.gather(*(one(results[i]) for i in places)))

    given = dict(zip(places, event_loop.run(every()), strict=True))
    return [given.get(i, result) for i, result in enumerate(results)]


def _failure(entry: _Entry, raised: _Raised, source: str) -> RewardError:
    error = raised.error
    failure = RewardError(
        f"reward {entry.name}: raised {type(error).__name__}: {error} (prompt of {source})"
    )
    failure.__cause__ = error
    return failure


def _number(entry: _Entry, value: Any, source: str) -> _Value:
    if isinstance(value, _Raised):
        return _failure(entry, value, source)
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
        return RewardError(
            f"reward {entry.name}: expected a finite number or None, got {value!r:.200} (prompt of "
            f"{source})"
        )
    return _checked_size(entry, "number", number, source)


def _checked_size(entry: _Entry, what: str, value: float, source: str) -> float | RewardError:
    """Sums and squares of a batch's rewards have to be numbers, too."""
    if abs(value) <= _LARGEST:
        return value
    return RewardError(
        f"reward {entry.name}: expected a {what} of at most {_LARGEST:g}, got {value:g} (prompt of "
        f"{source})"
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
