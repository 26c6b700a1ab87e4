"""`SpecRollout` in real trainers: on the trainer's own model and on TRL's colocated vLLM."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.slow
Run = Callable[[str], dict[str, Any]]
STEPS = 2  # an epoch


def rollouts(result: dict[str, Any], *, train: bool = True) -> list[dict[str, Any]]:
    """What the reward function was given, call by call."""
    return [call for call in result["calls"] if call.get("train") is train]


def logged(result: dict[str, Any], name: str) -> list[float]:
    return [float(row[name]) for row in result["history"] if name in row]


def by_prompt(calls: list[dict[str, Any]]) -> dict[str, list[list[int]]]:
    """Completions of each prompt, sorted."""
    found = defaultdict(list)
    for call in calls:
        for prompt, ids in zip(call["prompts"], call["completion_ids"], strict=True):
            found[prompt].append(ids)
    return {prompt: sorted(ids) for prompt, ids in found.items()}


@pytest.mark.parametrize(
    "name",
    [
        *("model", "model, two processes", "model, TRL's precision", "model, lenient"),
        *("vllm", "vllm, two processes", "vllm, lenient"),
    ],
)
def test_drafts_are_used_from_the_second_epoch_on(run: Run, name: str) -> None:
    result = run(name)
    drafts = logged(result, "spec_rollout/draft_fraction")
    reused = logged(result, "spec_rollout/reused_fraction")
    assert drafts == [0.0] * STEPS + [1.0] * (2 * STEPS)
    assert reused[:STEPS] == [0.0] * STEPS
    assert min(reused[STEPS:]) > 0.1


@pytest.mark.parametrize("name", ["model", "vllm"])
def test_the_data_was_shuffled(run: Run, name: str) -> None:
    calls = rollouts(run(name))
    first, second = ([call["prompts"] for call in calls[i : i + STEPS]] for i in (0, STEPS))
    assert first != second
    assert {p for prompts in first for p in prompts} == {p for prompts in second for p in prompts}


@pytest.mark.parametrize("engine", ["model", "vllm"])
def test_coupled_rollouts_are_the_same_with_the_cache_and_without(run: Run, engine: str) -> None:
    """Token for token, through all updates: what is drawn does not depend on drafts."""
    with_cache, without = run(engine), run(f"{engine}, no cache")
    assert max(logged(without, "spec_rollout/reused_fraction")) == 0.0
    for train in (True, False):
        a, b = rollouts(with_cache, train=train), rollouts(without, train=train)
        assert [call["completion_ids"] for call in a] == [call["completion_ids"] for call in b]
        assert a


@pytest.mark.parametrize("engine", ["model", "vllm"])
def test_reuse_takes_fewer_engine_steps(run: Run, engine: str) -> None:
    with_cache, without = (
        logged(run(name), "spec_rollout/engine_steps") for name in (engine, f"{engine}, no cache")
    )
    assert sum(with_cache[STEPS:]) < 0.6 * sum(without[STEPS:])


@pytest.mark.parametrize(
    "name", ["model", "model, no cache", "model, two processes", "model, tools"]
)
def test_log_probs_are_those_of_the_model(run: Run, name: str) -> None:
    differences = [
        call["worst_difference"] for call in run(name)["calls"] if "worst_difference" in call
    ]
    assert differences
    assert max(differences) < 1e-4


def test_log_probs_in_trls_precision_are_those_of_the_trainer(run: Run) -> None:
    """TRL's default is bfloat16, by autocast: log-probs have its rounding on both sides."""
    result = run("model, TRL's precision")
    assert result["is_autocast"]
    calls = [call for call in result["calls"] if "mean_difference" in call]
    assert len(calls) == 3 * STEPS
    assert max(call["mean_difference"] for call in calls) < 0.005
    assert max(call["worst_difference"] for call in calls) < 0.2
    assert not run("model")["is_autocast"]


def test_log_probs_of_vllm_agree_with_the_trainer_as_without_the_adapter(run: Run) -> None:
    name = "sampling/sampling_logp_difference/max"
    stock = max(logged(run("vllm, stock"), name))
    assert stock < 1e-4  # both in float32
    assert max(logged(run("vllm"), name)) <= 2 * stock
    assert max(logged(run("vllm, two processes"), name)) <= 3 * stock
    ratios = logged(run("vllm"), "sampling/importance_sampling_ratio/mean")
    assert ratios == pytest.approx([1.0] * len(ratios), abs=1e-3)


