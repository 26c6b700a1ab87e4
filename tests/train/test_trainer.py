"""Whole runs with the real engine and cache.

What they learn, and what they write.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from whole_runs import (
    assert_same_weights,
    final_weights,
    read_rows,
    without_seconds,
)

from spec_rollout.config.toml import load_config
from spec_rollout.keys import noise_keys
from spec_rollout.train import algorithms
from spec_rollout.train.algorithms.advantages import per_token
from spec_rollout.train.algorithms.base import Advantages, LossOutputs, Needs
from spec_rollout.train.checkpoint import list_checkpoints
from spec_rollout.train.rows import thinned
from spec_rollout.train.trainer import resume, run
from spec_rollout.types import RolloutStats

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_run_learns_and_writes_everything(make_config):
    config = make_config(train={"epochs": 8, "lr": 1e-2}, eval={"every_steps": 5})
    seen = []
    summary = run(config, on_step=seen.append)
    run_dir = Path(config.log.run_dir)
    rows = read_rows(run_dir)
    assert rows == seen
    assert [row["step"] for row in rows] == list(range(17))  # 6 prompts, 3 per step, 8 epochs
    assert [row["epoch"] for row in rows[1:]] == [s // 2 for s in range(16)]
    assert [row["step"] for row in rows if "accuracy_train" in row] == [0, 5, 10, 15, 16]
    # A random model picks digits at about the rate of its vocabulary; the reward is their share.
    assert summary.eval_reward_after["train"] > summary.eval_reward_before["train"] + 0.15
    assert rows[-1]["reward"] > rows[1]["reward"] + 0.15
    for row in rows[1:]:
        assert RolloutStats.__dataclass_fields__.keys() <= row.keys()
        assert row["logprob_gap"] < 1e-5  # the engine's own log-probs are the trainer's
        assert row["approx_kl"] < 1e-8
        assert row["clip_fraction"] == 0.0  # one update per step is on-policy
        assert row["num_response_tokens"] == row["num_generated_tokens"] + row["num_reused_tokens"]
        assert row["num_tokens"] == row["num_response_tokens"]
        assert row["grad_norm"] > 0
        assert 0 < row["entropy"] < 4
        assert row["step_seconds"] >= row["rollout_seconds"] + row["train_seconds"]
    assert [row["num_drafts"] for row in rows[1:]] == [0] * 2 + [12] * 14
    assert [row["num_cache_misses"] for row in rows[1:]] == [12] * 2 + [0] * 14
    assert summary.totals.reused_fraction > 0.05
    assert summary.after_first_epoch.steps == 14
    assert summary.after_first_epoch.reused_fraction > summary.totals.reused_fraction

    saved = json.loads((run_dir / "summary.json").read_text())
    assert saved == json.loads(json.dumps(summary.to_dict()))
    assert saved["generated_tokens"] == sum(row["num_generated_tokens"] for row in rows[1:])
    assert saved["accuracy_after"].keys() == {"train"}
    assert saved["seed"] == 7
    assert load_config(run_dir / "config.toml") == config.settled()
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    # The same four prompts in every epoch of two steps.
    assert [s["step"] for s in samples[:4]] == [1, 1, 2, 2]
    followed = {s["row"] for s in samples[:4]}
    for epoch in range(8):
        assert {s["row"] for s in samples if s["epoch"] == epoch} == followed
    assert all(len(s["tokens"]) == len(s["logprobs"]) >= s["accepted_tokens"] for s in samples)
    assert any(s["accepted_tokens"] > 0 for s in samples)
    (checkpoint,) = list_checkpoints(run_dir / "checkpoints")
    assert checkpoint.name == "step-00000016"


def test_the_checkpoint_holds_the_trained_model(make_config, model_dir):
    config = make_config()
    run(config)
    start, end = load_file(model_dir / "model.safetensors"), final_weights(config.log.run_dir)
    assert start.keys() == end.keys()
    assert all(not torch.equal(start[name], end[name]) for name in start)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = list_checkpoints(Path(config.log.run_dir) / "checkpoints")[-1] / "model"
    AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<eos>"


@pytest.mark.slow
def test_same_seed_same_run(make_config, tmp_path):
    rows = []
    for index, seed in enumerate((7, 7, 8)):
        config = make_config(
            rollout={"rule": "lenient"},
            train={"seed": seed},
            log={"run_dir": str(tmp_path / f"r{index}")},
        )
        run(config)
        rows.append(without_seconds(read_rows(config.log.run_dir)))
    assert rows[0] == rows[1]
    assert rows[0] != rows[2]


@pytest.mark.slow
def test_coupled_reuse_changes_nothing_but_the_work(make_config, tmp_path):
    runs = {}
    for reuse in (True, False):
        config = make_config(
            rollout={"rule": "coupled", "reuse": reuse},
            log={"run_dir": str(tmp_path / f"reuse{reuse}")},
        )
        run(config)
        runs[reuse] = read_rows(config.log.run_dir), final_weights(config.log.run_dir)
    assert_same_weights(runs[True][1], runs[False][1])
    for on, off in zip(runs[True][0], runs[False][0], strict=True):
        for key in ("reward", "response_len", "entropy", "grad_norm", "accuracy_train"):
            assert on.get(key) == off.get(key), (on["step"], key)
    assert sum(row.get("num_reused_tokens", 0) for row in runs[True][0]) > 0
    assert sum(row.get("num_reused_tokens", 0) for row in runs[False][0]) == 0


def test_a_policy_that_stands_still_is_reused_whole_and_evaluated_afresh(make_config):
    config = make_config(train={"lr": 0.0}, eval={"every_steps": 1})
    run(config)
    rows = read_rows(config.log.run_dir)
    assert [row["reused_fraction"] for row in rows[3:]] == [1.0] * 4
    assert rows[1]["reward"] + rows[2]["reward"] == pytest.approx(
        rows[3]["reward"] + rows[4]["reward"]
    )
    # Evaluations share no noise with each other (nor with the training rollouts).
    assert len({row["eval_reward_train"] for row in rows}) == len(rows)


@pytest.mark.parametrize("rule", ["lenient", "one_hot", "random_reuse", "random_cut", "none"])
def test_every_rule_trains(make_config, rule):
    config = make_config(rollout={"rule": rule}, train={"epochs": 2})
    summary = run(config)
    rows = read_rows(config.log.run_dir)[1:]
    assert all(row["logprob_gap"] < 1e-5 for row in rows)
    if rule == "none":
        assert [row["num_drafts"] for row in rows] == [0] * 4
    else:
        assert sum(row["num_drafts"] for row in rows) > 0
    if rule not in ("none", "one_hot"):  # one-hot keeps next to nothing of a random model's drafts
        assert summary.totals.reused_fraction > 0


@pytest.mark.parametrize(
    "rule",
    [
        {"rule": "random_reuse", "reuse_prob": 1.0},
        {"rule": "random_cut"},
        {"rule": "coupled", "log_lenience": math.inf},
    ],
)
def test_rules_that_keep_drafts_unseen_train_with_a_filter(make_config, rule):
    """Tokens left out by now are trained on; the sampling distribution has none of them."""
    outside = []

    def count(_step, rollouts):
        outside.append(int(rollouts.logprobs.isneginf().sum()))

    config = make_config(
        rollout={**rule, "top_k": 3},
        train={"lr": 3e-2, "recompute_logprobs": True},
        eval={"num_train_prompts": 0},
    )
    run(config, on_rollouts=count)
    assert outside[:2] == [0, 0]
    assert sum(outside) > 0
    rows = read_rows(config.log.run_dir)
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert {row["logprob_gap"] for row in rows} == {None}
    for line in (Path(config.log.run_dir) / "samples.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # -Infinity is not JSON


@pytest.mark.slow
def test_options_of_the_update_together(make_config, write_rows):
    heldout = write_rows([{"prompt": "2 2 =?\n", "answer": "4"}], "heldout.jsonl")
    config = make_config(
        rollout={"rule": "lenient", "top_p": 0.9, "top_k": 40},
        train={
            "minibatches": 3,
            "kl_coef": 0.1,
            "loss_aggregation": "seq_mean",
            "recompute_logprobs": True,
            "warmup_steps": 4,
            "weight_decay": 0.01,
            "micro_batch_tokens": 40,
        },
        eval={"path": str(heldout), "temperature": 0.0},
    )
    summary = run(config)
    rows = read_rows(config.log.run_dir)
    assert [row["lr"] for row in rows[1:]] == pytest.approx(
        [3e-3 * min(1, s / 4) for s in range(1, 7)]
    )
    # The first minibatch of the first step is at the reference; from then on the policy moves away.
    assert 0 < rows[1]["kl"] < rows[-1]["kl"]
    assert all(row["approx_kl"] > 0 for row in rows[1:])
    assert summary.accuracy_after.keys() == {"train", "heldout"}


class Reinforce:
    """Another algorithm, of the test's own: every token's advantage is the reward times its place.

    It is registered by name alone; trainer and update know nothing of it.
    """

    needs = Needs()
    sum_names = ("mean_advantage",)

    def __init__(self, config):
        assert config.algorithm == "reinforce"

    def advantages(self, inputs):
        assert inputs.rewards.shape == (3, 4)
        assert inputs.max_tokens == 12
        assert inputs.truncated.dtype == torch.bool
        places = torch.cat([torch.arange(1.0, n + 1) for n in inputs.response_lens.tolist()])
        rewards = per_token(inputs.rewards.float().flatten(), inputs.response_lens)
        return Advantages(places * rewards, metrics={"longest": float(inputs.response_lens.max())})

    def token_weights(self, response_lens, max_tokens):
        return torch.full((response_lens.numel(),), 1.0 / float(response_lens.sum()))

    def loss(self, inputs):
        loss = -(inputs.weights * inputs.advantages * inputs.logprobs).sum()
        return LossOutputs(loss, {"mean_advantage": inputs.advantages.sum()})


class ActorCritic:
    """A critic: advantages are the reward minus the value, and the head learns the reward."""

    needs = Needs(values=True)
    sum_names = ("value_error",)

    def __init__(self, config):
        pass

    def advantages(self, inputs):
        returns = per_token(inputs.rewards.float().flatten(), inputs.response_lens)
        assert inputs.values.shape == returns.shape
        return Advantages(returns - inputs.values, returns)

    def token_weights(self, response_lens, max_tokens):
        return torch.full((response_lens.numel(),), 1.0 / float(response_lens.sum()))

    def loss(self, inputs):
        error = (inputs.values - inputs.returns).square()
        policy = -inputs.advantages * (inputs.logprobs - inputs.old_logprobs).exp()
        # Before the first optimizer step the head says what it said before the advantages.
        torch.testing.assert_close(inputs.values.detach(), inputs.old_values, rtol=1e-3, atol=1e-4)
        loss = (inputs.weights * (policy + error)).sum()
        return LossOutputs(loss, {"value_error": error.detach().sum()})


@pytest.mark.slow
def test_a_value_head_learns_and_is_resumed(make_config, monkeypatch, tmp_path):
    monkeypatch.setattr(algorithms, "_ALGORITHMS", {"actor_critic": ActorCritic})
    rows = []
    for name in ("whole", "resumed"):
        config = make_config(
            train={"algorithm": "actor_critic", "lr": 3e-3, "critic_lr": 3e-3, "epochs": 4},
            log={"run_dir": str(tmp_path / name)},
        )
        if name == "resumed":
            run(replace(config, train=replace(config.train, max_steps=3)))
            resume(config.log.run_dir, ["train.max_steps=none"])
        else:
            run(config)
        rows.append(without_seconds(read_rows(config.log.run_dir)))
    errors = [row["value_error"] for row in rows[0][1:]]
    assert errors[-1] < 0.7 * errors[0]
    # The evaluation after step 3 is of the run that ended there.
    plain = [[{k: v for k, v in r.items() if "eval" not in k and "accuracy" not in k} for r in run_]
             for run_ in rows]  # fmt: skip
    assert plain[0] == plain[1]


def test_an_algorithm_of_ones_own_trains(make_config, monkeypatch):
    known = {**algorithms._ALGORITHMS, "reinforce": Reinforce}
    monkeypatch.setattr(algorithms, "_ALGORITHMS", known)
    config = make_config(train={"algorithm": "reinforce", "max_steps": 2})
    run(config)
    for row in read_rows(config.log.run_dir)[1:]:
        assert row["longest"] <= 12
        # The mean over tokens: rewards are at most 1, places at most 12.
        assert 0 < row["mean_advantage"] < 12
        assert "approx_kl" not in row
        assert row["grad_norm"] > 0


def test_max_steps_and_partial_batches(make_config):
    config = make_config(train={"prompts_per_step": 4, "epochs": 5, "max_steps": 3})
    run(config)
    rows = read_rows(config.log.run_dir)
    assert [row.get("num_rollouts") for row in rows] == [None, 16, 8, 16]
    assert [row["epoch"] for row in rows[1:]] == [0, 0, 1]


def test_no_evaluation_no_row_zero(make_config):
    config = make_config(eval={"num_train_prompts": 0}, train={"max_steps": 1})
    summary = run(config)
    assert [row["step"] for row in read_rows(config.log.run_dir)] == [1]
    assert summary.accuracy_before == summary.accuracy_after == {}


def skip_most(prompt, response, answer):
    return None if len(response) % 2 else float(len(response))


def skip_all(prompt, response, answer):
    return None


@pytest.mark.parametrize("name", ["skip_most", "skip_all"])
def test_skipped_rewards(make_config, name):
    config = make_config(reward={"functions": [f"{__name__}:{name}"]}, train={"max_steps": 2})
    run(config)
    for row in read_rows(config.log.run_dir)[1:]:
        assert row["num_skipped_rewards"] > 0
        if name == "skip_all":
            assert (row["num_tokens"], row["grad_norm"]) == (0, 0.0)
        else:
            assert 0 < row["num_tokens"] < row["num_response_tokens"]


def one(prompt, response, answer):
    return 1.0


@pytest.mark.slow
def test_a_run_that_learns_nothing_says_so_once(make_config, capsys):
    config = make_config(
        reward={"functions": [f"{__name__}:one"]},
        train={"epochs": None, "max_steps": 42},
        rollout={"max_tokens": 2},
        eval={"num_train_prompts": 0},
    )
    seen = []
    run(config, on_step=lambda row: seen.append("had an advantage" in capsys.readouterr().err))
    assert [index + 1 for index, said in enumerate(seen) if said] == [20]


@pytest.mark.slow
@pytest.mark.parametrize("log_lenience", [math.inf, -math.inf])
def test_a_run_that_repeats_itself_says_so_once(make_config, capsys, log_lenience):
    config = make_config(
        rollout={"rule": "lenient", "log_lenience": log_lenience},
        train={"epochs": 4},
        eval={"num_train_prompts": 0},
    )
    rows, said = [], []

    def look(row):
        rows.append(row)
        said.append("training repeats itself" in capsys.readouterr().err)

    run(config, on_step=look)
    if log_lenience > 0:
        # Two steps an epoch: the second epoch has been seen whole after step 4.
        assert [index + 1 for index, s in enumerate(said) if s] == [4]
        assert [row["num_new_responses"] for row in rows[2:]] == [0] * 6
        assert [row["mean_age"] for row in rows] == pytest.approx([0, 0, 1, 1, 2, 2, 3, 3])
        assert all(row["kl_reused"] > 0 for row in rows[2:])
    else:
        assert not any(said)
        assert all(row["num_new_responses"] == row["num_distinct_responses"] for row in rows)


@pytest.mark.slow
def test_a_saved_cache_gives_drafts_from_the_first_step(make_config, tmp_path):
    first = make_config(rollout={"rule": "lenient"}, train={"epochs": 1})
    run(first)
    cache = list_checkpoints(Path(first.log.run_dir) / "checkpoints")[-1] / "cache.bin"
    second = make_config(
        rollout={"rule": "lenient", "cache_path": str(cache)},
        train={"epochs": 1},
        log={"run_dir": str(tmp_path / "second")},
    )
    run(second)
    assert [row.get("num_drafts") for row in read_rows(second.log.run_dir)] == [None, 12, 12]


@pytest.fixture
def noise_of(monkeypatch):
    """The noise keys of a run's rollouts, its evaluations left out."""
    keys = []

    def noted(seed, *args):
        found = noise_keys(seed, *args)
        if seed == 7:
            keys.extend(found.tolist())
        return found

    monkeypatch.setattr("spec_rollout.rollout.noise_keys", noted)

    def of(start):
        keys.clear()
        start()
        return list(keys)

    return of


