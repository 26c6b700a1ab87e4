"""One process trains a run; several that a launcher starts are refused before anything is done."""

from __future__ import annotations

from pathlib import Path

import pytest

from spec_rollout.config.sections import ConfigError
from spec_rollout.train.launch import check_one_process
from spec_rollout.train.trainer import resume, run


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": "1", "RANK": "0"},
        {"WORLD_SIZE": ""},
        {"WORLD_SIZE": "many"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {"SLURM_NTASKS": "8"},  # of the job, in which one process may well be started
    ],
)
def test_one_process_passes(environment: dict[str, str]) -> None:
    check_one_process(environment)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_several_are_refused_and_told_what_to_do(name: str) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"^{name}: expected 1 or nothing .*, got '2'; start it without torchrun, .*"
        rf"`env -u {name} spec-rollout train \.\.\.`$",
    ):
        check_one_process({"RANK": "0", name: "2"})


def test_no_rank_writes_anything(make_config, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(train={"max_steps": 1})
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ConfigError, match="WORLD_SIZE: expected 1"):
            run(config)
        assert not Path(config.log.run_dir).exists()
    run(config)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE: expected 1"):
        resume(config.log.run_dir)
