"""Reads what a run left behind, however it ended."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, overload

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
RUNNING = "running.jsonl"
LARGEST = 1e100
_INFINITE = (math.inf, -math.inf)  # as a mean over nothing is; left out silently, like NaN
_MOST_PROBLEMS = 20  # told one by one, of a file


@dataclass(slots=True)
class Run:
    """One run directory.

    Attributes:
        name: Shown in the legend; the directory's name unless given.
        metrics: One dict per training step, in file order.
        summary: `summary.json`; empty if there is none.
        config: Text of the resolved config; None if none was saved.
        samples: Rows of `samples.jsonl`.
        running: Rows of `running.jsonl`: seconds within a step's rollouts, and requests running
            then.
        environment: Machine and versions the run recorded about itself; None if it did not.
        problems: What could not be read, in words; shown on the page.
        judged_elsewhere: Accuracies by step, of each split, of another run whose weights were the
            same after every step, where this one was not evaluated itself.
    """

    name: str
    metrics: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    config: str | None = None
    samples: Sequence[dict[str, Any]] = field(default_factory=list)
    running: list[dict[str, Any]] = field(default_factory=list)
    environment: dict[str, Any] | None = None
    problems: list[str] = field(default_factory=list)
    judged_elsewhere: dict[str, dict[int, float]] = field(default_factory=dict)

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of the rows where `key` is a finite number."""
        steps: list[float] = []
        values: list[float] = []
        for index, row in enumerate(self.metrics):
            value = number(row.get(key))
            if value is not None:
                step = number(row.get("step"))
                steps.append(index if step is None else step)
                values.append(value)
        return steps, values


def number(value: object) -> float | None:
    """`value` as a float if it is a number (bool is not one) that can be summed and drawn: of at
    most `LARGEST`; else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if -LARGEST <= value <= LARGEST else None


def read_jsonl(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file; any other line (cut off by a crash, say) goes to `problems`."""
    return [row for _, row in _placed_rows(path, problems)]


class StoredRows(Sequence[dict[str, Any]]):
    """Rows of a JSON-lines file like `read_jsonl`'s, each read when it is asked for: the samples of
    a long run are more than memory holds.

    A row that has gone since (the run was resumed from an earlier step) is empty.
    """

    def __init__(self, path: Path, problems: list[str]) -> None:
        self._path = path.absolute()
        self._places = [place for place, _ in _placed_rows(path, problems)]

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self._row(place) for place in self._places[index]]
        return self._row(self._places[index])

    def _row(self, place: _Place) -> dict[str, Any]:
        start, size = place
        try:
            with self._path.open("rb") as file:
                file.seek(start)
                row = json.loads(file.read(size))
        except (OSError, ValueError, RecursionError):
            return {}
        return row if isinstance(row, dict) else {}


# Where a line is: its first byte, and how many.
_Place = tuple[int, int]


def _placed_rows(path: Path, problems: list[str]) -> Iterator[tuple[_Place, dict[str, Any]]]:
    found: list[str] = []
    start = last = cut_off = 0
    with _told(path, problems), _opened(path) as file:
        for index, line in enumerate(file, start=1):
            place = start, len(line)
            start += len(line)
            if not line.strip():
                continue
            last = index
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                found.append(f"{path.name}: line {index} is not JSON; left out")
                cut_off = index
                continue
            if isinstance(row, dict):
                yield place, row
            else:
                kind = type(row).__name__
                found.append(f"{path.name}: line {index} is a {kind}, not an object; left out")
    if found and cut_off == last:
        found[-1] = f"{path.name}: line {last} is cut off; left out"
    problems.extend(found[:_MOST_PROBLEMS])
    if len(found) > _MOST_PROBLEMS:
        problems.append(f"{path.name}: {len(found) - _MOST_PROBLEMS} more lines left out")


def _bytes_of(path: Path, problems: list[str]) -> bytes | None:
    """A file's content; None if there is none to be had, which `problems` say unless it is just
    absent."""
    with _told(path, problems), _opened(path) as file:
        return file.read()
    return None


def _opened(path: Path) -> BinaryIO:
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise OSError("expected a file, got something else; left out")
    return path.open("rb")


@contextmanager
def _told(path: Path, problems: list[str]) -> Iterator[None]:
    """What keeps a file from being read goes to `problems`, unless it is just absent."""
    try:
        yield
    except FileNotFoundError:
        pass
    except OSError as error:
        problems.append(f"{path.name}: {error.strerror or error}")


def _too_large(rows: list[dict[str, Any]], problems: list[str]) -> None:
    """Names the numbers of metrics that `number` leaves out."""
    counts: dict[str, int] = {}
    for row in rows:
        for key, value in row.items():
            if isinstance(value, int | float) and abs(value) > LARGEST and value not in _INFINITE:
                counts[key] = counts.get(key, 0) + 1
    for key, count in list(counts.items())[:_MOST_PROBLEMS]:
        problems.append(f"{METRICS}: {key} of {count} rows is beyond {LARGEST:g}; left out")


def _read_json(path: Path, problems: list[str]) -> dict[str, Any]:
    data = _bytes_of(path, problems)
    if data is None:
        return {}
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        problems.append(f"{path.name}: not readable ({type(error).__name__}); left out")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{path.name}: is a {type(value).__name__}, not an object; left out")
        return {}
    return value


def load_run(directory: Path, name: str | None = None) -> Run:
    """Reads one run directory; missing or damaged files become `problems`, never an exception.

    Raises:
        ValueError: if `directory` is not a directory.
    """
    if not directory.is_dir():
        raise ValueError(f"run directory: expected an existing directory, got {directory}")
    run = Run(name=name or directory.resolve().name)
    run.metrics = read_jsonl(directory / METRICS, run.problems)
    run.summary = _read_json(directory / "summary.json", run.problems)
    run.samples = StoredRows(directory / SAMPLES, run.problems)
    run.running = read_jsonl(directory / RUNNING, run.problems)
    _too_large(run.metrics, run.problems)
    config = _bytes_of(directory / "config.toml", run.problems)
    if config is not None:
        run.config = config.decode("utf-8", errors="replace")
    environment = run.summary.get("environment") or _read_json(
        directory / "environment.json", run.problems
    )
    run.environment = environment if isinstance(environment, dict) and environment else None
    if not run.metrics:
        run.problems.append(f"{METRICS}: no step recorded")
    return run


def find_runs(directory: Path) -> list[Path]:
    """`directory` itself if it holds a run, else its sub-directories that do, by name.

    Raises:
        ValueError: if there is no such directory or no run in it.
    """
    if not directory.is_dir():
        raise ValueError(f"run directory: expected an existing directory, got {directory}")
    if (directory / METRICS).is_file():
        return [directory]
    found = sorted(path.parent for path in directory.glob(f"*/{METRICS}"))
    if not found:
        raise ValueError(
            f"run directory: expected {METRICS} in {directory} or a directory in it, found none"
        )
    return found
