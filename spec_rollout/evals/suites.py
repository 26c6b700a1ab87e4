"""Mathematics benchmarks by name: where their problems are, and which columns hold what.

Each is read from a file in a folder of the user's, or downloaded with `datasets`.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spec_rollout.loading.columns import ColumnNames
from spec_rollout.loading.data import DataError, SourceRow, read_records

# What the published evaluation asks for (its template "qwen-boxed").
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True, slots=True)
class Suite:
    """A benchmark.

    Attributes:
        name: As results name it.
        files: Names of its file without .jsonl or .parquet, which is looked for in the
            user's folder, or in a folder of that name as `test`.
        hub: Its data set on the Hugging Face hub, as `read_records` takes it.
        problem: Columns of which the first that is there holds the problem.
        answer: The same for the answer: a bare one, or a worked solution that ends with it (the
            reward `math_verify` takes both).
    """

    name: str
    files: tuple[str, ...]
    hub: str
    problem: tuple[str, ...] = ("problem", "question")
    answer: tuple[str, ...] = ("answer",)


SUITES: Mapping[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite("AMC23", ("amc23",), "hub:math-ai/amc23@test"),
        Suite("AIME24", ("aime24", "aime_2024"), "hub:HuggingFaceH4/aime_2024@train"),
        Suite("GSM8K", ("gsm8k",), "hub:openai/gsm8k:main@test"),
        Suite("MATH-500", ("math500", "math-500"), "hub:HuggingFaceH4/MATH-500@test"),
        Suite(
            "Minerva",
            ("minerva_math", "minerva"),
            "hub:math-ai/minervamath@test",
            answer=("answer", "solution"),
        ),
        Suite(
            "OlympiadBench",
            ("olympiadbench",),
            "hub:Hothan/OlympiadBench:OE_TO_maths_en_COMP@train",
            answer=("final_answer", "answer"),
        ),
    )
}


_NAMES = ColumnNames("prompt", "answer")  # of the rows that are made of a suite's


def suite_of(name: str) -> Suite | None:
    """The suite of a name, whatever its case and hyphens; None if there is none."""
    plain = {_plain(known): suite for known, suite in SUITES.items()}
    return plain.get(_plain(name))


def unknown_name(name: str, known: Iterable[str]) -> ValueError:
    """The error for a name that is no suite."""
    known = list(known)
    near = difflib.get_close_matches(name.upper(), [k.upper() for k in known], n=1, cutoff=0.5)
    hint = ""
    if near:
        hint = f"; did you mean {next(k for k in known if k.upper() == near[0])}?"
    return ValueError(f"--suites: expected names of {', '.join(known)}, got {name!r}{hint}")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def load_suite(
    suite: Suite,
    folder: str | os.PathLike[str] | None = None,
    *,
    instruction: str = INSTRUCTION,
    max_rows: int | None = None,
) -> list[SourceRow]:
    """The problems of a suite.

    Args:
        suite: Which one.
        folder: Where its file is; None downloads the data set.
        instruction: Follows each problem, on a line of its own; empty for none.
        max_rows: Take only the first.

    Returns:
        Rows with a prompt (text), an answer, and all other columns for the reward.

    Raises:
        DataError: naming folder or data set, or the row that lacks a column.
    """
    path = suite.hub if folder is None else file_of(suite, Path(folder))
    rows: list[SourceRow] = []
    for source, record in read_records(path, max_rows):
        problem = _first(record, suite.problem, source)
        if not isinstance(problem, str) or not problem.strip():
            raise DataError(f"{source}: expected a problem that is text, got {problem!r:.80}")
        context = record.get("context")
        if isinstance(context, str) and context.strip():
            problem = f"{context}\n{problem}"
        answer = _first(record, suite.answer, source)
        if isinstance(answer, list):  # all of them together are the answer
            answer = ", ".join(map(str, answer))
        prompt = f"{problem}\n{instruction}" if instruction else problem
        row = {"prompt": prompt, "answer": answer}
        columns = {k: v for k, v in record.items() if k not in ("prompt", "response", "answer")}
        rows.append(SourceRow(_NAMES, row, prompt, answer, columns, source))
    if not rows:
        raise DataError(f"{suite.name}: expected at least one problem, got none")
    return rows


def _first(record: Mapping[str, Any], names: tuple[str, ...], source: str) -> Any:
    for name in names:
        if record.get(name) not in (None, "", []):
            return record[name]
    have = ", ".join(map(repr, record)) or "none"
    raise DataError(f"{source}: expected a column {' or '.join(map(repr, names))}, got {have}")


def file_of(suite: Suite, folder: Path) -> Path:
    """The file of a suite in a user's folder.

    Raises:
        DataError: naming folder or file.
    """
    if not folder.is_dir():
        raise DataError(f"--data-dir: expected a folder, got {str(folder)!r}")
    wanted = [f"{name}{ending}" for name in suite.files for ending in (".jsonl", ".parquet")]
    wanted += [f"{name}/test{ending}" for name in suite.files for ending in (".jsonl", ".parquet")]
    for name in wanted:
        if (folder / name).is_file():
            return folder / name
    have = ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "nothing"
    raise DataError(
        f"--data-dir: expected {wanted[0]} for {suite.name} in {str(folder)!r}, which holds {have}"
    )
