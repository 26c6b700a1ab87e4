"""Prompts: rows from a file, checked, rendered and tokenized."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from spec_rollout.loading.columns import AUTO, ColumnNames, recognised, value_at
from spec_rollout.loading.dropped import Dropped, ModelLength, long_prompt, note_of
from spec_rollout.loading.order import PromptOrder
from spec_rollout.loading.prompts import Message, PromptRenderer, RenderedPrompt
from spec_rollout.loading.records import DataError, Record, canonical, short, unidentified
from spec_rollout.loading.sources import read_records
from spec_rollout.rewards.rewards import Rewards

__all__ = [
    "DataError",
    "PromptData",
    "PromptOrder",
    "PromptRow",
    "SourceRow",
    "check_identity",
    "check_rows",
    "load_prompts",
    "read_records",
    "read_rows",
    "render_rows",
]

# What these names mean to a reward is fixed.
_FIXED = ("prompt", "response", "answer")


@dataclass(frozen=True, slots=True)
class SourceRow:
    """A row as the file has it.

    Attributes:
        names: Of the columns of prompt and answer.
        record: All of it.
        prompt: Of the prompt column.
        answer: Of the answer column; None if there is none.
        columns: For the rewards: all columns but those named prompt, response and answer.
        source: "file:line", for messages.
    """

    names: ColumnNames
    record: Record
    prompt: Any
    answer: Any
    columns: Mapping[str, Any]
    source: str


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One prompt.

    Attributes:
        prompt_ids: Token ids, at least one. [num_prompt_tokens], int32.
        prompt: Text handed to the rewards: that of the file; of chat messages the rendered text, of
            token ids what they stand for.
        rendered: Text that the model continues.
        answer: The row's answer column; None if there is none.
        columns: See `SourceRow`.
        user_key: What the rollout session identifies the row by (`RolloutSession.rollout`). Rows of
            equal prompts have their own, so that each keeps its own cached rollouts and noise.
        source: "file:line", for messages.
        messages: What the row held as its prompt, where these were chat messages.
    """

    prompt_ids: np.ndarray
    prompt: str
    rendered: str
    answer: Any
    columns: Mapping[str, Any]
    user_key: str | bytes
    source: str
    messages: list[Message] | None = None


@dataclass(frozen=True, slots=True)
class PromptData:
    """All rows of a file.

    Attributes:
        rows: In file order.
        dropped: Rows left out because their prompt was too long.
        fingerprint: Hash of the rows as the file has them, and of the settings that say what is
            made of them; the same data gives the same, whatever chat template and tokenizer are.
        rendering: Hash of the token ids of all prompts.
        template_time: What the chat template saw as the time, ISO 8601; None if it did not ask.
        notes: What the user should know of how prompts are rendered, a line each.
        row_notes: And of which columns were recognised and which rows left out.
    """

    rows: tuple[PromptRow, ...]
    dropped: tuple[Dropped, ...]
    fingerprint: str
    rendering: str = ""
    template_time: str | None = None
    notes: tuple[str, ...] = ()
    row_notes: tuple[str, ...] = ()

    @property
    def num_dropped(self) -> int:
        return len(self.dropped)

    def __len__(self) -> int:
        return len(self.rows)


def read_rows(
    path: str | os.PathLike[str],
    *,
    prompt_column: str = AUTO,
    answer_column: str | None = AUTO,
    max_rows: int | None = None,
) -> list[SourceRow]:
    """Reads prompts; nothing of the model is needed.

    Args:
        path: See `read_records`.
        prompt_column, answer_column, max_rows: See `DataConfig`.

    Raises:
        DataError: naming file and line; also if there is no row.
    """
    rows: list[SourceRow] = []
    for source, record in read_records(path, max_rows):
        if rows:
            names = rows[0].names
        else:
            names = recognised(record, source, prompt_column, answer_column)
        prompt = value_at(record, names.prompt, source)
        answer = None if names.answer is None else value_at(record, names.answer, source)
        columns = {k: v for k, v in record.items() if k not in _FIXED}
        rows.append(SourceRow(names, record, prompt, answer, columns, source))
    if not rows:
        raise DataError(f"data: expected at least one row in {str(path)!r}, got none")
    return rows


def check_rows(rows: Iterable[SourceRow], rewards: Rewards) -> None:
    """Raises DataError for the first row whose answer or columns the rewards cannot use."""
    for row in rows:
        problem = rewards.problem_of(row.answer, row.columns)
        if problem is not None:
            raise DataError(f"{row.source}: {problem}")


def check_identity(rows: Iterable[SourceRow]) -> None:
    """Raises DataError for the first row that a resumed run could not tell to be the same."""
    for row in rows:
        for name, value in row.record.items():
            if unidentified(value):
                raise DataError(
                    f"{row.source}: {name}: expected a value that another process can tell to be "
                    "the same (text, numbers, lists, tables, dates, images), got "
                    f"{short(value)}: a run could not be resumed; leave the column out"
                )


