"""What a run writes beside its checkpoints: config.toml, metrics.jsonl, samples.jsonl,
environment.json, summary.json."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from spec_rollout.config.sections import ConfigError
from spec_rollout.runs.lock import LOCK
from spec_rollout.runs.outputs import write_text, writing

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
RUNNING = "running.jsonl"
DROPPED = "dropped.jsonl"
SUMMARY = "summary.json"
CONFIG = "config.toml"
CHECKPOINTS = "checkpoints"


def write_atomically(path: Path, text: str) -> None:
    """The file appears complete or not at all; an older one stays until then."""
    write_text(path, text)


def check_new_run_dir(run_dir: Path) -> None:
    """Raises ConfigError unless `run_dir` is an empty or absent folder."""
    if run_dir.is_dir():
        have = sorted(p.name for p in run_dir.iterdir() if p.name != LOCK)
        if have:
            hint = ""
            if CONFIG in have:
                hint = f" (--resume {shlex.quote(str(run_dir))} continues the run)"
            raise ConfigError(
                f"log.run_dir: expected a new or empty folder, got {str(run_dir)!r} with "
                f"{', '.join(have[:6])}{hint}"
            )
    elif run_dir.exists():
        raise ConfigError(f"log.run_dir: expected a folder, got the file {str(run_dir)!r}")


def check_steps(path: Path, num_steps: int) -> None:
    """Raises ConfigError unless a metrics file has the rows of steps 1 to `num_steps` in order."""
    steps = [row["step"] for row in _read(path) if 0 < row["step"] <= num_steps]
    if len(steps) != num_steps or steps != list(range(1, num_steps + 1)):
        raise ConfigError(
            f"{path}: expected the rows of steps 1 to {num_steps}, which the checkpoint follows, "
            f"got {len(steps)} rows"
        )


class JsonLines:
    """A JSON-lines file of rows with a "step", appended to and flushed row by row.

    Args:
        path: Created if absent.
        keep_through: Rows of later steps (of a run that went on after the checkpoint), and a last
            line cut off in the writing, are removed first.
        keep_rows: Rows are kept in memory, too.

    Attributes:
        rows: All rows of the file with `keep_rows`, else none.
    """

    def __init__(self, path: Path, *, keep_through: int, keep_rows: bool = False) -> None:
        self.rows: list[dict[str, Any]] = []
        self._keeps_rows = keep_rows
        # Row by row: the samples of a long run are more than memory holds.
        with writing(path) as kept:
            for row in _read(path):
                if row["step"] <= keep_through:
                    kept.write(_line(row))
                    self._keep(row)
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one row; on return it is in the file, whatever happens to the process."""
        self._file.write(_line(row))
        self._file.flush()
        self._keep(row)

    def sync(self) -> None:
        """On return all rows are on the disk, whatever happens to the machine."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _keep(self, row: Mapping[str, Any]) -> None:
        if self._keeps_rows:
            self.rows.append(dict(row))


def _line(row: Mapping[str, Any]) -> str:
    # NaN and infinity are not JSON.
    values = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
    }
    return json.dumps(values, ensure_ascii=False) + "\n"


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a file, none if there is no such file."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                return  # cut off; nothing after it can be trusted to be in order
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                return
            yield row
