from __future__ import annotations

import json
from pathlib import Path

import pytest

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
