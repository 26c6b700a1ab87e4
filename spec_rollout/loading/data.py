"""Prompts: rows from a file, checked and tokenized, and the order in which training sees them."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_RESERVED = ("prompt", "response", "answer")


class DataError(ValueError):
    """A row or file is not usable; the message names file and line."""


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One prompt.

    Attributes:
        prompt_ids: Token ids, at least one. [num_prompt_tokens], int32.
        prompt: Text handed to the rewards (decoded if the row held token ids).
        answer: The row's answer column; None if there is none.
        columns: All other columns.
        user_key: Tells rows of equal prompts apart, so that each keeps its own cached rollouts and
            noise.
        source: "file:line", for messages.
    """

    prompt_ids: np.ndarray
    prompt: str
    answer: Any
    columns: Mapping[str, Any]
    user_key: str
    source: str


@dataclass(frozen=True, slots=True)
class PromptData:
    """All rows of a file.

    Attributes:
        rows: In file order.
        num_dropped: Rows left out because their prompt was too long.
        fingerprint: Hash of all prompts; the same data gives the same.
    """

    rows: tuple[PromptRow, ...]
    num_dropped: int
    fingerprint: str

    def __len__(self) -> int:
        return len(self.rows)


def read_records(
    path: str | os.PathLike[str], max_rows: int | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a .jsonl or .parquet file, with "file:line" (for Parquet "file:row", 1-based too).

    Raises:
        DataError: if the file is missing, of another kind, or a line is not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"data: expected a .jsonl or .parquet file, found {_found(path)} at {str(path)!r}"
        )
    if path.suffix == ".parquet":
        records: Iterator[tuple[str, dict[str, Any]]] = _read_parquet(path)
    elif path.suffix in (".jsonl", ".json", ".ndjson"):
        records = _read_jsonl(path)
    else:
        raise DataError(f"data: expected a .jsonl or .parquet file, got {str(path)!r}")
    yield from itertools.islice(records, max_rows)


def _found(path: Path) -> str:
    return "a folder" if path.is_dir() else "nothing"


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            source = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise DataError(
                    f"{source}: expected a JSON object, got {_short(line)}: {error}"
                ) from None
            if not isinstance(record, dict):
                raise DataError(f"{source}: expected a JSON object, got {_short(line)}")
            yield source, record


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(
            f"data: reading {str(path)!r} needs pyarrow (pip install 'spec-rollout[parquet]')"
        ) from None
    try:
        file = parquet.ParquetFile(path)
    except Exception as error:
        raise DataError(f"data: {str(path)!r} is not a readable Parquet file: {error}") from None
    number = 0
    for batch in file.iter_batches():
        for record in batch.to_pylist():
            number += 1
            yield f"{path}:{number}", record


