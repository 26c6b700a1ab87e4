"""What a reward function takes, read from the names of its parameters.

One response a call: `f(prompt, response, answer, **columns)`, or verl's
`compute_score(data_source, solution_str, ground_truth, extra_info)`. All responses of a step at
once: `f(prompts, responses, answers, **columns)`, verl's
`f(data_sources, solution_strs, ground_truths, extra_infos)`, or TRL's
`f(prompts, completions, completion_ids, trainer_state, log_metric, log_extra, **columns)`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spec_rollout.rewards.run_context import FROM_RUN, RunContext


@dataclass(frozen=True, slots=True)
class Sample:
    """A response to be judged.

    Attributes:
        prompt: Text of its prompt.
        response: Its text.
        answer: The answer of the prompt's row.
        columns: Of the row, by name.
        source: "file:line" of the row, for messages.
        response_ids: Token ids of the response.
        messages: Of the prompt, where the row holds messages.
    """

    prompt: str
    response: str
    answer: Any
    columns: Mapping[str, Any]
    source: str = "?"
    response_ids: Sequence[int] = ()
    messages: list[dict[str, Any]] | None = None


class SignatureError(ValueError):
    """A function takes something that there is not."""


Getter = Callable[[Sample], Any]

_GETTERS: Mapping[str, Getter] = {
    "prompt": lambda sample: sample.prompt,
    "response": lambda sample: sample.response,
    "answer": lambda sample: own_copy(sample.answer),
    "response_ids": lambda sample: list(sample.response_ids),
}
_PLACES = [_GETTERS[name] for name in ("prompt", "response", "answer")]
_VERL = {"solution_str": "response", "ground_truth": "answer"}
_VERL_BATCH = {"solution_strs": "response", "ground_truths": "answer"}
_TRL = {"completions", "completion_ids"}
_BATCH = {"prompts": "prompt", "responses": "response", "answers": "answer"}


def _messages_of(sample: Sample) -> Any:
    """TRL hands on what the row holds: messages, or text."""
    return sample.prompt if sample.messages is None else own_copy(sample.messages)


def _completion_of(sample: Sample) -> Any:
    if sample.messages is None:
        return sample.response
    return [{"role": "assistant", "content": sample.response}]


def _extra_info_of(sample: Sample) -> Any:
    """verl hands on a table, where the data has none an empty one."""
    return own_copy(sample.columns.get("extra_info")) or {}


@dataclass(frozen=True, slots=True)
class Signature:
    """How a function is called.

    Attributes:
        batched: With lists, once for all responses.
        scores: The function is verl's and may return a table with a "score".
        positional: What it gets by position.
        placed: Names of the parameters that get it, where they could be given by name, too.
        named: What it gets by name.
        columns: Columns that it takes by name.
        required: Of these, the ones without a default.
        all_columns: It takes every column but those that have the name of what it gets.
        from_run: What it takes of `FROM_RUN`.
        answer_too: Among all columns, the answer: TRL knows no answers, only columns.
    """

    batched: bool = False
    scores: bool = False
    positional: tuple[Getter, ...] = ()
    placed: frozenset[str] = frozenset()
    named: Mapping[str, Getter] = field(default_factory=dict)
    columns: frozenset[str] = frozenset()
    required: frozenset[str] = frozenset()
    all_columns: bool = False
    from_run: frozenset[str] = frozenset()
    answer_too: bool = False

    def call(
        self,
        function: Callable[..., Any],
        samples: Sequence[Sample],
        context: RunContext | None = None,
    ) -> Any:
        """Calls the function for one sample, or for all of them if it is batched."""
        if not self.batched:
            (sample,) = samples
            columns = sample.columns
            kwargs = {name: own_copy(columns[name]) for name in self._taken(columns)}
            kwargs.update({name: getter(sample) for name, getter in self.named.items()})
            return function(*[getter(sample) for getter in self.positional], **kwargs)
        names = self._taken({name for sample in samples for name in sample.columns})
        lists = {n: [own_copy(sample.columns.get(n)) for sample in samples] for n in names}
        if self.answer_too and any(sample.answer is not None for sample in samples):
            lists["answer"] = [own_copy(sample.answer) for sample in samples]
        lists.update({n: [get(sample) for sample in samples] for n, get in self.named.items()})
        of_run = {n: FROM_RUN[n](context or RunContext()) for n in self.from_run - set(lists)}
        by_place = [[get(sample) for sample in samples] for get in self.positional]
        return function(*by_place, **lists, **of_run)

    def _taken(self, names: Collection[str]) -> list[str]:
        if self.all_columns:
            # A column of that name would be given beside it.
            return [name for name in names if name not in self.named and name not in self.placed]
        return [name for name in self.columns if name in names]


def own_copy(value: Any) -> Any:
    """A value that the function may change: the next response of the row needs it as it was."""
    return copy.deepcopy(value) if isinstance(value, list | dict) else value


def signature_of(function: Callable[..., Any], columns: Collection[str] | None) -> Signature:
    """Reads a function's parameters.

    A name that has a meaning, or is a column, gets that. Of the first three parameters, those with
    other names get prompt, response and answer by their place (in a batch, the lists of them).

    Args:
        function: The function.
        columns: Names of the data's columns; None takes any other name for one.

    Raises:
        SignatureError: saying what the function takes that there is not.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some callables written in C
        return Signature(positional=tuple(_PLACES))
    names = {p.name for p in parameters}
    batched = bool(names & {"responses", "solution_strs", *_TRL}) and not (
        names & {"response", "solution_str"}
    )
    known = _known(names, batched, columns)
    verl = bool(names & {"solution_str", "solution_strs"})
    trl = batched and bool(names & _TRL)
    from_run: set[str] = set()
    by_place = not verl and _takes_places(parameters, known)
    positional: list[Getter] = []
    placed: set[str] = set()
    named: dict[str, Getter] = {}
    taken: dict[str, bool] = {}  # whether it has no default
    all_columns = False
    in_order = True  # while every parameter so far is given by position
    for index, parameter in enumerate(parameters):
        name, has_default = parameter.name, parameter.default is not parameter.empty
        if parameter.kind is parameter.VAR_KEYWORD:
            all_columns = not verl  # whose keywords are other things than columns
            continue
        if parameter.kind is parameter.VAR_POSITIONAL:
            if in_order and positional == _PLACES[: len(positional)]:
                positional += _PLACES[len(positional) :]
            continue
        getter = known.get(name)
        is_column = columns is not None and name in columns
        if trl and name in FROM_RUN and not is_column:
            from_run.add(name)
            in_order = False
            continue
        if getter is None and not is_column and by_place and index < len(_PLACES):
            if has_default:  # the answer, or a setting of the function?
                meaning = ("prompt", "response", "answer")[index]
                raise SignatureError(
                    f"expected the name {meaning!r}, a column of the data or no default for "
                    f"parameter {index + 1}, got '{parameter}' (a setting can be keyword-only)"
                )
            getter = _PLACES[index]
        if getter is not None:
            if in_order and parameter.kind is not parameter.KEYWORD_ONLY:
                positional.append(getter)
                if parameter.kind is not parameter.POSITIONAL_ONLY:
                    placed.add(name)
            else:
                named[name] = getter
            continue
        in_order = False
        if parameter.kind is parameter.POSITIONAL_ONLY or not (
            is_column or has_default or columns is None
        ):
            have = ", ".join(map(repr, sorted(columns or ()))) or "none"
            raise SignatureError(
                "expected parameters that are prompt, response, answer or columns of the data "
                f"({have}), got {name!r}"
            )
        taken[name] = not has_default
    return Signature(
        batched,
        verl,
        tuple(positional),
        frozenset(placed),
        named,
        frozenset(taken),
        frozenset(name for name, is_required in taken.items() if is_required),
        all_columns,
        frozenset(FROM_RUN if trl and all_columns else from_run),
        answer_too=trl and all_columns and "answer" not in names,
    )


