"""Each algorithm raises the reward of fresh samples, with and without reuse."""

from __future__ import annotations

import pytest
from whole_runs import assert_same_weights, final_weights, read_rows, without_seconds

from spec_rollout.train.trainer import resume, run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
LENIENT = {"rule": "lenient"}
RATES = {"grpo": {"lr": 1e-2}, "ppo": {"lr": 1e-2, "critic_lr": 1e-2}, "dapo": {"lr": 1e-2}}


@pytest.mark.parametrize("rollout", [{"rule": "none"}, LENIENT, {"rule": "coupled"}])
@pytest.mark.parametrize("algorithm", ["grpo", "ppo", "dapo"])
def test_reward_rises(make_config, algorithm, rollout):
    config = make_config(
        train={"algorithm": algorithm, "epochs": 8, **RATES[algorithm]},
        rollout=rollout,
        eval={"num_train_prompts": 6, "num_samples": 16},
    )
    summary = run(config)
    # The share of digits: at first about that of the vocabulary. Of 96 fresh responses.
    assert summary.eval_reward_after["train"] > summary.eval_reward_before["train"] + 0.1
    reused = summary.after_first_epoch.reused_fraction
    assert reused == 0 if rollout["rule"] == "none" else reused > 0.02


@pytest.mark.parametrize("algorithm", ["ppo"])
def test_critic_and_moments_are_resumed_exactly(make_config, tmp_path, algorithm):
    def config(name, **train):
        return make_config(
            train={"algorithm": algorithm, "minibatches": 2, "critic_lr": 3e-3, **train},
            rollout=LENIENT,
            eval={"num_train_prompts": 0},
            log={"run_dir": str(tmp_path / name)},
        )

    run(config("whole"))
    run(config("part", max_steps=3))
    resume(tmp_path / "part", ["train.max_steps=none"])
    rows = [without_seconds(read_rows(tmp_path / name)) for name in ("whole", "part")]
    assert rows[0] == rows[1]
    assert_same_weights(final_weights(tmp_path / "whole"), final_weights(tmp_path / "part"))
