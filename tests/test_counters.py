"""One list of counters: what is in it is everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from spec_rollout import counters
from spec_rollout.counters import COUNTERS, RATIOS, RolloutStats
from spec_rollout.runs.summary import Totals, summarize

NAMES = [f.name for f in COUNTERS]
# Each counter has a value of its own, so that none can be taken for another.
VALUES = {name: 3 + 7 * i for i, name in enumerate(NAMES)} | {"num_accepted_proposals": 2}
ONE = RolloutStats(**VALUES)


def test_calls_add_up_counter_by_counter() -> None:
    total = ONE + ONE
    assert {name: getattr(total, name) for name in NAMES} == {n: 2 * v for n, v in VALUES.items()}


def test_a_row_has_every_counter_and_every_ratio() -> None:
    row = ONE.as_row()
    assert list(row) == [*NAMES, *RATIOS]
    assert row["num_draft_tokens"] == ONE.num_draft_tokens
    assert row["reused_fraction"] == ONE.num_reused_tokens / ONE.num_response_tokens


def test_ratios_of_hand_made_counts() -> None:
    stats = RolloutStats(
        num_rollouts=4,
        num_drafts=2,
        num_reused_tokens=30,
        num_fully_reused=1,
        num_response_tokens=120,
        num_generated_tokens=90,
        num_accepted_proposals=45,
        num_groups=2,
        num_distinct_responses=3,
        num_new_responses=1,
        sum_ages=60,
        sum_kl_reused=1.5,
    )
    assert stats.ratios() == {
        "reused_fraction": 0.25,
        "fully_reused_fraction": 0.25,
        "mean_accepted_len": 15.0,
        "tokens_per_step": 2.0,
        "kl_reused": 0.05,
        "mean_age": 0.5,
        "distinct_per_prompt": 1.5,
        "new_per_prompt": 0.5,
    }
    assert RolloutStats().ratios() == dict.fromkeys(RATIOS, 0.0)


def test_an_engine_hands_its_counters_over_by_name() -> None:
    metrics = SimpleNamespace(num_engine_steps=5, tail_seconds=0.5, num_placeholder_tokens=9)
    stats = RolloutStats.from_counts(metrics, num_rollouts=2, num_engine_steps=6)
    assert stats == RolloutStats(num_rollouts=2, num_engine_steps=6, tail_seconds=0.5)


def test_totals_and_summary_hold_every_counter() -> None:
    rows = [
        {"step": 1, "epoch": 0, "reward": 0.5, "step_seconds": 2.0, "train_seconds": 0.5}
        | ONE.as_row(),
        {"step": 2, "epoch": 1, "reward": 0.5, "step_seconds": 3.0, "train_seconds": 1.0}
        | ONE.as_row(),
    ]
    totals = Totals.of(rows)
    assert (totals.steps, totals.step_seconds, totals.train_seconds) == (2, 5.0, 1.5)
    assert [getattr(totals, n) for n in NAMES] == [2 * getattr(ONE, n) for n in NAMES]
    summary = summarize(
        rows,
        run_dir="r",
        rule="coupled",
        reuse=True,
        drafting=False,
        seed=0,
        num_prompts=1,
        num_dropped_prompts=0,
        environment={},
    )
    content = json.loads(json.dumps(summary.to_dict()))
    for name in NAMES:
        key = name.removeprefix("num_")
        assert content[key] == 2 * getattr(ONE, name)
        assert content["after_first_epoch"][key] == getattr(ONE, name)
    for name in RATIOS:
        assert content[name] == getattr(ONE, name)


def test_a_row_written_before_a_counter_existed_counts_nothing_for_it() -> None:
    row = {"step_seconds": 1.0, "train_seconds": 1.0, **ONE.as_row()}
    del row["num_padding_tokens"]
    assert Totals.of([row]).num_padding_tokens == 0


def test_a_row_in_which_a_counter_was_no_number_counts_nothing_for_it() -> None:
    row = {"step_seconds": 1.0, "train_seconds": 1.0, **ONE.as_row(), "sum_kl_reused": None}
    assert Totals.of([row, row]).sum_kl_reused == 0


@pytest.mark.parametrize("name", [*NAMES, *RATIOS])
def test_every_counter_says_what_it_is(name: str) -> None:
    assert counters.label(name)
    assert counters.label(name)[0].islower()
    assert counters.note(name) == "" or counters.note(name).endswith((".", "proposals."))


def test_the_page_about_metrics_has_the_list() -> None:
    page = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"
    assert counters.markdown() in page.read_text(encoding="utf-8")
