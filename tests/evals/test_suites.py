"""Benchmarks by name: files found, columns read, answers that the reward can judge."""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path

import pytest

from spec_rollout.config.sections import RewardConfig
from spec_rollout.evals.suites import INSTRUCTION, SUITES, load_suite, suite_of
from spec_rollout.loading.data import DataError, check_rows
from spec_rollout.rewards import Rewards, Sample

# A row of each file as it is published, and a response that is correct.
ROWS = {
    "AMC23": ({"id": 0, "problem": "P", "question": "P", "answer": 27.0, "url": "u"}, "27"),
    "AIME24": ({"id": 60, "problem": "P", "solution": "S", "answer": "204"}, "204"),
    "GSM8K": ({"question": "P", "answer": "16 - 3 = <<16-3=13>>13 eggs.\n#### 13"}, "13"),
    "MATH-500": ({"problem": "P", "solution": "S", "answer": "\\frac{3}{4}", "level": 2}, "0.75"),
    "Minerva": ({"problem": "P", "solution": "so\n\\[ s=\\boxed{1.6} \\]\nm"}, "1.6"),
    "OlympiadBench": (
        {"context": None, "question": "P", "final_answer": ["$1,3$"], "unit": None},
        "1, 3",
    ),
}
DATA = os.environ.get("SPEC_ROLLOUT_EVAL_DATA")


def folder_with(tmp_path: Path, name: str, *rows: dict) -> Path:
    path = tmp_path / f"{SUITES[name].files[0]}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize("name", SUITES)
def test_a_row_of_each_is_read_and_judged(tmp_path: Path, name: str) -> None:
    pytest.importorskip("math_verify")
    record, correct = ROWS[name]
    (row,) = load_suite(SUITES[name], folder_with(tmp_path, name, record))
    assert row.prompt == f"P\n{INSTRUCTION}"
    assert row.columns.keys() == record.keys() - {"answer"}
    rewards = Rewards(RewardConfig(("math_verify",)), row.columns)
    check_rows([row], rewards)
    samples = [
        Sample(row.prompt, f"Thus \\boxed{{{text}}}.", row.answer, row.columns)
        for text in (correct, "41")
    ]
    assert rewards.judge(samples).totals == [1.0, 0.0]


def test_names_and_places_of_files(tmp_path: Path) -> None:
    for name in ("MATH-500", "math500", "Math_500"):
        assert suite_of(name) is SUITES["MATH-500"]
    assert suite_of("math") is None
    rows = [{"problem": f"P{i}", "answer": i, "context": "Given."} for i in range(3)]
    (tmp_path / "math500").mkdir()
    (tmp_path / "math500" / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = load_suite(SUITES["MATH-500"], tmp_path, instruction="", max_rows=2)
    assert [(row.prompt, row.answer) for row in found] == [("Given.\nP0", 0), ("Given.\nP1", 1)]
    assert found[1].source == f"{tmp_path / 'math500' / 'test.jsonl'}:2"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Q"}, "expected a column 'answer', got 'question'"),
        ({"answer": "1"}, "expected a column 'problem' or 'question', got 'answer'"),
        ({"problem": 3, "answer": "1"}, "expected a problem that is text, got 3"),
    ],
)
def test_rows_that_cannot_be_read(tmp_path: Path, row: dict, message: str) -> None:
    with pytest.raises(DataError, match=rf"math500\.jsonl:1: {message}"):
        load_suite(SUITES["MATH-500"], folder_with(tmp_path, "MATH-500", row))


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--data-dir: expected a folder, got "):
        load_suite(SUITES["AMC23"], tmp_path / "nowhere")
    (tmp_path / "other.jsonl").touch()
    with pytest.raises(DataError, match=r"expected amc23\.jsonl for AMC23 in .* other\.jsonl"):
        load_suite(SUITES["AMC23"], tmp_path)
    (tmp_path / "amc23.jsonl").touch()
    with pytest.raises(DataError, match="AMC23: expected at least one problem, got none"):
        load_suite(SUITES["AMC23"], tmp_path)


def test_without_a_folder_the_data_set_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path, name, *, data_files, split):
        asked.append((path, name, split))
        if path != "openai/gsm8k":
            raise ConnectionError("no route\nto host")
        return [{"question": "P", "answer": "#### 1"}]

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    (row,) = load_suite(SUITES["GSM8K"])
    assert (row.source, row.answer) == ("hub:openai/gsm8k:main@test:1", "#### 1")
    with pytest.raises(
        DataError, match=r"math-ai/amc23.* ConnectionError: no route to host\. Without"
    ):
        load_suite(SUITES["AMC23"])
    assert asked == [("openai/gsm8k", "main", "test"), ("math-ai/amc23", None, "test")]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"math-ai/amc23.* needs datasets \(pip install"):
        load_suite(SUITES["AMC23"])


@pytest.mark.slow
@pytest.mark.skipif(DATA is None, reason="SPEC_ROLLOUT_EVAL_DATA names no folder with the files")
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("AMC23", 40),
        ("AIME24", 30),
        ("GSM8K", 1319),
        ("MATH-500", 500),
        ("Minerva", 272),
        ("OlympiadBench", 675),
    ],
)
def test_the_published_files_are_read_whole_and_their_answers_are_their_own(
    name: str, size: int
) -> None:
    pytest.importorskip("math_verify")
    rows = load_suite(SUITES[name], DATA)
    assert len(rows) == size
    rewards = Rewards(RewardConfig(("math_verify",)), rows[0].columns)
    check_rows(rows, rewards)
    samples = [Sample(r.prompt, f"\\boxed{{{r.answer}}}", r.answer, r.columns) for r in rows]
    if name in ("GSM8K", "Minerva"):  # worked solutions
        samples = [Sample(r.prompt, r.answer, r.answer, r.columns) for r in rows]
    judged = rewards.judge(samples).totals
    assert sum(value or 0.0 for value in judged) >= 0.98 * size
