"""Whole runs: reward modules beside the config file, and rewards that do what they should not."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import pytest

from spec_rollout.cli import main
from spec_rollout.config.toml import dump_config, load_config
from spec_rollout.rewards import RewardError
from spec_rollout.train.trainer import run

HERE = __name__


def exits(prompt, response, answer):
    sys.exit(0)


def moves(prompt, response, answer):
    os.chdir(tempfile.mkdtemp(prefix="reward-"))
    return float(len(response) % 3)


def of_all(prompts, responses, answers):
    return [float(len(response)) for response in responses]


def fails_sometimes(response):
    if len(response) % 2:
        raise ValueError("odd")
    return 1.0


def nothing(response):
    return None


def share_of_run(completions, trainer_state, **columns):
    share = trainer_state.global_step / trainer_state.max_steps
    return [trainer_state.epoch + share] * len(completions)


def needs_level(prompt, response, answer, level):
    return float(level)


def rows_of(run_dir):
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def test_a_reward_that_exits_is_an_error(make_config, tmp_path, capsys):
    config = make_config(reward={"functions": [f"{HERE}:exits"]}, eval={"num_train_prompts": 0})
    with pytest.raises(RewardError, match=r":exits: raised SystemExit: 0 \(prompt of .*train\.js"):
        run(config)
    # The command line says so, and its status is not that of a run that went well.
    path = tmp_path / "run.toml"
    path.write_text(dump_config(config))
    other = tmp_path / "other"
    assert main(["train", str(path), "--set", f"log.run_dir={json.dumps(str(other))}"]) == 2
    assert "raised SystemExit" in capsys.readouterr().err


def test_a_reward_that_fails_is_told_and_counted_and_the_run_goes_on(make_config, capsys):
    config = make_config(
        reward={"functions": [f"{HERE}:fails_sometimes"], "on_error": "skip"},
        train={"max_steps": 2},
        eval={"num_train_prompts": 0},
    )
    run(config)
    rows = rows_of(config.log.run_dir)
    assert len(rows) == 2
    for row in rows:
        assert 0 < row["num_failed_rewards"] == row["num_skipped_rewards"] < row["num_rollouts"]
        assert row["reward"] == 1.0
    said = [line for line in capsys.readouterr().err.splitlines() if "step 1: " in line]
    assert len(said) == 1
    assert f"{rows[0]['num_failed_rewards']} responses are left out: reward {HERE}:" in said[0]
    assert "raised ValueError: odd (prompt of " in said[0]
    assert "train.jsonl:" in said[0]


def test_an_evaluation_says_what_failed_and_replaces_no_data(make_config, capsys):
    config = make_config(
        reward={"functions": [f"{HERE}:fails_sometimes"], "on_error": "skip"},
        train={"max_steps": 1},
        eval={"num_train_prompts": 4, "num_samples": 3},
    )
    run(config)
    out = Path(config.log.run_dir) / "eval.json"
    argv = ["eval", "--run", config.log.run_dir, "--pass-at", "1,3", "--out", str(out)]
    capsys.readouterr()
    assert main(argv) == 0
    (figures,) = json.loads(out.read_text())["suites"]
    assert 0 < figures["num_failed_rewards"] == figures["num_skipped"] < 12
    assert figures["pass@3_num_problems"] < figures["num_problems"] == 4
    said = capsys.readouterr()
    note = f"note: train: {figures['num_failed_rewards']} responses are left out: reward {HERE}:"
    assert note in said.err
    assert "left out" in said.out.splitlines()[0]
    assert main([*argv[:3], "--responses", config.data.path]) == 2
    assert "--responses: expected a file of its own, got" in capsys.readouterr().err


def test_rewards_are_told_how_far_the_run_is_in_its_evaluations_too(make_config):
    config = make_config(
        reward={"functions": [f"{HERE}:share_of_run"]},
        train={"max_steps": 2},
        eval={"num_train_prompts": 2, "every_steps": 1},
    )
    run(config)
    rows = rows_of(config.log.run_dir)
    assert [row.get("reward") for row in rows] == [None, 0.0, 0.5]
    # After two steps an epoch is over.
    assert [row["eval_reward_train"] for row in rows] == [0.0, 0.5, 2.0]
    responses = Path(config.log.run_dir) / "responses.jsonl"
    assert main(["eval", "--run", config.log.run_dir, "--responses", str(responses)]) == 0
    assert {json.loads(line)["reward"] for line in responses.read_text().splitlines()} == {2.0}


def test_where_no_response_was_judged_there_is_no_reward_and_no_accuracy(make_config):
    config = make_config(
        reward={"functions": [f"{HERE}:nothing"]},
        train={"max_steps": 1},
        eval={"num_train_prompts": 2},
    )
    summary = run(config)
    start, row = rows_of(config.log.run_dir)
    for key in ("reward", "reward_std", "reward_nothing", "accuracy_train", "eval_reward_train"):
        assert row[key] is None
    assert start["accuracy_train"] is start["eval_reward_train"] is None
    assert row["num_skipped_rewards"] == row["num_rollouts"]
    assert summary.reward_last is None
    assert summary.accuracy_before == summary.accuracy_after == {}
    text = (Path(config.log.run_dir) / "summary.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["eval_reward_after"] == {}


def test_a_reward_that_changes_the_folder_moves_no_files(make_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = make_config(
        reward={"functions": [f"{HERE}:moves"]},
        train={"max_steps": 1},
        eval={"num_train_prompts": 0},
        log={"run_dir": "here"},
    )
    run(config)
    assert Path.cwd() == tmp_path
    assert (tmp_path / "here" / "checkpoints" / "step-00000001" / "model").is_dir()
    assert (tmp_path / "here" / "summary.json").is_file()


def test_means_of_each_function_are_logged(make_config):
    config = make_config(
        reward={"functions": [f"{HERE}:of_all", "exact_match"], "weights": [0.5, 4.0]},
        train={"max_steps": 2},
        eval={"num_train_prompts": 0},
    )
    run(config)
    for row in rows_of(config.log.run_dir):
        assert row["reward_of_all"] > 0
        total = 0.5 * row["reward_of_all"] + 4.0 * row["reward_exact_match"]
        assert row["reward"] == pytest.approx(total, rel=1e-12)


def test_what_a_function_takes_is_checked_before_the_model_is_loaded(make_config):
    config = make_config(
        model={"path": "no-such-model"}, reward={"functions": [f"{HERE}:needs_level"]}
    )
    with pytest.raises(ValueError, match=r":needs_level': expected .*, got 'level'"):
        run(config)


@pytest.mark.slow
def test_a_module_beside_the_config_file_is_found_and_on_resume_too(
    make_config, tmp_path, monkeypatch
):
    folder, elsewhere = tmp_path / "mine", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / "rewards_beside.py").write_text(
        "def digits(prompt, response, answer):\n"
        "    return sum(c.isdigit() for c in response) / max(1, len(response))\n"
    )
    config = make_config(
        reward={"functions": ["rewards_beside:digits"]},
        train={"max_steps": 1},
        eval={"num_train_prompts": 0},
        log={"run_dir": str(tmp_path / "run")},
    )
    (folder / "run.toml").write_text(dump_config(config))
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        assert main(["train", "../mine/run.toml"]) == 0
        kept = load_config(tmp_path / "run" / "config.toml").reward.folder
        assert kept == str(folder)
        del sys.modules["rewards_beside"]
        assert main(["train", "--resume", str(tmp_path / "run"), "--set", "train.max_steps=2"]) == 0
    finally:
        sys.modules.pop("rewards_beside", None)
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2]
