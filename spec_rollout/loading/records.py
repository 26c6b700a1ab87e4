"""Rows of a data file, their columns, and what is the same for equal rows."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spec_rollout.extras import install_command

Record = dict[str, Any]

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+>")


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


def unidentified(value: Any) -> bool:
    """Whether `canonical` would give other bytes in another process: an object known by its
    address alone."""
    if value is None or isinstance(value, str | int | float | bytes):
        return False
    if isinstance(value, Mapping):
        return any(map(unidentified, value.values()))
    if isinstance(value, list | tuple):
        return any(map(unidentified, value))
    return not _has_bytes(value) and _ADDRESS.search(repr(value)) is not None


def _described(value: Any) -> str:
    """Of what JSON does not know: dates, decimals and bytes of a Parquet file; images and arrays of
    `datasets`, by their content."""
    kind = type(value).__name__
    if not _has_bytes(value):
        return f"{kind}:{value!r}"
    about = [str(getattr(value, name, None)) for name in ("mode", "size", "dtype", "shape")]
    return f"{kind}:{' '.join(about)}:{hashlib.sha256(value.tobytes()).hexdigest()}"


def _has_bytes(value: Any) -> bool:
    """Those of an array of objects are addresses."""
    kind = getattr(getattr(value, "dtype", None), "kind", None)
    return callable(getattr(value, "tobytes", None)) and kind != "O"
