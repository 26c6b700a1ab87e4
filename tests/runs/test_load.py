"""What a run left is read, however it ended."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from spec_rollout.report import find_runs, load_run
from spec_rollout.report.tokens import samples_html


def test_a_metrics_line_cut_off_by_a_crash_is_left_out_and_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "reward": 0.5}\n{"step": 1, "rew')
    run = load_run(tmp_path)
    assert run.series("reward") == ([0.0], [0.5])
    assert run.problems == ["metrics.jsonl: line 2 is cut off; left out"]


def test_damage_inside_the_file_costs_only_its_line(tmp_path: Path) -> None:
    lines = ['{"step": 0, "reward": 1}', "\x00\xff", "[1]", "", '{"step": 3, "reward": 2}', ""]
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode("latin-1"))
    run = load_run(tmp_path)
    assert run.series("reward") == ([0.0, 3.0], [1.0, 2.0])
    assert run.problems == [
        "metrics.jsonl: line 2 is not JSON; left out",
        "metrics.jsonl: line 3 is a list, not an object; left out",
    ]


def test_samples_are_read_when_they_are_shown(tmp_path: Path) -> None:
    """There may be more of them than memory holds."""
    path = tmp_path / "samples.jsonl"
    with path.open("w") as file:
        for step in range(100):
            row = {"step": step, "row": step % 50, "prompt": "p", "response": f"{step:06}" * 50_000}
            file.write(json.dumps(row) + "\n\n")
        file.write('[1]\n{"step":')
    tracemalloc.start()
    try:
        run = load_run(tmp_path)
        html = samples_html(run)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()
    assert [f"step {step}<" in html for step in (0, 50, 2, 52, 3)] == 4 * [True] + [False]
    assert len(run.samples) == 100
    assert [sample["step"] for sample in run.samples] == list(range(100))
    assert [sample["step"] for sample in run.samples[-2:]] == [98, 99]
    assert run.problems[:2] == [
        "samples.jsonl: line 201 is a list, not an object; left out",
        "samples.jsonl: line 202 is cut off; left out",
    ]
    path.write_text('{"step": 0}\n')  # the run was begun anew meanwhile
    assert run.samples[1:3] == [{}, {}]


@pytest.mark.parametrize("value", [None, True, "0.5", float("nan"), float("inf"), [1]])
def test_only_finite_numbers_are_plotted(tmp_path: Path, value: object) -> None:
    rows = [{"step": 0, "reward": value}, {"step": 1, "reward": 0.25}, {"step": 2}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert load_run(tmp_path).series("reward") == ([1.0], [0.25])


def test_a_run_that_wrote_nothing_is_loaded_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"a": ')
    run = load_run(tmp_path)
    assert (run.metrics, run.summary, run.environment) == ([], {}, None)
    assert run.problems == [
        "summary.json: not readable (JSONDecodeError); left out",
        "metrics.jsonl: no step recorded",
    ]


def test_runs_are_found_in_the_folder_itself_or_one_level_down(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected metrics"):
        find_runs(tmp_path)
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").touch()
    (tmp_path / "c").mkdir()
    assert find_runs(tmp_path) == [tmp_path / "a", tmp_path / "b"]
    (tmp_path / "metrics.jsonl").touch()
    assert find_runs(tmp_path) == [tmp_path]
    with pytest.raises(ValueError, match="expected an existing directory"):
        find_runs(tmp_path / "nowhere")
