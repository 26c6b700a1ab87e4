from __future__ import annotations

import json
from pathlib import Path

import pytest

from spec_rollout.evals.sampling import evaluate
from spec_rollout.evals.suite_run import EvalSettings, run_suite
from spec_rollout.train.components import build
from spec_rollout.train.trainer import run


def length(response: str) -> float:
    return float(len(response))


def first_is_digit(response: str) -> float | None:
    return float(response[0].isdigit()) if response else None


def never(response: str) -> None:
    return None


def test_an_evaluation_says_what_each_function_gave(make_config, write_rows) -> None:
    heldout = write_rows([{"prompt": "7 7 =?\n", "answer": "14"}], "heldout.jsonl")
    config = make_config(
        reward={
            "functions": [f"{__name__}:{name}" for name in ("length", "first_is_digit", "never")],
            "weights": [0.25, 2.0, 1.0],
        },
        train={"max_steps": 1},
        eval={"path": str(heldout)},
    )
    run(config)
    rows = [json.loads(line) for line in (Path(config.log.run_dir) / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        for part in ("train", "heldout"):
            length, digit = (
                row[f"eval_{part}_reward_{name}"] for name in ("length", "first_is_digit")
            )
            assert 0.0 < length <= 12.0
            assert 0.0 <= digit <= 1.0
            # No response is empty, so that the total is the weighted sum of the means.
            assert row[f"eval_reward_{part}"] == pytest.approx(0.25 * length + 2.0 * digit)
            assert row[f"eval_{part}_reward_never"] is None
    assert rows[0]["eval_train_reward_length"] != rows[1]["eval_train_reward_length"]


def zeros_are_right(prompt: str, response: str) -> float | None:
    """Of prompts with another number first, responses are wrong, and many are left out."""
    if prompt.startswith("0"):
        return 1.0
    return None if sum(map(ord, response)) % 3 else 0.0


def the_step(completions, trainer_state, **columns):
    return [float(trainer_state.global_step)] * len(completions)


def test_an_accuracy_is_the_pass_at_1_of_the_same_samples(make_config) -> None:
    """Also where responses were not judged: prompts weigh the same, however many of theirs were."""
    parts = build(
        make_config(reward={"functions": [f"{__name__}:zeros_are_right"]}, eval={"num_samples": 5})
    )
    rows, step = parts.eval_rows["train"], 3
    given = (parts.session, parts.rewards, parts.policy.tokenizer, rows)
    found = evaluate(*given, 5, parts.eval_sampling, step=step, correct_at=1.0)
    settings = EvalSettings(5, parts.eval_sampling, step=step)
    suite = run_suite("train", *given, settings)
    judged, correct = (sum(counts) for counts in zip(*suite.counts, strict=True))
    assert 10 < judged < 20
    estimate = suite.pass_at(1, 0.95)
    assert estimate is not None
    assert found.accuracy == estimate.value
    assert found.accuracy != correct / judged


def test_rewards_are_told_the_step_of_an_evaluation(make_config) -> None:
    parts = build(make_config(reward={"functions": [f"{__name__}:the_step"]}))
    given = (parts.session, parts.rewards, parts.policy.tokenizer, parts.eval_rows["train"])
    assert evaluate(*given, 2, parts.eval_sampling, step=3, correct_at=1.0).reward == 3.0
    rewards = []
    run_suite(
        "train",
        *given,
        EvalSettings(2, parts.eval_sampling, step=3),
        on_response=lambda row: rewards.append(row["reward"]),
    )
    assert rewards == [3.0] * 8
