"""SPEC_ROLLOUT=drafting and nothing else: TRL's own trainer, with its colocated vLLM."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from laws import SMALLEST_P

pytestmark = pytest.mark.slow
Run = Callable[[str], dict[str, Any]]


def engine_steps(result: dict[str, Any]) -> list[int]:
    """Of each generation."""
    counted = [0, *(call["engine_steps"] for call in result["calls"])]
    return [after - before for before, after in pairwise(counted)]


def logged(result: dict[str, Any], name: str) -> list[float]:
    return [float(row[name]) for row in result["history"] if name in row]


def test_both_runs_ask_for_the_same_prompts(run: Run) -> None:
    plain, drafting = (
        [call["prompts"] for call in run(name)["calls"]] for name in ("stock", "drafting")
    )
    assert plain == drafting
    assert len(plain) == 6
    assert {prompt for call in plain[:2] for prompt in call} == {
        prompt for call in plain[2:4] for prompt in call
    }


def test_the_log_says_how_much_was_accepted(run: Run) -> None:
    log = run("drafting")["log"]
    assert "SPEC_ROLLOUT=drafting: requests are proposed what this engine generated before" in log
    lines = re.findall(r"([\d.]+) tokens per request and step, (\d+)% of ([\d,]+) proposed", log)
    assert max(int(share) for _, share, _ in lines) > 20
    assert max(float(tokens) for tokens, _, _ in lines) > 1.2
    assert "tokens per request and step" not in run("stock")["log"]


def test_every_request_was_served(run: Run) -> None:
    remembers = run("drafting")["remembers"]
    assert remembers["num_served"] == 6 * 64
    assert remembers["num_passed_by"] == 0


def test_engine_steps_fall(run: Run) -> None:
    plain, drafting = engine_steps(run("stock")), engine_steps(run("drafting"))
    assert all(with_it < without for with_it, without in zip(drafting, plain, strict=True))
    assert sum(drafting) <= 0.7 * sum(plain)
    # Prompts that come again.
    assert sum(drafting[2:]) <= 0.6 * sum(plain[2:])


@pytest.mark.parametrize("what", ["reward", "length"])
def test_the_law_of_the_completions_is_the_same(run: Run, what: str) -> None:
    """Means over 384 completions of each run, five standard errors apart at most.

    The weights hardly move (a learning rate of 1e-6), so all steps count.
    """

    def values(name: str) -> np.ndarray:
        if what == "reward":
            return np.concatenate([call["rewards"] for call in run(name)["calls"]])
        return np.array([len(ids) for call in run(name)["calls"] for ids in call["completion_ids"]])

    plain, drafting = values("stock"), values("drafting")
    assert len(plain) == len(drafting) == 384
    error = np.sqrt(plain.var() / len(plain) + drafting.var() / len(drafting))
    assert error > 0
    assert abs(plain.mean() - drafting.mean()) <= 5 * error


def test_the_first_tokens_have_the_same_law(run: Run) -> None:
    """Chi-square at each of the first eight places, as tokens of a completion are not independent.

    Those rarer than 10 are taken together.
    """
    from scipy.stats import chi2_contingency

    num_tested = 0
    for position in range(8):
        counts: dict[int, list[int]] = {}
        for row, name in enumerate(("stock", "drafting")):
            for call in run(name)["calls"]:
                for ids in call["completion_ids"]:
                    counts.setdefault(ids[position], [0, 0])[row] += 1
        table = [pair for pair in counts.values() if sum(pair) >= 10]
        rare = [pair for pair in counts.values() if sum(pair) < 10]
        table += [np.sum(rare, axis=0)] if rare else []
        if len(table) > 1:
            num_tested += 1
            assert chi2_contingency(np.array(table)).pvalue > SMALLEST_P / 8, position
    assert num_tested >= 4


def test_entropy_as_the_trainer_logs_it_is_the_same(run: Run) -> None:
    plain, drafting = (logged(run(name), "entropy") for name in ("stock", "drafting"))
    assert len(plain) == len(drafting) == 6
    assert np.mean(drafting) == pytest.approx(np.mean(plain), rel=0.1)


def test_log_probs_agree_with_the_trainer_as_before(run: Run) -> None:
    """vLLM runs in bfloat16 here, as TRL starts it; the difference is that of the type."""
    for name, room in (("mean", 1.2), ("max", 2.0)):
        plain, drafting = (
            logged(run(which), f"sampling/sampling_logp_difference/{name}")
            for which in ("stock", "drafting")
        )
        assert np.mean(drafting) <= room * np.mean(plain)
    ratios = logged(run("drafting"), "sampling/importance_sampling_ratio/mean")
    assert np.allclose(ratios, 1.0, atol=0.1)