def _takes_places(parameters: Sequence[inspect.Parameter], known: Mapping[str, Getter]) -> bool:
    """Whether the first three parameters are prompt, response and answer, whatever their names.

    Not if a name says that one of these comes in another place.
    """
    by_place = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(by_place) < len(_PLACES):
        return False
    first = {p.name for p in by_place[: len(_PLACES)]}
    if any(known.get(p.name) in _PLACES for p in parameters if p.name not in first):
        return False
    return all(
        known.get(p.name, place) is place for p, place in zip(by_place, _PLACES, strict=False)
    )


def _known(names: set[str], batched: bool, columns: Collection[str] | None) -> dict[str, Getter]:
    """Parameters whose names have a meaning."""
    known = dict(_GETTERS)
    if "solution_str" in names:
        known.update({name: _GETTERS[meaning] for name, meaning in _VERL.items()})
        known["extra_info"] = _extra_info_of
    if "solution_strs" in names:
        known.update({name: _GETTERS[meaning] for name, meaning in _VERL_BATCH.items()})
        known["extra_infos"] = _extra_info_of
        if columns is None or "data_source" in columns:
            known["data_sources"] = lambda sample: sample.columns.get("data_source")
    if batched:
        known.update({name: _GETTERS[meaning] for name, meaning in _BATCH.items()})
        if names & _TRL:
            known["prompts"] = _messages_of
            known["completions"] = _completion_of
            known["completion_ids"] = _GETTERS["response_ids"]
    return known
