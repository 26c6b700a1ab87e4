from __future__ import annotations

from typing import Any

from spec_rollout.ablate.table import comparison_line, run_facts, table, until
from spec_rollout.runs.efficiency import Point
from spec_rollout.runs.summary import RunSummary, summarize


def summary(seconds: float, **changes: Any) -> RunSummary:
    """Two epochs of one step, with rollouts of so many seconds."""
    from spec_rollout.counters import RolloutStats

    stats = RolloutStats(
        num_rollouts=4,
        num_response_tokens=40,
        num_generated_tokens=30,
        num_reused_tokens=10,
        rollout_seconds=seconds,
    )
    rows = [
        {
            "step": step,
            "epoch": step - 1,
            "reward": 0.5,
            "train_seconds": 1.0,
            "step_seconds": seconds + 1.0,
            **stats.as_row(),
        }
        for step in (1, 2)
    ]
    facts: dict[str, Any] = {
        "run_dir": "r",
        "rule": "coupled",
        "reuse": True,
        "drafting": False,
        "seed": 0,
        "num_prompts": 2,
        "num_dropped_prompts": 0,
        "environment": {},
    }
    return summarize(rows, **{**facts, **changes})


def test_the_speed_up_is_that_of_the_epochs_with_drafts() -> None:
    facts = run_facts(summary(2.0), summary(5.0), num_eval_samples=3)
    assert facts["effective_speedup"] == 2.5
    assert facts["step_speedup"] == 2.0  # an update of a second beside rollouts of 5 and 2
    assert facts["rollout_seconds"] == 4.0
    assert facts["rollout_seconds_after_first_epoch"] == 2.0
    assert facts["generated_tokens"] == 60
    assert facts["reused_fraction"] == 0.25
    assert facts["num_eval_samples"] == 3
    alone = run_facts(summary(2.0), None, 3)
    assert alone["effective_speedup"] is alone["step_speedup"] is None


def test_the_table_has_a_column_per_run() -> None:
    facts = run_facts(summary(2.0), summary(5.0), 3)
    before, after = {"train": 0.25, "heldout": 0.5}, {"train": 0.75}
    runs = {
        "one": {
            **facts,
            "accuracy_before": before,
            "accuracy_after": after,
            "until_plain_accuracy": {"rollout_seconds": 2.0, "generated_tokens": 100.0},
        },
        "another": {
            **facts,
            "effective_speedup": None,
            "step_speedup": None,
            "until_plain_accuracy": {"rollout_seconds": None, "generated_tokens": None},
        },
    }
    lines = table(runs).splitlines()
    assert lines[0].split() == ["one", "another"]
    cells = {line[:40].strip(): line[40:].split("  ") for line in lines}
    assert [c.strip() for c in cells["effective speed-up from epoch 2 on"] if c] == ["2.50x", "-"]
    assert [c.strip() for c in cells["of the whole step"] if c] == ["2.00x", "-"]
    assert "25.0% -> 75.0%" in lines[-4]
    assert lines[-3].split()[-2:] == ["-", "-"]  # held-out prompts were not evaluated afterwards
    assert lines[-1].split()[-3:] == ["100", "not", "reached"]
    assert len({len(line) for line in lines}) == 1


def test_a_comparison_in_words() -> None:
    same = {"total": 4096, "identical": 4096, "first_difference": None}
    expected = "both and vanilla: 4,096 of 4,096 rollouts identical, token for token"
    assert comparison_line("both", "vanilla", same) == expected
    place = {"rollout": 3, "step": 1, "position": 7}
    text = comparison_line("both", "vanilla", {**same, "identical": 9, "first_difference": place})
    assert text.endswith(f"first difference: {place}")


def test_what_the_plain_run_reached_is_what_others_are_asked_for() -> None:
    plain = [Point(0, 0.0, 0.0, 0.0, 0.4), Point(2, 10.0, 20.0, 400.0, 0.8)]
    other = [Point(0, 0.0, 0.0, 0.0, 0.4), Point(2, 6.0, 16.0, 200.0, 0.6)]
    better = [*other, Point(4, 10.0, 26.0, 300.0, 1.0)]
    found = until({"plain": plain, "other": other, "better": better}, "plain")
    assert found["plain"] == {"rollout_seconds": 10, "step_seconds": 20, "generated_tokens": 400}
    assert set(found["other"].values()) == {None}
    assert found["better"] == {"rollout_seconds": 8, "step_seconds": 21, "generated_tokens": 250}
    assert until({"plain": plain[:1]}, "plain") == until({"other": other}, "plain") == {}