@pytest.mark.slow
def test_rollouts_of_another_run_are_tested_with_other_noise_than_drew_them(
    make_config, tmp_path, noise_of
):
    def config(name, rule, before=None, **train):
        rollout = {"rule": rule}
        if before is not None:
            folder = list_checkpoints(tmp_path / before / "checkpoints")[-1]
            rollout["cache_path"] = str(folder / "cache.bin")
        return make_config(
            rollout=rollout,
            train={"epochs": 1, **train},
            eval={"num_train_prompts": 0},
            log={"run_dir": str(tmp_path / name)},
        )

    def keys(*args, **train):
        return noise_of(lambda: run(config(*args, **train)))

    first, other = keys("a", "lenient"), keys("a2", "lenient")
    second, third = keys("b", "lenient", "a"), keys("c", "lenient", "b")
    assert first == other
    assert len({*first, *second, *third}) == 3 * len(first) == 72
    # A run that is resumed goes on with its own.
    part = keys("b2", "lenient", "a", max_steps=1)
    part += noise_of(lambda: resume(tmp_path / "b2", ["train.max_steps=none"]))
    assert part == second
    # Under the rule coupled the old noise is what lets drafts pass.
    assert keys("d", "coupled") == keys("e", "coupled", "d")


def test_running_requests_are_thinned_from_the_end() -> None:
    running = torch.tensor([[0.1 * i, 10 - i] for i in range(10)], dtype=torch.float64)
    assert thinned(running, 5) == {"seconds": [0.1, 0.3, 0.5, 0.7, 0.9], "running": [9, 7, 5, 3, 1]}
    assert thinned(running)["running"] == list(range(10, 0, -1))
    assert thinned(running[:0]) == {"seconds": [], "running": []}
