"""Runs whose rollouts are in a store on disk, to which checkpoints refer, or in actors."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from whole_runs import assert_same_weights, final_weights, read_rows, without_seconds

from spec_rollout.cache import DiskStore
from spec_rollout.config.sections import ConfigError
from spec_rollout.train import run_store
from spec_rollout.train.checkpoint import CheckpointError, list_checkpoints
from spec_rollout.train.trainer import resume, run

sys.path.insert(0, str(Path(__file__).parents[1] / "cache"))
from cache_samples import LocalParts

pytestmark = pytest.mark.usefixtures("one_thread")


def config_of(make_config, run_dir: Path, store: str = "disk", **rollout):
    return make_config(
        rollout={"rule": "lenient", "log_lenience": 0.5, "cache_store": store, **rollout},
        train={"epochs": 3},
        checkpoint={"every_steps": 1, "keep_last": 3},
        log={"run_dir": str(run_dir)},
    )


def checkpoints_of(run_dir: Path) -> list[Path]:
    return list_checkpoints(run_dir / "checkpoints")


@pytest.mark.slow
def test_a_store_on_disk_changes_nothing_but_the_checkpoints(make_config, tmp_path):
    rows = {}
    for store in ("memory", "disk"):
        # A bound that evicts, so that the order of use counts, too.
        run(config_of(make_config, tmp_path / store, store, cache_max_bytes=9000))
        rows[store] = without_seconds(read_rows(tmp_path / store))
    assert rows["disk"] == rows["memory"]
    assert 0 < sum(row.get("num_drafts", 0) for row in rows["disk"]) < 48
    assert_same_weights(final_weights(tmp_path / "memory"), final_weights(tmp_path / "disk"))
    for folder in checkpoints_of(tmp_path / "disk"):
        names = {path.name for path in folder.iterdir()}
        assert "rollouts.json" in names
        assert "cache.bin" not in names
    with DiskStore(tmp_path / "disk" / "rollouts", create=False) as store:
        marks = [
            json.loads((f / "rollouts.json").read_text())["mark"]
            for f in checkpoints_of(tmp_path / "disk")
        ]
        assert store.marks() == marks
    assert not (tmp_path / "disk" / "rollouts" / "run.lock").exists()


@pytest.mark.slow
@pytest.mark.parametrize("back", [1, 2])
def test_what_was_stored_after_a_checkpoint_does_not_change_what_follows_it(
    make_config, tmp_path, back
):
    """Resumed from an older checkpoint, with the store of the end: the same run again."""
    run_dir = tmp_path / "run"
    run(config_of(make_config, run_dir, cache_max_bytes=9000))
    rows, weights = without_seconds(read_rows(run_dir)), final_weights(run_dir)
    for newer in checkpoints_of(run_dir)[-back:]:
        shutil.rmtree(newer)
    moved = tmp_path / "elsewhere"
    os.rename(run_dir, moved)
    resume(moved)
    assert without_seconds(read_rows(moved)) == rows
    assert_same_weights(final_weights(moved), weights)


def lose(folder: Path) -> str:
    shutil.rmtree(folder)
    return "found no data.mdb in it"


def replace_by_another(folder: Path) -> str:
    shutil.rmtree(folder)
    DiskStore(folder).close()
    return "expected the store [0-9a-f]{32} with mark 6 at .*; got [0-9a-f]{32} with none"


def forget(folder: Path) -> str:
    with DiskStore(folder) as store:
        store.keep_marks([])
    return "with mark 6 at .*; got [0-9a-f]{32} with none"


def damage(folder: Path) -> str:
    os.truncate(folder / "data.mdb", 3 * 4096)
    return "expected a sound database, got a damaged one"


@pytest.mark.slow
@pytest.mark.parametrize("spoil", [lose, replace_by_another, forget, damage])
def test_a_checkpoint_without_its_rollouts_is_refused_and_can_go_on_without_them(
    make_config, tmp_path, spoil, capsys
):
    run_dir = tmp_path / "run"
    run(config_of(make_config, run_dir))
    message = spoil(run_dir / "rollouts")
    before = read_rows(run_dir)
    with pytest.raises(CheckpointError, match=message):
        resume(run_dir, ["train.epochs=4"])
    assert read_rows(run_dir) == before
    resume(run_dir, ["train.epochs=4", "rollout.cache_store='memory'"])
    assert "they are not reused" in capsys.readouterr().err
    assert [row["num_drafts"] for row in read_rows(run_dir)[7:]] == [0, 0]


@pytest.mark.slow
def test_a_run_with_copies_goes_on_with_a_store(make_config, tmp_path):
    run_dir = tmp_path / "run"
    run(config_of(make_config, run_dir, "memory"))
    resume(run_dir, ["train.epochs=4", "rollout.cache_store='disk'"])
    assert [row["num_drafts"] for row in read_rows(run_dir)[7:]] == [12, 12]
    assert (checkpoints_of(run_dir)[-1] / "rollouts.json").exists()


@pytest.mark.slow
def test_a_run_does_not_begin_in_anothers_store(make_config, tmp_path):
    folder = str(tmp_path / "store")
    run(config_of(make_config, tmp_path / "one", cache_folder=folder))
    with pytest.raises(
        ConfigError, match=r"cache_folder: expected an empty store .* of 24 rollouts"
    ):
        run(config_of(make_config, tmp_path / "two", cache_folder=folder))
    assert not (tmp_path / "two").exists()
    with pytest.raises(ConfigError, match="cache_folder: expected to be left out"):
        config_of(make_config, tmp_path / "two", "memory", cache_folder=folder)


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> dict[str, LocalParts]:
    """Pools by name, of parts in this process where there would be Ray actors."""
    held: dict[str, LocalParts] = {}

    def open_pool(name, *, num_actors=None, folder=None, create=True):
        assert create or name in held
        return held.setdefault(name, LocalParts(num_actors or 1))

    monkeypatch.setattr(run_store, "RayStore", open_pool)
    monkeypatch.setattr(run_store.ray_pool, "exists", held.__contains__)
    return held


@pytest.mark.slow
def test_actors_change_nothing_and_checkpoints_have_a_copy(make_config, tmp_path, pools):
    """With a bound that evicts one actor keeps what memory keeps; without, any number do."""
    for num_actors, max_bytes in ((1, 9000), (3, None)):
        rows, folder = {}, tmp_path / str(num_actors)
        given = {"cache_ray": f"runs/{num_actors}", "cache_actors": num_actors}
        for store, more in (("memory", {}), ("ray", given)):
            run(config_of(make_config, folder / store, store, cache_max_bytes=max_bytes, **more))
            rows[store] = without_seconds(read_rows(folder / store))
        assert rows["ray"] == rows["memory"]
        assert pools[f"runs/{num_actors}"].size().num_samples > 0
        assert_same_weights(final_weights(folder / "memory"), final_weights(folder / "ray"))
        assert all((path / "cache.bin").exists() for path in checkpoints_of(folder / "ray"))


@pytest.mark.slow
def test_a_run_with_actors_goes_on_from_its_checkpoint(make_config, tmp_path, pools):
    """Whatever the actors hold by then, or if they are gone."""
    run_dir = tmp_path / "run"
    given = {"cache_ray": "runs/one", "cache_actors": 2, "cache_max_bytes": 30_000}
    run(config_of(make_config, run_dir, "ray", **given))
    rows, weights = without_seconds(read_rows(run_dir)), final_weights(run_dir)
    for lose in (lambda: None, pools.clear):
        shutil.rmtree(checkpoints_of(run_dir)[-1])
        lose()
        resume(run_dir)
        assert without_seconds(read_rows(run_dir)) == rows
        assert_same_weights(final_weights(run_dir), weights)


@pytest.mark.slow
def test_a_run_does_not_begin_in_actors_that_hold_rollouts(make_config, tmp_path, pools):
    run(config_of(make_config, tmp_path / "one", "ray", cache_ray="runs/one"))
    message = r"cache_ray: expected an empty pool .* 'runs/one', got one of 24 rollouts \(spec-rollout cache stop ray:runs/one"
    with pytest.raises(ConfigError, match=message):
        run(config_of(make_config, tmp_path / "two", "ray", cache_ray="runs/one"))
    assert not (tmp_path / "two").exists()
    pools["runs/one"].evict(0)
    run(config_of(make_config, tmp_path / "two", "ray", cache_ray="runs/one"))
