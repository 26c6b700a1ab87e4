"""What `bench_trainers.py` makes of the steps of its runs, and the table of it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks")]
trainers = importlib.import_module("renderers.trainers")
bench = importlib.import_module("bench_trainers")
common = importlib.import_module("_common")
Step = importlib.import_module("trainer_runs").Step
START = Step(0, 99.0, 99.0, 1, 1)


@pytest.fixture
def results(tmp_path: Path) -> common.Results:
    """A run of each contender: two epochs of two steps."""
    results = common.Results("trainers", tmp_path, bandwidth=lambda: 1e9)
    found = {
        "stock": [[START, Step(0, 4.0, 8.0, 100, 50), Step(1, 2.0, 4.0, 100, 50), Step(1, 2.0, 4.0, 100, 30)]],
        # Twice the tokens.
        "adapter": [[START, Step(0, 8.0, 16.0, 200, 50), Step(1, 1.0, 4.0, 200, 7), Step(1, 1.0, 4.0, 200, 9)]],
    }  # fmt: skip
    bench.add_rows(results, "trl_model", found, versions={"trl": "1.2"})
    return results


def test_the_first_epoch_stands_apart_without_its_start_and_speed_is_per_token(
    results: common.Results,
) -> None:
    rows = {(row["contender"], row["which"]): row for row in results.rows}
    gains = {key: (row["rollout_speedup"], row["step_speedup"]) for key, row in rows.items()}
    assert gains == {
        ("stock", "first"): (1.0, 1.0),
        ("stock", "later"): (1.0, 1.0),
        ("adapter", "first"): (1.0, 1.0),
        ("adapter", "later"): (4.0, 2.0),
    }
    later = rows["adapter", "later"]
    assert (later["engine_steps"], later["tokens"], later["repeats"]) == (8.0, 200.0, 1)
    assert (later["seconds"]["p50"], later["step_seconds"]["p50"]) == (1.0, 4.0)
    assert later["seconds"]["repeats"] == 2


def test_the_table_has_a_line_for_each_contender(results: common.Results) -> None:
    assert trainers.trainers_table(results.as_dict()).splitlines()[2:] == [
        "| TRL 1.2, its own model | as it is | 4 s | 2 s | 8 s | 4 s | 40 |",
        "| TRL 1.2, its own model | `SpecRollout()` | 8 s, 1x | 1 s, **4x** | 16 s, 1x | 4 s, **2x** | 8 |",
    ]


def test_steps_of_an_engine_that_counts_none_are_left_out(tmp_path: Path) -> None:
    results = common.Results("trainers", tmp_path, bandwidth=lambda: 1e9)
    steps = [[START, Step(0, 1.0, 2.0, 10, None), Step(1, 1.0, 2.0, 10, None)]]
    bench.add_rows(results, "verl", {"stock": steps}, versions={"verl": "0.9"})
    assert results.rows[1]["engine_steps"] is None
    assert trainers.trainers_table(results.as_dict()).splitlines()[2] == (
        "| verl 0.9 | as it is | 1 s | 1 s | 2 s | 2 s |  |"
    )
