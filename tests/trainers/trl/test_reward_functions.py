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


SAMPLES = [
    sample(r"<think>easy</think> \boxed{\frac{1}{3}}", r"$\frac{1}{3}$"),
    sample(r"\boxed{\frac{1}{2}}", r"$\frac{1}{3}$", 8),
    sample("no idea", "", 12),
]


def test_functions_of_conversations_and_of_tokens():
    names = ("trl.rewards:think_format_reward", f"{HERE}:too_long")
    judged = Rewards(RewardConfig(names, (0.5, 1.0)), ["solution"]).judge(SAMPLES)
    assert judged.by_function == {
        "think_format_reward": [1.0, 0.0, 0.0],
        "too_long": [0.0, -0.5, -1.0],
    }
    assert judged.totals == [0.5, -0.5, -1.0]


def test_a_function_that_takes_a_column_and_loggers():
    pytest.importorskip("math_verify")
    judged = Rewards(RewardConfig(("trl.rewards:accuracy_reward",)), ["solution"]).judge(SAMPLES)
    # An answer that cannot be parsed is left out.
    assert judged.totals == [1.0, 0.0, None]
