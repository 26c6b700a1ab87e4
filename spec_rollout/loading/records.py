"""Rows of a data file, their columns, and what is the same for equal rows."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spec_rollout.extras import install_command

Record = dict[str, Any]


class DataError(ValueError):
    """A row or file is not usable; the message names file and line."""


def read_records(
    path: str | os.PathLike[str], max_rows: int | None = None
) -> Iterator[tuple[str, Record]]:
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
        records: Iterator[tuple[str, Record]] = _read_parquet(path)
    elif path.suffix in (".jsonl", ".json", ".ndjson"):
        records = _read_jsonl(path)
    else:
        raise DataError(f"data: expected a .jsonl or .parquet file, got {str(path)!r}")
    yield from itertools.islice(records, max_rows)


def _found(path: Path) -> str:
    return "a folder" if path.is_dir() else "nothing"


def _read_jsonl(path: Path) -> Iterator[tuple[str, Record]]:
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


def _read_parquet(path: Path) -> Iterator[tuple[str, Record]]:
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


def short(value: object, limit: int = 80) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


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
