"""The figures of a suite, where responses were left out."""

from __future__ import annotations

from spec_rollout.counters import RolloutStats
from spec_rollout.evals.suite_run import SuiteResult, table


def result(name: str, *counts: tuple[int, int], num_samples: int = 4) -> SuiteResult:
    total = num_samples * len(counts)
    skipped = total - sum(judged for judged, _ in counts)
    return SuiteResult(name, list(counts), skipped, stats=RolloutStats(num_rollouts=total))


def test_figures_say_of_how_many_problems_a_pass_at_k_is() -> None:
    figures = result("s", (4, 2), (3, 0), (0, 0)).figures([1, 4], 0.95)
    assert (figures["num_problems"], figures["num_skipped"]) == (3, 5)
    assert (figures["pass@1"], figures["pass@1_num_problems"]) == (0.25, 2)
    assert (figures["pass@4"], figures["pass@4_num_problems"]) == (1.0, 1)
    figures = result("s", (2, 2), (3, 0)).figures([4], 0.95)
    assert figures["pass@4"] is None
    assert figures["pass@4_num_problems"] == 0


def test_the_table_says_what_was_left_out_where_anything_was() -> None:
    whole = result("whole", (4, 2), (4, 4))
    part = result("part", (4, 2), (3, 0), (0, 0))
    head, line, *_ = table([whole], [1], 0.95).splitlines()
    assert "left out" not in head
    assert "problems" not in line
    head, first, second, mean = table([whole, part], [1, 4], 0.95).splitlines()
    assert head.split()[:5] == ["suite", "problems", "samples", "left", "out"]
    assert first.split()[:5] == ["whole", "2", "8", "0", "0.750"]
    assert second.split()[:5] == ["part", "3", "12", "5", "0.250"]
    assert "of" not in first.split()
    assert second.count(" of 2 problems") == second.count(" of 1 problems") == 1
    assert mean.split() == ["mean", "0.500", "1.000"]
