"""Bad input of a run: one error, nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest

from spec_rollout.config.sections import ConfigError
from spec_rollout.loading.data import DataError
from spec_rollout.rewards.rewards import RewardError
from spec_rollout.train.checkpoint import CheckpointError
from spec_rollout.train.trainer import resume, run

pytestmark = pytest.mark.usefixtures("one_thread")


def truncated_cache(tmp_path):
    from spec_rollout.cache import RolloutCache

    path = tmp_path / "cache.bin"
    RolloutCache().save(path)
    path.write_bytes(path.read_bytes()[:-3])
    return path


@pytest.mark.parametrize(
    ("sections", "error", "message"),
    [
        (
            {"model": {"path": "absent"}},
            ConfigError,
            r"model\.path: expected a folder .* at 'absent'",
        ),
        (
            {"model": {"reference": "absent"}, "train": {"kl_coef": 1.0}},
            ConfigError,
            r"model\.reference: ",
        ),
        ({"model": {"device": "cuda:77"}}, ConfigError, r"model\.device: expected a device"),
        ({"model": {"attention": "flex"}}, ConfigError, r"model\.attention: .*flex"),
        (
            {"data": {"path": "absent.jsonl"}},
            DataError,
            r"data: .*found nothing at 'absent\.jsonl'",
        ),
        (
            {"data": {"answer_column": "gold"}},
            DataError,
            r"train\.jsonl:1: expected a column 'gold'",
        ),
        (
            {"data": {"max_prompt_tokens": 3}},
            DataError,
            r"train\.jsonl:1: prompt: expected at most 3",
        ),
        ({"eval": {"path": "absent.jsonl"}}, DataError, r"found nothing at 'absent\.jsonl'"),
        (
            {"rollout": {"max_tokens": 125}},
            DataError,
            r"train\.jsonl:1: .*the model's 128 tokens.*= 125",
        ),
        ({"rollout": {"stop_tokens": ["<end>"]}}, ConfigError, r"rollout\.stop_tokens: .*'<end>'"),
        (
            {"rollout": {"cache_path": "absent.bin"}},
            ConfigError,
            r"rollout\.cache_path: .*found nothing",
        ),
        (
            {"train": {"algorithm": "gpro"}},
            ConfigError,
            r"of grpo, ppo, dapo, got 'gpro'; did you mean 'grpo'",
        ),
        ({"reward": {"functions": ["absent:f"]}}, ConfigError, r"reward\.functions: cannot load"),
        (
            {"rollout": {"num_samples": 1}},
            ConfigError,
            r"rollout\.num_samples: expected at least 2 with train\.algorithm = 'grpo' .*, got 1",
        ),
    ],
)
def test_nothing_is_written_for_bad_input(make_config, sections, error, message):
    config = make_config(**sections)
    with pytest.raises(error, match=message):
        run(config)
    assert not Path(config.log.run_dir).exists()


def test_a_damaged_cache_file_is_refused_and_kept(make_config, tmp_path):
    path = truncated_cache(tmp_path)
    before = path.read_bytes()
    config = make_config(rollout={"cache_path": str(path)})
    with pytest.raises(ConfigError, match=r"rollout\.cache_path: .*cache\.bin: .*byte"):
        run(config)
    assert not Path(config.log.run_dir).exists()
    assert path.read_bytes() == before


def test_a_run_dir_in_use_is_refused(make_config):
    config = make_config(train={"max_steps": 1})
    run(config)
    before = (Path(config.log.run_dir) / "metrics.jsonl").read_bytes()
    with pytest.raises(
        ConfigError, match=r"log\.run_dir: expected a new or empty folder.*--resume"
    ):
        run(config)
    assert (Path(config.log.run_dir) / "metrics.jsonl").read_bytes() == before


def test_nothing_to_resume(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"resume: expected a run with a checkpoint .* no such folder"
    ):
        resume(tmp_path / "absent")
    with pytest.raises(
        CheckpointError, match=r"resume: expected a run with a checkpoint .* got none"
    ):
        resume(tmp_path)


def test_lost_metrics_are_noticed(make_config):
    config = make_config(train={"max_steps": 3})
    run(config)
    path = Path(config.log.run_dir) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2] + lines[3:]))
    with pytest.raises(
        CheckpointError, match=r"metrics\.jsonl: expected the rows of steps 1 to 3.*got 2"
    ):
        resume(config.log.run_dir, ["train.max_steps=4"])
    assert path.read_text() == "".join(lines[:2] + lines[3:])


def test_other_data_is_not_resumed(make_config, write_rows):
    config = make_config(train={"max_steps": 1})
    run(config)
    other = write_rows([{"prompt": "9 9", "answer": "18"}], "other.jsonl")
    before = sorted((p, p.stat().st_mtime_ns) for p in Path(config.log.run_dir).rglob("*"))
    with pytest.raises(
        CheckpointError, match=r"data\.path: expected the prompts that the checkpoint"
    ):
        resume(config.log.run_dir, [f"data.path={other}", "train.max_steps=2"])
    assert sorted((p, p.stat().st_mtime_ns) for p in Path(config.log.run_dir).rglob("*")) == before


def broken_reward(prompt, response, answer):
    raise RuntimeError("no verifier")


def test_a_reward_that_raises_is_named(make_config):
    config = make_config(reward={"functions": [f"{__name__}:broken_reward"]})
    with pytest.raises(
        RewardError, match=r"broken_reward: raised RuntimeError: no verifier .*train\.jsonl:1"
    ):
        run(config)
