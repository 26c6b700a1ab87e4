"""The faults of docs/reliability.md, a handful of each; `make torture` tries them by the hundred."""

from __future__ import annotations

import time
from pathlib import Path

import checkpoints
import faults
import pytest

from spec_rollout.cache import DiskStore


def unharmed(outcome: faults.Outcome) -> bool:
    return outcome.tried == outcome.survived > 0 and outcome.lost == 0


def test_kills_while_storing(tmp_path: Path) -> None:
    outcome = faults.kill_while_storing(tmp_path / "store", 8)
    assert unharmed(outcome), outcome.line()


def test_kills_while_checkpointing(tmp_path: Path) -> None:
    outcome = checkpoints.kill_while_saving(tmp_path / "run", 5)
    assert unharmed(outcome), outcome.line()


def test_kills_while_compacting(tmp_path: Path) -> None:
    outcome = faults.kill_while_compacting(tmp_path / "store", 6)
    assert unharmed(outcome), outcome.line()


def test_damaged_files(tmp_path: Path) -> None:
    for outcome in faults.damage(tmp_path, 6):
        assert unharmed(outcome), outcome.line()


def test_a_full_disk(tmp_path: Path) -> None:
    outcome = faults.full_disk(tmp_path, 2)
    assert unharmed(outcome), outcome.line()


def test_two_processes_on_one_store(tmp_path: Path) -> None:
    outcome = faults.two_writers(tmp_path / "store", 30)
    assert unharmed(outcome), outcome.line()


def test_readers_while_it_is_compacted(tmp_path: Path) -> None:
    outcome = faults.readers_while_compacting(tmp_path / "store", 20)
    assert unharmed(outcome), outcome.line()


def test_clocks_that_jump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1e9, 4e9, 0.0, -1e9, 2e9] * 1000)
    for name in ("time", "monotonic"):
        monkeypatch.setattr(time, name, lambda: next(clock))
    with DiskStore(tmp_path / "store") as store:
        for step in range(12):
            faults.store_step(store, step)
            if step == 8:
                mark = store.mark()
        assert faults.num_lost(faults.steps_found(store), 11) == 0
        store.roll_back(mark)
        assert faults.num_lost(faults.steps_found(store), 8) == 0


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
