"""Rows of a data file, their columns, and what is the same for equal rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spec_rollout.extras import install_command

Record = dict[str, Any]


class DataError(ValueError):
    """A row or file is not usable; the message names file and line."""


def short(value: object, limit: int = 80) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def read_jsonl(path: Path) -> Iterator[tuple[str, Record]]:
    """Rows of a file with a JSON object a line, with "file:line".

    Raises:
        DataError: if a line is something else.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            source = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            # Deep nesting is a RecursionError.
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{source}: expected a JSON object, got {short(line)}: {error}"
                ) from None
            if not isinstance(record, dict):
                raise DataError(f"{source}: expected a JSON object, got {short(line)}")
            yield source, record


def read_parquet(path: Path) -> Iterator[tuple[str, Record]]:
    """Rows of a Parquet file, with "file:row", 1-based.

    Raises:
        DataError: if it cannot be read.
    """
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(
            f"data: reading {str(path)!r} needs pyarrow ({install_command('pyarrow')})"
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


def canonical(value: Any) -> bytes:
    """The same bytes for equal values: keys sorted, those without a value left out.

    So a row has the same bytes in a Parquet file, which has every key in every row.
    """
    return json.dumps(without_nulls(value), sort_keys=True, default=_described).encode()


def without_nulls(value: Any) -> Any:
    """The value without keys whose value is null, at any depth."""
    if isinstance(value, Mapping):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(item) for item in value]
    return value


def _described(value: object) -> str:
    """Of what JSON does not know: dates, decimals and bytes of a Parquet file."""
    return f"{type(value).__name__}:{value!r}"
