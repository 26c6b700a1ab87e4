"""Rollouts joined and picked, and groups refilled."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_batching import make_rollouts
from whole_runs import assert_same_weights, final_weights, read_rows, without_seconds

from spec_rollout.config.sections import ConfigError
from spec_rollout.engines.transformers import TransformersEngine
from spec_rollout.engines.vllm.metrics import ReuseMetrics
from spec_rollout.train import components
from spec_rollout.train.experience import differing
from spec_rollout.train.merge import chosen, joined
from spec_rollout.train.trainer import resume, run
from spec_rollout.types import Rollouts

pytestmark = pytest.mark.usefixtures("one_thread")


def _rows(rollouts: Rollouts) -> list[tuple]:
    """Everything that belongs to each row."""
    rows = []
    for r in range(rollouts.batch):
        prompt = slice(*rollouts.cu_prompt_lens[r : r + 2].tolist())
        response = slice(*rollouts.cu_response_lens[r : r + 2].tolist())
        rows.append(
            (
                rollouts.prompt_ids[prompt].tolist(),
                *(
                    values[response].tolist()
                    for values in (
                        *(rollouts.response_ids, rollouts.logprobs),
                        *(rollouts.behaviour_logprobs, rollouts.ages),
                    )
                ),
                int(rollouts.accepted_lens[r]),
                int(rollouts.finish_reasons[r]),
            )
        )
    return rows


def _with_origins(rollouts: Rollouts) -> Rollouts:
    n = rollouts.response_ids.numel()
    return replace(
        rollouts,
        behaviour_logprobs=rollouts.logprobs - 1,
        ages=torch.arange(n, dtype=torch.int16),
        accepted_lens=torch.arange(rollouts.batch, dtype=torch.int32) % 2,
    )


def test_calls_are_joined_and_rows_picked() -> None:
    a = _with_origins(make_rollouts([3, 1], [4, 9], seed=1))
    b = _with_origins(make_rollouts([2, 5, 4], [1, 2, 8], seed=2))
    a.stats.num_response_tokens, b.stats.num_response_tokens = 13, 11
    both = joined([a, b])
    assert _rows(both) == _rows(a) + _rows(b)
    assert both.stats.num_response_tokens == 24
    picked = chosen(both, torch.tensor([4, 0, 2]))
    assert _rows(picked) == [_rows(both)[r] for r in (4, 0, 2)]
    assert chosen(both, torch.tensor([], dtype=torch.int64)).batch == 0
    assert joined([a]) is a
    unknown = joined([a, replace(b, behaviour_logprobs=None)])
    assert unknown.behaviour_logprobs is None
    assert unknown.ages is not None


def test_equal_rewards_do_not_differ() -> None:
    nan = math.nan
    rewards = [[1.0, 1.0, 1.0], [1.0, 0.0, 1.0], [nan, 0.0, nan], [nan] * 3, [nan, 0.0, 0.5]]
    assert differing(torch.tensor(rewards, dtype=torch.float64)).tolist() == [
        *(False, True, False, False, True)
    ]


def by_answer(prompt: str, response: str, answer: str) -> float:
    """Differs for answers below 2 only."""
    return float(len(response) % 2) if int(answer) < 2 else 1.0


def half(prompts, responses, answers) -> list[float | None]:
    """Of each prompt with an answer of 2 one response is right, of one with 3 none is judged."""
    seen: set[str] = set()
    rewards: list[float | None] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        first = prompt not in seen
        seen.add(prompt)
        rewards.append(None if answer == "3" else float(answer == "2" and first))
    return rewards


def never(prompt: str, response: str, answer: str) -> float:
    return 0.0


def _dapo(make_config, run_dir, reward="by_answer", **train):
    return make_config(
        reward={"functions": [f"{__name__}:{reward}"]},
        train={"algorithm": "dapo", "prompts_per_step": 2, **train},
        rollout={"rule": "lenient"},
        eval={"num_train_prompts": 0},
        log={"run_dir": str(run_dir)},
    )


@pytest.mark.slow
def test_groups_of_equal_rewards_are_refilled(make_config, tmp_path):
    # Answers 0, 1, 1, 2, 2, 3: three prompts may differ, three never do.
    calls: dict[int, list[int]] = {}
    config = _dapo(make_config, tmp_path / "a", refill_rounds=4)
    run(config, on_rollouts=lambda step, r: calls.setdefault(step, []).append(r.batch))
    rows = read_rows(tmp_path / "a")
    assert any(len(sizes) > 1 for sizes in calls.values())
    for row in rows:
        sizes = calls[row["step"]]
        assert len(sizes) <= 5
        assert sizes[0] == 8
        assert row["num_rollouts"] == sum(sizes)
        assert row["num_groups"] == sum(sizes) // 4
        assert row["num_refilled_prompts"] == sum(sizes[1:]) // 4
        # At most the two groups of a step are trained on, of 4 responses of at most 12 tokens each.
        num_differing = round((1 - row["zero_variance_fraction"]) * row["num_groups"])
        assert num_differing <= 2
        assert 0 < row["num_tokens"] <= 2 * 4 * 12
    off = _dapo(make_config, tmp_path / "off", refill_rounds=0)
    run(off)
    assert all(row["num_rollouts"] == 8 for row in read_rows(tmp_path / "off"))


@pytest.mark.slow
def test_where_nothing_differs_nothing_is_learned_and_the_step_ends(
    make_config, model_dir, tmp_path, capsys
):
    """Not from the penalty for length, either, which does differ."""
    train = {"refill_rounds": 2, "overlong_buffer": 12, "epochs": 7, "max_steps": 20}
    run(_dapo(make_config, tmp_path / "a", "never", **train))
    for row in read_rows(tmp_path / "a"):
        assert row["num_refilled_prompts"] == 4  # all the others of 6 prompts
        assert row["zero_variance_fraction"] == 1.0
        assert -1 < row["overlong_penalty"] < 0
        assert row["reward"] == row["num_tokens"] == row["grad_norm"] == 0
        assert row["entropy"] is row["logprob_gap"] is None
    start = load_file(model_dir / "model.safetensors")
    assert_same_weights(final_weights(tmp_path / "a"), start)
    assert "no response of the last 20 steps had an advantage" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_with_refills_is_resumed_exactly(make_config, tmp_path):
    run(_dapo(make_config, tmp_path / "whole"))
    part = _dapo(make_config, tmp_path / "part", max_steps=5)
    run(part)
    resume(tmp_path / "part", ["train.max_steps=none"])
    rows = [without_seconds(read_rows(tmp_path / name)) for name in ("whole", "part")]
    assert rows[0] == rows[1]
    assert_same_weights(final_weights(tmp_path / "whole"), final_weights(tmp_path / "part"))


def test_counters_of_the_engine_are_of_all_calls_of_a_step(make_config, tmp_path, monkeypatch):
    """All that the first call tests passes, nothing of three times as much in each other one."""
    sizes = []

    class Counting(TransformersEngine):
        def rollout(self, requests, sampling, acceptance):
            sizes.append(requests.batch)
            tested, accepted = (8, 8) if len(sizes) == 1 else (24, 0)
            self.last_counters = ReuseMetrics(
                num_tested_tokens=tested,
                tested_at=np.full(1, tested),
                accepted_at=np.full(1, accepted),
            )
            return super().rollout(requests, sampling, acceptance)

    monkeypatch.setattr(
        components, "make_engine", lambda _r, _v, _m, policy, **_: Counting(policy.model)
    )
    run(_dapo(make_config, tmp_path / "a", "never", max_steps=1, refill_rounds=2))
    assert sizes == [8, 8, 8]
    (row,) = [row for row in read_rows(tmp_path / "a") if row["step"] == 1]
    assert row["num_rollouts"] == 24
    assert row["vllm_num_tested_tokens"] == 8 + 24 + 24
    assert row["vllm_acceptance_1_16"] == 8 / (8 + 24 + 24)


@pytest.mark.parametrize("algorithm", ["grpo", "dapo", "ppo"])
def test_every_algorithm_says_how_many_groups_teach_nothing(make_config, tmp_path, algorithm):
    """Of the groups with a reward."""
    config = make_config(
        reward={"functions": [f"{__name__}:half"]},
        train={"algorithm": algorithm, "prompts_per_step": 6, "epochs": 1, "refill_rounds": 0},
        eval={"num_train_prompts": 0},
        log={"run_dir": str(tmp_path / "a")},
    )
    run(config)
    (row,) = [row for row in read_rows(tmp_path / "a") if row["step"] == 1]
    assert row["num_skipped_rewards"] == 4
    # Answers 0, 1, 1, 2, 2 and 3, the last one without a reward.
    assert row["zero_variance_fraction"] == 3 / 5
    assert "num_refilled_prompts" not in row


def test_what_dapo_refuses_is_refused_before_anything_is_written(make_config, tmp_path):
    with pytest.raises(ConfigError, match=r"train\.kl_coef: expected 0"):
        run(_dapo(make_config, tmp_path / "a", kl_coef=0.1))
    assert not (tmp_path / "a").exists()
