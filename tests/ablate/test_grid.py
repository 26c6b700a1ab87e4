"""Runs made from one config, and trained with the real engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from spec_rollout.ablate.compare import compare_responses
from spec_rollout.ablate.grid import RESPONSES, Grid, changed, train_grid
from spec_rollout.config.sections import ConfigError


def test_changes_are_checked_as_a_config_file_is(make_config) -> None:
    base = make_config()
    config = changed(base, {"rollout.rule": "lenient", "train.lr": 1})
    assert (config.rollout.rule, config.train.lr) == ("lenient", 1.0)
    assert changed(base, {}) == base
    with pytest.raises(ConfigError, match=r"rollout\.rul: unknown key"):
        changed(base, {"rollout.rul": "lenient"})
    with pytest.raises(ConfigError, match=r"train\.epochs: expected an integer"):
        changed(base, {"train.epochs": "two"})


@pytest.mark.slow
@pytest.mark.parametrize("together", [True, False])
def test_runs_differ_in_what_was_changed(make_config, tmp_path: Path, together: bool) -> None:
    runs = {
        "off": {"rollout.reuse": False},
        "on": {"rollout.reuse": True},
        "other": {"rollout.rule": "lenient"},
    }
    base = make_config(train={"epochs": 2})
    grid = Grid(base, runs, tmp_path / "grid", together=together)
    order = []
    summaries = train_grid(grid, lambda name, row: order.append((name, row["step"])))
    steps = [(name, step) for name, step in order if step > 0]
    in_turns = [(name, step) for step in range(1, 5) for name in runs]
    one_by_one = [(name, step) for name in runs for step in range(1, 5)]
    assert steps == (in_turns if together else one_by_one)
    # Before training the weights are the same: judged once, for all.
    assert [name for name, step in order if step == 0] == ["off"]
    assert summaries["off"].accuracy_before == summaries["other"].accuracy_before != {}
    assert summaries["on"].totals.num_reused_tokens > 0 == summaries["off"].totals.num_reused_tokens
    files = {name: tmp_path / "grid" / name / RESPONSES for name in runs}
    same = compare_responses(files["on"], files["off"])
    assert same == {"total": 48, "identical": 48, "first_difference": None}
    assert compare_responses(files["other"], files["off"])["identical"] < 48