def render_rows(
    rows: Sequence[SourceRow],
    renderer: PromptRenderer,
    path: str | os.PathLike[str],
    *,
    max_prompt_tokens: int | None = None,
    long_prompts: str = "error",
    model_length: ModelLength | None = None,
) -> PromptData:
    """Renders and tokenizes rows.

    Args:
        rows: Of `read_rows`, at least one.
        renderer: Says how.
        path: Where they are from, for messages.
        max_prompt_tokens: Longer prompts raise, or are left out and told of if `long_prompts` is
            "drop".
        model_length: What prompt and response have to fit; the same goes for prompts that do not.

    Raises:
        DataError: naming file and line.
    """
    kept: list[PromptRow] = []
    dropped: list[Dropped] = []
    names = rows[0].names
    fingerprint = hashlib.blake2b(
        canonical([names.prompt, names.answer, renderer.settings]), digest_size=16
    )
    rendering = hashlib.blake2b(digest_size=16)
    seen: Counter[bytes] = Counter()
    for row in rows:
        where = f"{row.source}: {names.prompt}"
        rendered = renderer.render(row.prompt, row.record, where)
        num_tokens = len(rendered.ids)
        too_long = long_prompt(row.source, where, num_tokens, max_prompt_tokens, model_length)
        if too_long is not None:
            if long_prompts == "drop":
                dropped.append(too_long)
                continue
            raise DataError(f'{too_long.reason} (data.long_prompts = "drop" leaves such rows out)')
        content = canonical(row.record)
        fingerprint.update(len(content).to_bytes(8, "little") + content)
        rendering.update(num_tokens.to_bytes(8, "little") + rendered.ids.tobytes())
        kept.append(
            PromptRow(
                prompt_ids=rendered.ids,
                prompt=rendered.prompt,
                rendered=rendered.rendered,
                answer=row.answer,
                columns=row.columns,
                user_key=_user_key(rendered, seen),
                source=row.source,
                messages=rendered.messages,
            )
        )
    if not kept:
        raise DataError(
            f"data: expected at least one row in {str(path)!r}, got none, {len(dropped)} dropped "
            f"as too long ({dropped[0].reason})"
        )
    row_notes = [] if names.note is None else [names.note]
    if dropped:
        row_notes.append(note_of(dropped, len(rows)))
    return PromptData(
        tuple(kept),
        tuple(dropped),
        fingerprint.hexdigest(),
        rendering.hexdigest(),
        renderer.now.isoformat() if renderer.asked_for_time else None,
        tuple(f"{path}: {note}" for note in renderer.notes()),
        tuple(f"{path}: {note}" for note in row_notes),
    )


def load_prompts(
    path: str | os.PathLike[str],
    tokenizer: Any,
    *,
    vocab_size: int,
    prompt_column: str = AUTO,
    answer_column: str | None = AUTO,
    max_rows: int | None = None,
    max_prompt_tokens: int | None = None,
    long_prompts: str = "error",
    chat_template: bool | None = None,
    system_prompt: str | None = None,
    continue_final_message: bool = False,
    template_time: str | None = None,
) -> PromptData:
    """Reads, checks, renders and tokenizes prompts: `read_rows` and `render_rows`.

    Args:
        path: See `read_records`.
        tokenizer: A transformers tokenizer.
        vocab_size: Token ids must be below it.
        max_prompt_tokens, long_prompts: See `render_rows`.
        prompt_column, answer_column, max_rows, chat_template, system_prompt,
            continue_final_message, template_time: See `DataConfig`.

    Raises:
        ConfigError: if a chat template is asked for and the tokenizer has none.
        DataError: naming file and line.
    """
    rows = read_rows(
        path, prompt_column=prompt_column, answer_column=answer_column, max_rows=max_rows
    )
    renderer = PromptRenderer(
        tokenizer,
        vocab_size=vocab_size,
        chat_template=chat_template,
        system_prompt=system_prompt,
        continue_final_message=continue_final_message,
        now=None if template_time is None else datetime.fromisoformat(template_time),
    )
    return render_rows(
        rows, renderer, path, max_prompt_tokens=max_prompt_tokens, long_prompts=long_prompts
    )


def _user_key(rendered: RenderedPrompt, seen: Counter[bytes]) -> str | bytes:
    """Of the ids where they say it all, else of what the chat template was given.

    So a template with today's date does not make other rows of the same data.
    """
    content = rendered.identity or rendered.ids.tobytes()
    occurrence = seen[content]
    seen[content] += 1
    number = str(occurrence) if occurrence else ""
    if rendered.identity is None:
        return number
    return hashlib.blake2b(content, digest_size=16, salt=number.encode()[:16]).digest()
