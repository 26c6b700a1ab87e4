"""What bench_serving makes of answers that are cut short, and of contenders that end."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Child:
    """Answers after a second; ends with its `lives`."""

    def __init__(self, clock: list[float], name: str, lives: int = 1000) -> None:
        self.name, self.is_there = name, True
        self._clock, self._lives = clock, lives

    def ask(self, **what: Any) -> dict[str, Any]:
        self._lives -= 1
        if self._lives < 0:
            raise RuntimeError(f"{self.name}: it is gone")
        if what["do"] != "generate":
            return {}
        self._clock[0] += 1.0
        seconds = 1.0 if self.name == "stock" else 0.5
        given = {"seconds": seconds, "tokens": 100, "steps": 10, "computed": 100}
        return {**given, "same_as_first": 1.0, "first_difference": None}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("bench_serving")
    Child.try_ = module.Child.try_  # type: ignore[attr-defined]  # as it is
    monkeypatch.setattr(module, "prompts_of_task", lambda count, *_: [[1]] * count)
    return module


def measured(bench: Any, monkeypatch: Any, names: dict[str, int], end: float) -> tuple[Any, Any]:
    clock = [0.0]
    monkeypatch.setattr(bench.time, "monotonic", lambda: clock[0])
    rows: dict[str, Any] = {}
    results = SimpleNamespace(add=lambda name, **row: rows.update({name: row}))
    children = [Child(clock, name, lives) for name, lives in names.items()]
    args = argparse.Namespace(repeats=2, model=None, data=None, max_tokens=8, dtype="float32")
    bench._run_batch(args, results, children, 8, end)
    return rows, [child.name for child in children]


def test_a_round_that_is_cut_short_counts_as_far_as_stock_answered(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Warming takes four seconds; then five passes of the first round begin: up to `updated` of
    # stock, whose own is the last.
    names = {"stock": 1000, "coupled": 1000}
    rows, _ = measured(bench, monkeypatch, names, end=8.5)
    assert set(rows) == {
        "stock, first, 8", "coupled, first, 8", "stock, second, 8", "coupled, second, 8",
        "stock, updated, 8",
    }  # fmt: skip
    assert rows["coupled, second, 8"]["tokens_per_second_over_stock"] == 2.0
    rows, _ = measured(bench, monkeypatch, names, end=1e9)
    assert rows["coupled, updated, 8"]["timing"].repeats == 2


def test_who_ends_is_left_out_and_the_others_go_on(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Warmed by three questions; forget, weights and the first pass are the next three.
    names = {"stock": 1000, "coupled": 6, "drafting": 1000}
    rows, left = measured(bench, monkeypatch, names, end=1e9)
    assert left == ["stock", "drafting"]
    assert capsys.readouterr().out.count("coupled has ended: coupled: it is gone") == 1
    assert "coupled, first, 8" in rows
    assert "coupled, second, 8" not in rows
    assert rows["drafting, updated, 8"]["timing"].repeats == 2


def test_without_stock_what_it_answered_counts_and_no_more(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, left = measured(bench, monkeypatch, {"stock": 6, "coupled": 1000}, end=1e9)
    assert left == ["coupled"]
    assert set(rows) == {"stock, first, 8", "coupled, first, 8"}
