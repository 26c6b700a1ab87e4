"""Which columns hold prompt and answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spec_rollout.loading.records import DataError, Record, short

AUTO = "auto"
# In this order: verl's files have their answer in a table, TRL's and most others in a column.
_PROMPTS = ("prompt", "problem", "question")
_ANSWERS = ("reward_model.ground_truth", "answer", "final_answer", "ground_truth", "solution")


@dataclass(frozen=True, slots=True)
class ColumnNames:
    """Columns of a file; "a.b" is the key b of the column a.

    Attributes:
        prompt: Of the prompt.
        answer: Of the answer; None if there is none.
        note: What was recognised, where it is not what these columns are mostly called.
    """

    prompt: str
    answer: str | None
    note: str | None = None


def recognised(
    record: Record, source: str, prompt_column: str, answer_column: str | None
) -> ColumnNames:
    """The columns of a file, from its first row where they are "auto".

    Raises:
        DataError: naming the row, if none of the columns that are looked for is there.
    """
    prompt, answer = prompt_column, answer_column
    found, keys = [], []
    if prompt == AUTO:
        prompt = _first(record, source, _PROMPTS, "prompt_column")
        if prompt != "prompt":
            found.append(f"prompts are from column {prompt!r}")
            keys.append("data.prompt_column")
    if answer == AUTO:
        answer = _first(record, source, _ANSWERS, "answer_column")
        if answer != "answer":
            found.append(f"answers are from column {answer!r}")
            keys.append("data.answer_column")
    if not found:
        return ColumnNames(prompt, answer)
    others = "name others" if len(keys) > 1 else "names another"
    return ColumnNames(prompt, answer, f"{' and '.join(found)} ({' and '.join(keys)} {others})")


def _first(record: Record, source: str, names: tuple[str, ...], key: str) -> str:
    for name in names:
        if name in record or _reaches(record, name):
            return name
    have = ", ".join(map(repr, record)) or "none"
    none = "" if key == "prompt_column" else ", 'none' is for data without answers"
    raise DataError(
        f"{source}: expected a column {' or '.join(map(repr, names))}, got columns {have} "
        f"(data.{key} names another{none})"
    )


def _reaches(record: Mapping[str, Any], name: str) -> bool:
    value: Any = record
    for key in name.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return False
        value = value[key]
    return True


def value_at(record: Mapping[str, Any], name: str, source: str) -> Any:
    """The value of a column; "a.b" is the key b of the column a, unless a column has that name.

    Raises:
        DataError: naming the row, if there is none.
    """
    if name in record:
        return record[name]
    value: Any = record
    walked = ""
    for key in name.split("."):
        if not isinstance(value, Mapping) or key not in value:
            break
        value = value[key]
        walked = f"{walked}.{key}".lstrip(".")
    else:
        return value
    have = "columns " + (", ".join(map(repr, record)) or "none")
    if walked:
        keys = ", ".join(map(repr, value)) if isinstance(value, Mapping) else short(value)
        have = f"{walked!r} with {keys or 'nothing'}"
    raise DataError(f"{source}: expected a column {name!r}, got {have}")
