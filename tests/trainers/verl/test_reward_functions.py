"""verl's own reward functions, as the trainer of this package calls them."""

from __future__ import annotations

import pytest

from spec_rollout.config.sections import RewardConfig
from spec_rollout.rewards import Rewards, Sample

pytest.importorskip("verl")

COLUMNS = {
    "data_source": "openai/gsm8k",
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "18"},
    "extra_info": {"split": "train", "index": 0},
}


@pytest.mark.parametrize(
    "name",
    [
        "verl.utils.reward_score:default_compute_score",
        "verl.utils.reward_score.gsm8k:compute_score",
    ],
)
def test_functions_of_one_response(name):
    responses = ["9 * 2\n#### 18", "18", "#### 17"]
    samples = [Sample("p", text, "18", COLUMNS, "d:1") for text in responses]
    assert Rewards(RewardConfig((name,)), COLUMNS).judge(samples).totals == [1.0, 0.0, 0.0]


def test_functions_of_batches():
    name = "verl.utils.reward_score.math_batch:compute_score_batched"
    samples = [Sample("p", text, "18", COLUMNS, "d:1") for text in (r"\boxed{18}", r"\boxed{1}")]
    assert Rewards(RewardConfig((name,)), COLUMNS).judge(samples).totals == [1.0, 0.0]