def _short(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def load_prompts(
    path: str | os.PathLike[str],
    tokenizer: Any,
    *,
    vocab_size: int,
    prompt_column: str = "prompt",
    answer_column: str | None = "answer",
    max_rows: int | None = None,
    max_prompt_tokens: int | None = None,
    long_prompts: str = "error",
) -> PromptData:
    """Reads, checks and tokenizes a file of prompts.

    A prompt is text (tokenized as it is, with the tokenizer's special tokens), a list of token ids,
    or a list of chat messages {"role", "content"} (through the tokenizer's chat template,
    generation prompt added).

    Args:
        path: See `read_records`.
        tokenizer: A transformers tokenizer.
        vocab_size: Token ids given in rows must be below it.
        prompt_column, answer_column, max_rows: See `DataConfig`.
        max_prompt_tokens: Longer prompts raise, or are dropped and counted if `long_prompts` is
            "drop".

    Raises:
        DataError: naming file and line.
    """
    rows: list[PromptRow] = []
    digest = hashlib.blake2b(digest_size=16)
    dropped = 0
    seen: Counter[bytes] = Counter()
    for source, record in read_records(path, max_rows):
        for column in (prompt_column, answer_column):
            if column is not None and column not in record:
                have = ", ".join(map(repr, record)) or "none"
                raise DataError(f"{source}: expected a column {column!r}, got columns {have}")
        value = record[prompt_column]
        text, ids = _tokenize(value, tokenizer, vocab_size, f"{source}: {prompt_column}")
        if max_prompt_tokens is not None and len(ids) > max_prompt_tokens:
            if long_prompts == "drop":
                dropped += 1
                continue
            raise DataError(
                f"{source}: {prompt_column}: expected at most {max_prompt_tokens} tokens, got "
                f"{len(ids)} "
                '(data.long_prompts = "drop" leaves such rows out)'
            )
        answer = None if answer_column is None else record[answer_column]
        columns = {k: v for k, v in record.items() if k not in (prompt_column, answer_column)}
        for name in _RESERVED:
            if name in columns:
                raise DataError(
                    f"{source}: column {name!r} is reserved (it names an argument of the rewards)"
                )
        digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
        occurrence = seen[ids.tobytes()]
        seen[ids.tobytes()] += 1
        rows.append(
            PromptRow(ids, text, answer, columns, str(occurrence) if occurrence else "", source)
        )
    if not rows:
        dropped_text = f", {dropped} dropped as too long" if dropped else ""
        raise DataError(f"data: expected at least one row in {str(path)!r}, got none{dropped_text}")
    return PromptData(tuple(rows), dropped, digest.hexdigest())


def _tokenize(value: Any, tokenizer: Any, vocab_size: int, where: str) -> tuple[str, np.ndarray]:
    if isinstance(value, str):
        text, ids = value, tokenizer(value)["input_ids"]
    elif isinstance(value, list) and value and all(_is_message(item) for item in value):
        if getattr(tokenizer, "chat_template", None) is None:
            raise DataError(
                f"{where}: expected text, as the tokenizer has no chat template, got chat messages"
            )
        text = tokenizer.apply_chat_template(value, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    elif isinstance(value, list) and all(
        isinstance(i, int) and not isinstance(i, bool) for i in value
    ):
        for i in value:
            if not 0 <= i < vocab_size:
                raise DataError(f"{where}: expected token ids from 0 to {vocab_size - 1}, got {i}")
        text, ids = tokenizer.decode(value), value
    else:
        raise DataError(
            f"{where}: expected text, a list of token ids or a list of chat messages (role, "
            "content), "
            f"got {_short(value)}"
        )
    if len(ids) == 0:
        raise DataError(f"{where}: expected at least one token, got none from {_short(value)}")
    if max(ids) >= vocab_size:
        raise DataError(
            f"{where}: expected token ids below the model's {vocab_size}, the tokenizer gave "
            f"{max(ids)}"
        )
    return text, np.asarray(ids, dtype=np.int32)


def _is_message(item: Any) -> bool:
    return (
        isinstance(item, dict)
        and isinstance(item.get("role"), str)
        and isinstance(item.get("content"), str)
    )


class PromptOrder:
    """Which rows a step sees: a pure function of (seed, step), so a resumed run needs no stored
    position.

    Every row comes once per epoch; the last step of an epoch takes what is left.

    Args:
        num_rows: Rows of the data.
        prompts_per_step: Rows per step.
        seed: Of the shuffles.
        shuffle: New order each epoch; otherwise file order.
    """

    def __init__(
        self, num_rows: int, prompts_per_step: int, *, seed: int, shuffle: bool = True
    ) -> None:
        if num_rows < 1 or prompts_per_step < 1:
            raise ValueError(
                f"num_rows, prompts_per_step: expected at least 1, got {num_rows}, "
                f"{prompts_per_step}"
            )
        self._num_rows = num_rows
        self._per_step = prompts_per_step
        self._seed = seed % 2**63
        self._shuffle = shuffle

    @property
    def steps_per_epoch(self) -> int:
        return -(-self._num_rows // self._per_step)

    def epoch_of(self, step: int) -> int:
        """Epoch (0-based) of a step (0-based)."""
        return step // self.steps_per_epoch

    def rows_of(self, step: int) -> Sequence[int]:
        """Row indices of a step (0-based)."""
        epoch, index = divmod(step, self.steps_per_epoch)
        order = np.arange(self._num_rows)
        if self._shuffle:
            order = np.random.default_rng((self._seed, epoch)).permutation(self._num_rows)
        return order[index * self._per_step : (index + 1) * self._per_step].tolist()
