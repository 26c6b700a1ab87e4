"""TRL's own reward functions, as the trainer of this package calls them."""

from __future__ import annotations

import pytest

from spec_rollout.config.sections import RewardConfig
from spec_rollout.rewards import Rewards, Sample

trl_rewards = pytest.importorskip("trl.rewards")

HERE = __name__
MESSAGES = [{"role": "user", "content": "1/3?"}]

too_long = trl_rewards.get_soft_overlong_punishment(max_completion_len=10, soft_punish_cache=4)


def sample(response, solution, num_tokens=3):
    columns = {"solution": solution}
    return Sample("1/3?", response, solution, columns, "d:1", [1] * num_tokens, MESSAGES)


def test_functions_of_conversations():
    pytest.importorskip("math_verify")
    names = ("trl.rewards:accuracy_reward", "trl.rewards:think_format_reward", f"{HERE}:too_long")
    samples = [
        sample(r"<think>easy</think> \boxed{\frac{1}{3}}", r"$\frac{1}{3}$"),
        sample(r"\boxed{\frac{1}{2}}", r"$\frac{1}{3}$", 8),
        sample("no idea", "", 12),
    ]
    judged = Rewards(RewardConfig(names, (1.0, 0.5, 1.0)), ["solution"]).judge(samples)
    assert judged.by_function == {
        # An answer that cannot be parsed is left out.
        "accuracy_reward": [1.0, 0.0, None],
        "think_format_reward": [1.0, 0.0, 0.0],
        "too_long": [0.0, -0.5, -1.0],
    }
    assert judged.totals == [1.5, -0.5, -1.0]
