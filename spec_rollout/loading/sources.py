"""What `data.path` may name, and the rows of it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from spec_rollout.loading import hub
from spec_rollout.loading.records import DataError, Record, read_jsonl, read_parquet

_FORMS = (
    "a .jsonl or .parquet file, a folder of datasets' save_to_disk, hub:OWNER/NAME or one of "
    f"{', '.join(hub.NAMED)}"
)
Rows = Iterator[tuple[str, Record]]
_READERS: dict[str, Callable[[Path], Rows]] = {
    ".parquet": read_parquet,
    ".jsonl": read_jsonl,
    ".json": read_jsonl,
    ".ndjson": read_jsonl,
}


def read_records(path: str | os.PathLike[str], max_rows: int | None = None) -> Rows:
    """Rows of a file, of a folder or of the hub, with where each is: "file:line", say.

    Args:
        path: A .jsonl or .parquet file; a folder that `datasets` wrote by `save_to_disk`, as
            "FOLDER@SPLIT" if it has several splits; "hub:OWNER/NAME[/FILE][:SUBSET][@SPLIT]"; or a
            name of `hub.NAMED`. What is there as a file or folder goes before a name.
        max_rows: Only the first ones.

    Raises:
        DataError: if there is no such thing, or it cannot be read.
    """
    return itertools.islice(_rows(os.fspath(path)), max_rows)


def _rows(text: str) -> Rows:
    path = Path(text)
    if text.startswith(hub.PREFIX):
        return hub.read_hub(text)
    if path.is_file():
        reader = _READERS.get(path.suffix)
        if reader is None:
            raise DataError(f"data: expected {_FORMS}, got {text!r}")
        return reader(path)
    folder, at, split = text.rpartition("@")
    for where, part in ((path, None), (Path(folder), split)) if at else ((path, None),):
        if where.is_dir() and hub.is_saved(where):
            return hub.read_saved(where, part)
    if text in hub.NAMED and not path.exists():
        return hub.read_hub(hub.NAMED[text], called=text)
    found = "a folder" if path.is_dir() else "nothing"
    raise DataError(f"data: expected {_FORMS}, found {found} at {text!r}")
