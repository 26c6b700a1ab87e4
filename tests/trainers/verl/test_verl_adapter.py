"""Runs of main_ppo whose rollouts are named: drafts kept by the engine, and by actors."""

from __future__ import annotations

import ast
import itertools
import re
from pathlib import Path

import pytest
from verl_runs import BATCH, GROUP, NUM_PROMPTS, PPORun, run_ppo

pytestmark = pytest.mark.slow

NUM_STEPS = 6  # three epochs of two
MANAGER = (
    "+actor_rollout_ref.rollout.agent.agent_loop_manager_class="
    "spec_rollout.adapters.verl.ReuseManager"
)
# Validation after steps 2, 4 and 6, of all prompts, drawn and not greedy; two workers.
MORE = (
    MANAGER,
    "trainer.test_freq=2",
    "actor_rollout_ref.rollout.val_kwargs.do_sample=True",
    "actor_rollout_ref.rollout.val_kwargs.temperature=1.0",
    "actor_rollout_ref.rollout.agent.num_workers=2",
)


@pytest.fixture(scope="module")
def named(folder: Path) -> PPORun:
    """Drafts kept by the engine."""
    return run_ppo(folder, "named", '{"mode": "coupled", "log_seconds": 0.001}', *MORE)


@pytest.fixture(scope="module")
def pooled(folder: Path) -> PPORun:
    """Drafts kept by two actors."""
    settings = {
        "drafts": "actors",
        "mode": "lenient",
        "log_lenience": 0.5,
        "num_actors": 2,
        "timeout": 300.0,
        "folder": folder / "drafts",
    }
    section = [f"+spec_rollout.{name}={value}" for name, value in settings.items()]
    return run_ppo(folder, "pooled", "drafting", *MORE, "trainer.save_freq=2", *section)


def counters(run: PPORun) -> dict[int, dict[str, int]]:
    """What the manager said before each step."""
    found = re.findall(r"spec_rollout: before step (\d+): (\{.*?\})", run.log)
    return {int(step): ast.literal_eval(counts) for step, counts in found}


@pytest.mark.parametrize("name", ["named", "pooled"])
def test_actor_and_engine_agree_on_log_probs(name: str, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue(name)
    assert run.values("training/global_step") == list(range(1, NUM_STEPS + 1))
    correlations = run.values("training/rollout_actor_probs_pearson_corr")
    assert len(correlations) == NUM_STEPS
    assert min(correlations) > 0.999
    assert max(run.values("training/rollout_probs_diff_mean")) < 1e-3
    assert any("val-core" in key or "val-aux" in key for step in run.metrics for key in step)


def test_from_the_second_epoch_on_every_rollout_follows_its_last(named: PPORun) -> None:
    lines = named.log_lines()
    # Validation is not among them.
    assert lines[-1]["served"] == BATCH * GROUP * NUM_STEPS
    assert lines[-1]["with_own"] == BATCH * GROUP * (NUM_STEPS - 2)
    assert max(line["with_own"] for line in lines if line["served"] <= 2 * BATCH * GROUP) == 0
    accepted = sum(line["share"] * line["proposed"] for line in lines)
    num_tokens = sum(named.values("response_length/mean")) * BATCH * GROUP
    # What is given after the last line is in none of them.
    assert accepted > 0.3 * num_tokens


def test_coupled_rollouts_are_mostly_those_of_the_last_epoch(named: PPORun) -> None:
    """The weights hardly move: the same noise gives the same text."""
    epochs = [sorted(itertools.chain(*named.responses[i : i + 2])) for i in (0, 2, 4)]
    for before, after in ((0, 1), (1, 2)):
        same = sum(a == b for a, b in zip(epochs[before], epochs[after], strict=True))
        assert same > 0.8 * len(epochs[before])
    # The siblings of a prompt differ among themselves.
    assert len(set(epochs[0])) > 2 * len({prompt for prompt, _ in epochs[0]})


def test_actors_serve_every_rollout_from_the_second_epoch_on(pooled: PPORun) -> None:
    counts = counters(pooled)
    assert sorted(counts) == list(range(2, NUM_STEPS + 1))
    size = BATCH * GROUP
    for step, found in counts.items():
        assert found["rollouts"] == (step - 1) * size
        assert found["with_draft"] == max(step - 3, 0) * size
        assert found["failures"] == 0
    last = counts[NUM_STEPS]
    assert last["reused_tokens"] > 0.6 * last["draft_tokens"] > 0


def test_drafts_are_written_beside_checkpoints(pooled: PPORun, folder: Path) -> None:
    from spec_rollout.cache import RolloutCache

    caches = []
    for i in range(2):
        caches.append(RolloutCache())
        caches[-1].load(folder / "drafts" / f"drafts_{i}_of_2.cache")
    assert sum(cache.stats.num_samples for cache in caches) == NUM_PROMPTS * GROUP
    assert all(cache.stats.num_groups > 0 for cache in caches)
    assert f"spec_rollout: 0 drafts of 0 prompts found in {folder / 'drafts'}" in pooled.log
