from __future__ import annotations

from pathlib import Path

import pytest

from spec_rollout.config.sections import ConfigError
from spec_rollout.demo.preset import (
    ABLATION,
    FULL,
    FULL_RUNS,
    QUICK,
    QUICK_RUNS,
    SHORT,
    ablation_config,
    cache_off,
    demo_grid,
    judged_run,
    lossless,
    prepare,
    write_prompts,
)


def test_each_lossless_run_has_one_to_equal() -> None:
    assert (cache_off(QUICK_RUNS), lossless(QUICK_RUNS)) == ("vanilla", ["both"])
    assert (cache_off(FULL_RUNS), lossless(FULL_RUNS)) == ("coupled_off", ["coupled", "both"])
    assert cache_off({"vanilla": FULL_RUNS["vanilla"]}) is None


@pytest.mark.parametrize("runs", [QUICK_RUNS, FULL_RUNS])
def test_runs_differ_in_nothing_but_the_rule(tmp_path: Path, runs) -> None:
    configs = demo_grid(runs, tmp_path, SHORT, seed=3).configs()
    assert list(configs) == list(runs)
    first = next(iter(configs.values()))
    for name, config in configs.items():
        assert config.log.run_dir == str(tmp_path / name)
        for section in ("model", "data", "reward", "train", "checkpoint", "vllm"):
            assert getattr(config, section) == getattr(first, section)
        for key, value in runs[name].items():
            assert getattr(config.rollout, key) == value
        assert config.rollout.num_samples == SHORT.num_samples
        assert config.train.seed == 3
    judged = [name for name, config in configs.items() if config.eval.at_end]
    assert judged == [name for name in runs if name not in ("both", "coupled_off")]
    assert [name for name, config in configs.items() if config.eval.at_start] == ["vanilla"]


def test_vllm_runs_follow_each_other(tmp_path: Path) -> None:
    assert demo_grid(QUICK_RUNS, tmp_path, QUICK, 0).turns() == [["vanilla", "lenient", "both"]]
    turns = demo_grid(QUICK_RUNS, tmp_path, QUICK, 0, "vllm").turns()
    assert turns == [["vanilla"], ["lenient"], ["both"]]


def test_steps_of_each_size() -> None:
    assert [size.num_steps for size in (FULL, QUICK, SHORT)] == [8, 8, 4]


def test_earlier_runs_are_replaced_and_other_files_refused(tmp_path: Path) -> None:
    (tmp_path / "vanilla").mkdir()
    (tmp_path / "vanilla" / "config.toml").touch()
    (tmp_path / "vanilla" / "metrics.jsonl").touch()
    prepare(tmp_path, ["vanilla", "both"], SHORT)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["heldout.jsonl", "train.jsonl"]
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "mine.txt").touch()
    with pytest.raises(ValueError, match=r"--out: expected a new folder or an earlier demo"):
        prepare(tmp_path, ["vanilla", "both"], SHORT)
    assert (tmp_path / "both" / "mine.txt").exists()


def test_the_config_of_an_ablation_takes_overrides(tmp_path: Path) -> None:
    config = ablation_config(tmp_path, ["train.epochs=2", "rollout.num_samples=4"])
    assert (config.train.epochs, config.rollout.num_samples) == (2, 4)
    assert (config.data.max_rows, config.train.threads) == (ABLATION.num_prompts, 1)
    assert (config.eval.num_train_prompts, config.eval.every_steps) == (0, None)
    assert ablation_config(tmp_path).train.epochs == ABLATION.epochs
    write_prompts(tmp_path)
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) >= ABLATION.num_prompts
    assert len((tmp_path / "heldout.jsonl").read_text().splitlines()) >= ABLATION.num_heldout
    with pytest.raises(ConfigError, match=r"train\.epoch: unknown key"):
        ablation_config(tmp_path, ["train.epoch=2"])


def test_one_run_is_judged_for_all_that_equal_it() -> None:
    assert judged_run(QUICK_RUNS) == "vanilla"
    assert judged_run(FULL_RUNS) == "coupled"
    assert judged_run({"lenient": FULL_RUNS["lenient"]}) is None
