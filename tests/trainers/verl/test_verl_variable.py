"""A run of main_ppo with nothing but SPEC_ROLLOUT set, beside one without."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from laws import SMALLEST_P
from scipy import stats
from verl_runs import BATCH, GROUP, PPORun, run_ppo

pytestmark = pytest.mark.slow

NUM_STEPS = 6  # three epochs of two


@pytest.fixture(scope="module")
def stock(folder: Path) -> PPORun:
    """The run of a vLLM without speculation."""
    return run_ppo(folder, "stock", "off")


@pytest.fixture(scope="module")
def drafting(folder: Path) -> PPORun:
    """The same with the variable set."""
    return run_ppo(folder, "drafting", '{"mode": "drafting", "log_seconds": 0.001}')


def test_both_runs_end_and_measure_the_same(stock: PPORun, drafting: PPORun) -> None:
    for run in (stock, drafting):
        assert run.values("training/global_step") == list(range(1, NUM_STEPS + 1))
    for before, with_it in zip(stock.metrics, drafting.metrics, strict=True):
        assert set(before) == set(with_it)


def test_actor_and_engine_agree_on_log_probs(stock: PPORun, drafting: PPORun) -> None:
    for run in (stock, drafting):
        correlations = run.values("training/rollout_actor_probs_pearson_corr")
        assert len(correlations) == NUM_STEPS
        assert min(correlations) > 0.999
        assert max(run.values("training/rollout_probs_diff_mean")) < 1e-3


def test_the_log_line_reports_accepted_proposals_and_fewer_steps(
    stock: PPORun, drafting: PPORun
) -> None:
    assert stock.log_lines() == []
    lines = drafting.log_lines()
    assert lines[-1]["served"] == BATCH * GROUP * NUM_STEPS
    assert lines[-1]["passed_by"] == 0
    accepted = sum(line["share"] * line["proposed"] for line in lines)
    num_tokens = sum(drafting.values("response_length/mean")) * BATCH * GROUP
    # Stock gives a token per request and step.
    assert accepted > 0.2 * num_tokens


def assert_same_law(counts: Counter[str], others: Counter[str]) -> None:
    """Chi-square; what is rare is taken together."""
    both = counts + others
    common = [value for value in both if both[value] >= 10]
    table = [[c[value] for value in common] for c in (counts, others)]
    for row, c in zip(table, (counts, others), strict=True):
        row.append(sum(c.values()) - sum(row))
    used = np.array(table)[:, np.array(table).sum(0) > 0]
    assert used.shape[1] >= 3
    assert stats.chi2_contingency(used).pvalue > SMALLEST_P


@pytest.mark.parametrize(
    "feature",
    [
        lambda prompt, response: f"{prompt} {response.split()[1:3]}",
        lambda prompt, response: re.sub(
            r"red|green|blue|black|white|brown|grey|pink", "*", response
        ),
        lambda prompt, response: str(len(response)),
    ],
    ids=["content", "form", "length"],
)
def test_responses_have_the_same_law(
    stock: PPORun, drafting: PPORun, feature: Callable[[str, str], str]
) -> None:
    counts = [
        Counter(feature(*row) for step in run.responses for row in step)
        for run in (stock, drafting)
    ]
    assert_same_law(*counts)


def test_scores_and_lengths_have_the_same_mean(stock: PPORun, drafting: PPORun) -> None:
    for values in (lambda text: text.count("r") / max(len(text), 1), len):
        ours, theirs = (
            np.array([values(output) for step in run.responses for _, output in step])
            for run in (stock, drafting)
        )
        error = np.sqrt(ours.var() / ours.size + theirs.var() / theirs.size)
        assert abs(ours.mean() - theirs.mean()) < 5 * error
