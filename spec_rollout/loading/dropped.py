"""Rows that are left out because their prompt is too long."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class ModelLength:
    """What a prompt and its response have to fit.

    Attributes:
        max_length: Tokens of both.
        max_tokens: Of the response: `rollout.max_tokens`.
        whose: "the model's" or "the config's".
    """

    max_length: int
    max_tokens: int
    whose: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that is left out.

    Attributes:
        source: "file:line".
        num_tokens: Of its prompt.
        limit: Most tokens that it could have.
        limited_by: The key of the config that says so; "the model" where it is its length.
        reason: In words, with the row.
    """

    source: str
    num_tokens: int
    limit: int
    limited_by: str
    reason: str


def long_prompt(
    source: str,
    where: str,
    num_tokens: int,
    max_prompt_tokens: int | None,
    model_length: ModelLength | None,
) -> Dropped | None:
    """Why a prompt is too long; None if it is not.

    Args:
        source: The row.
        where: Row and column, for messages.
        num_tokens: Of the prompt.
        max_prompt_tokens, model_length: See `render_rows`.
    """
    if max_prompt_tokens is not None and num_tokens > max_prompt_tokens:
        reason = f"{where}: expected at most {max_prompt_tokens} tokens, got {num_tokens}"
        return Dropped(source, num_tokens, max_prompt_tokens, "data.max_prompt_tokens", reason)
    if model_length is None:
        return None
    most, max_tokens = model_length.max_length, model_length.max_tokens
    if num_tokens + max_tokens <= most:
        return None
    reason = (
        f"{source}: expected prompt and response to fit {model_length.whose} {most} tokens, got "
        f"{num_tokens} prompt tokens + rollout.max_tokens = {max_tokens}"
    )
    by = "the model" if model_length.whose == "the model's" else "rollout.max_model_len"
    return Dropped(source, num_tokens, most - max_tokens, by, reason)


def note_of(dropped: Sequence[Dropped], num_rows: int) -> str:
    """What was left out of how many rows, and why."""
    counts = Counter((row.limited_by, row.limit) for row in dropped)
    reasons = ", ".join(
        f"{count} longer than {limit} tokens ({by})" for (by, limit), count in counts.items()
    )
    longest = max(row.num_tokens for row in dropped)
    return (
        f"{len(dropped)} of {num_rows} rows are left out, as their prompts are too long: {reasons}"
        f"; the longest has {longest} tokens"
    )


def json_lines(dropped: Mapping[str, Sequence[Dropped]]) -> str:
    """The rows as lines of JSON, with the data they are of ("train", "heldout")."""
    return "".join(
        json.dumps({"data": name, **asdict(row)}) + "\n"
        for name, rows in dropped.items()
        for row in rows
    )