def test_weights_that_stay_behind_are_seen(run: Run) -> None:
    """The test above fails where the weights of vLLM are not those of the trainer."""
    differences = logged(run("vllm, old weights"), "sampling/sampling_logp_difference/max")
    assert differences[0] < 1e-4
    assert differences[-1] > 1e-2


def test_behaviour_log_probs_let_the_correction_act_on_reused_tokens(run: Run) -> None:
    """Under `Lenient` TRL is told with which probability a reused token was first drawn."""
    result = run("vllm, lenient")
    differences = logged(result, "sampling/sampling_logp_difference/max")
    assert max(differences[:STEPS]) < 1e-4
    assert min(differences[STEPS:]) > 1e-3
    ratios = logged(result, "sampling/importance_sampling_ratio/mean")
    assert all(0.3 < ratio < 3 for ratio in ratios)


@pytest.mark.parametrize("name", ["model", "vllm"])
def test_evaluation_draws_afresh_and_leaves_the_cache_alone(run: Run, name: str) -> None:
    result = run(name)
    evaluated = rollouts(result, train=False)
    assert len(evaluated) == 6  # two batches of 24 and 8 rows each epoch
    trained = by_prompt(rollouts(result))
    first, second = by_prompt(evaluated[:2]), by_prompt(evaluated[2:4])
    assert first.keys() == second.keys() < trained.keys()
    for prompt in first:
        assert len({tuple(ids) for ids in first[prompt]}) > 1
        assert first[prompt] != second[prompt]
        assert not any(ids in trained[prompt] for ids in first[prompt])
    assert result["cache"] == 6 * 8


@pytest.mark.parametrize("engine", ["model", "vllm"])
def test_two_processes_draw_what_one_draws(run: Run, engine: str) -> None:
    """A group that straddles them included; afterwards the updates differ in the last bits."""
    one, two = run(engine), run(f"{engine}, two processes")
    ranks = [rollouts(rank)[0] for rank in two["ranks"]]
    assert set(ranks[0]["prompts"]) & set(ranks[1]["prompts"])
    assert by_prompt(ranks) == by_prompt(rollouts(one)[:1])
    assert [rank["cache"] for rank in two["ranks"]] == [48, 48]


def test_sleep_mode_wakes_syncs_and_sleeps_around_every_rollout(run: Run) -> None:
    slept = run("vllm, no cache")["slept"]
    num_rollouts = len(rollouts(run("vllm, no cache"))) + 6
    asleep = [i for i, what in enumerate(slept) if what == "sleep 2"]
    assert len(asleep) == num_rollouts
    start = 0
    for end in asleep:
        called = slept[start:end]
        assert called[:2] == ["sync", "wake weights"]
        assert called[-1] == "wake kv_cache"
        start = end + 1


def test_what_a_tool_says_is_prompt_of_the_next_turn_and_never_a_draft(run: Run) -> None:
    result = run("model, tools")
    turns = [call for call in result["calls"] if "second" in call]
    answer = turns[0]["answer"]
    for turn in turns:
        assert turn["told"]
        assert all(ids[-len(answer) :] == answer for ids in turn["told"])
    # The weights do not move, so all that was said is said again: the second turns, too.
    reused = [turn["reused"] for turn in turns]
    tokens = [sum(map(len, turn["second"])) for turn in turns]
    assert reused[:STEPS] == [0] * STEPS
    assert reused[STEPS:] == tokens[STEPS:]
    assert sorted(tokens[:STEPS]) == sorted(tokens[STEPS:])


@pytest.mark.parametrize("name", ["model", "vllm"])
def test_metrics_are_in_the_log_of_the_trainer(run: Run, name: str) -> None:
    rows = [row for row in run(name)["history"] if "spec_rollout/reused_fraction" in row]
    assert len(rows) == 3 * STEPS
    for name in ("fully_reused_fraction", "tokens_per_step", "engine_steps", "rollout_seconds"):
        assert all(row[f"spec_rollout/{name}"] >= 0 for row in rows)
