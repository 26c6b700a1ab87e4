"""The faults of docs/reliability.md, a handful of each; `make torture` tries them by the hundred."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import checkpoints
import damage
import faults
import kills
import pytest
import shared_rollouts
import together
import training
from children import Child

from spec_rollout.cache import DiskStore
from spec_rollout.config.sections import RunConfig


def unharmed(outcome: faults.Outcome) -> bool:
    return outcome.tried == outcome.survived > 0 and outcome.lost == 0


@pytest.mark.slow
def test_kills_while_storing(tmp_path: Path) -> None:
    outcome = kills.kill_while_storing(tmp_path / "store", 8)
    assert unharmed(outcome), outcome.line()


def test_kills_while_checkpointing(tmp_path: Path) -> None:
    outcome = checkpoints.kill_while_saving(tmp_path / "run", 5)
    assert unharmed(outcome), outcome.line()


def test_kills_while_compacting(tmp_path: Path) -> None:
    outcome = kills.kill_while_compacting(tmp_path / "store", 6)
    assert unharmed(outcome), outcome.line()


@pytest.mark.slow
def test_damaged_files(tmp_path: Path) -> None:
    for outcome in damage.damage(tmp_path, 6):
        assert unharmed(outcome), outcome.line()


def test_a_full_disk(tmp_path: Path) -> None:
    outcome = damage.full_disk(tmp_path, 2)
    assert unharmed(outcome), outcome.line()


def test_two_processes_on_one_store(tmp_path: Path) -> None:
    outcome = together.two_writers(tmp_path / "store", 30)
    assert unharmed(outcome), outcome.line()


def test_readers_while_it_is_compacted(tmp_path: Path) -> None:
    outcome = together.readers_while_compacting(tmp_path / "store", 20)
    assert unharmed(outcome), outcome.line()


def test_kills_while_sharing(tmp_path: Path) -> None:
    outcome = shared_rollouts.kill_while_sharing(tmp_path / "shared", 6)
    assert unharmed(outcome), outcome.line()


def test_a_full_disk_while_sharing(tmp_path: Path) -> None:
    outcome = shared_rollouts.full_folder(tmp_path / "shared", 4)
    assert unharmed(outcome), outcome.line()


def test_two_processes_share(tmp_path: Path) -> None:
    outcome = shared_rollouts.two_sharing(tmp_path / "shared", 100)
    assert unharmed(outcome), outcome.line()


def test_clocks_that_jump(tmp_path: Path) -> None:
    outcome = together.clocks_that_jump(tmp_path, 2)
    assert unharmed(outcome), outcome.line()


def test_two_runs_on_one_store(tmp_path: Path) -> None:
    outcome = together.two_runs(tmp_path / "store", 4)
    assert unharmed(outcome), outcome.line()


@pytest.mark.slow
def test_kills_while_training(tmp_path: Path) -> None:
    outcome = training.kill_while_training(tmp_path / "run", 3)
    assert unharmed(outcome), outcome.line()


def test_what_is_lost_is_counted(tmp_path: Path) -> None:
    """Of the counting itself."""
    with DiskStore(tmp_path / "store") as store:
        for step in range(5):
            faults.store_step(store, step)
        found = faults.steps_found(store)
        assert faults.num_lost(found, 4) == faults.num_lost(found, 3) == 0
        assert faults.num_lost(found, 7) > 0
        found.pop(next(iter(found)))
        assert faults.num_lost(found, 4) == 1


def a_short_run(config: RunConfig) -> None:
    folder = Path(config.log.run_dir)
    folder.mkdir()
    time.sleep(0.3)
    (folder / "metrics.jsonl").write_text('{"step": 0}\n' * 7)


@pytest.mark.parametrize(
    "fault",
    [
        kills.kill_while_storing,
        kills.kill_while_compacting,
        checkpoints.kill_while_saving,
        shared_rollouts.kill_while_sharing,
        together.two_runs,
        training.kill_while_training,
    ],
)
def test_a_process_that_crashes_by_itself_did_not_survive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[Path, int], faults.Outcome]
) -> None:
    """Of the counting itself: here by another signal than SIGKILL."""
    monkeypatch.setattr(Child, "kill", lambda self: os.kill(self.pid, signal.SIGUSR1))
    monkeypatch.setattr(training.trainer, "run", a_short_run)
    outcome = fault(tmp_path / "at", 1)
    assert (outcome.tried, outcome.survived, outcome.lost) == (1, 0, 0), outcome.line()
    assert outcome.notes == (f"try 1: 0 lost, signal {int(signal.SIGUSR1)}",)
