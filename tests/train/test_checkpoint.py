"""Checkpoints: complete or absent, bounded in number, exact."""

from __future__ import annotations

import random
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from checkpoint_parts import Parts

from spec_rollout.cache import RolloutCache
from spec_rollout.config.sections import TrainConfig
from spec_rollout.keys import prompt_key
from spec_rollout.train import checkpoint as module
from spec_rollout.train.checkpoint import (
    CheckpointError,
    TrainState,
    all_checkpoints,
    list_checkpoints,
    load_state,
    load_tensors,
)
from spec_rollout.train.manifest import check_complete, check_content
from spec_rollout.train.state import FORMAT_VERSION
from spec_rollout.train.update import make_optimizer


def test_training_goes_on_exactly(model_dir, tmp_path):
    torch.manual_seed(1)
    parts = Parts(model_dir, steps=3)
    parts.fill_cache()
    folder = parts.save(tmp_path, step=3, pending={"step": 3, "epoch": 0, "reward": 0.5})
    drawn = [random.random(), np.random.rand(), float(torch.rand(()))]  # noqa: NPY002
    parts.train()

    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002
    state = load_state(folder)
    assert state == TrainState(3, "abc", {"step": 3, "epoch": 0, "reward": 0.5})
    other = Parts(folder / "model")
    load_tensors(folder, other.optimizer, other.cache)
    assert [random.random(), np.random.rand(), float(torch.rand(()))] == drawn  # noqa: NPY002
    other.train()
    for (name, a), b in zip(parts.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    keys = [prompt_key([1, 2]), prompt_key([3])]
    a, b = (c.lookup(keys, [0, 0], max_tokens=9) for c in (parts.cache, other.cache))
    assert torch.equal(a.token_ids, b.token_ids)
    assert a.token_ids.numel() == 10
    assert torch.equal(a.logprobs, b.logprobs)


def test_settings_are_the_configs_not_the_checkpoints(model_dir, tmp_path):
    folder = Parts(model_dir, steps=1).save(tmp_path)
    other = Parts(folder / "model")
    other.optimizer = make_optimizer(other.model, TrainConfig(lr=0.5, betas=(0.5, 0.6)))
    load_tensors(folder, other.optimizer, other.cache)
    assert other.optimizer.param_groups[0]["lr"] == 0.5
    assert other.optimizer.param_groups[1]["betas"] == (0.5, 0.6)
    assert len(other.optimizer.state) == len(list(other.model.parameters()))


def test_only_the_newest_are_kept(model_dir, tmp_path):
    parts = Parts(model_dir)
    for step in (2, 10, 9, 11):
        parts.save(tmp_path, step=step, keep_last=3)
    parts.save(tmp_path, step=11, keep_last=3, pending={"step": 11})
    # The unevaluated one of a step is older than the evaluated one.
    names = [p.name for p in list_checkpoints(tmp_path)]
    assert names == ["step-00000010", "step-00000011-unevaluated", "step-00000011"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)


def test_a_failed_write_leaves_nothing(model_dir, tmp_path, monkeypatch):
    parts = Parts(model_dir)
    parts.save(tmp_path, step=1)

    def full_disk(_folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_sync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        parts.save(tmp_path, step=2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_leftovers_of_a_killed_writer_are_ignored_and_removed(model_dir, tmp_path):
    parts = Parts(model_dir)
    (tmp_path / ".tmp-step-00000001").mkdir(parents=True)
    (tmp_path / "step-1-notes").mkdir()
    assert list_checkpoints(tmp_path) == []
    assert list_checkpoints(tmp_path / "absent") == []
    parts.save(tmp_path, step=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-1-notes"]


@pytest.mark.parametrize("name", ["trainer.pt", "cache.bin", "state.json", "model/config.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damage_is_refused_by_name(model_dir, tmp_path, name, damage):
    parts = Parts(model_dir, steps=1)
    parts.fill_cache()
    folder = parts.save(tmp_path)
    check_complete(folder)
    check_content(folder)
    path = folder / name
    if damage == "missing":
        path.unlink()
        assert list_checkpoints(tmp_path) == []
        with pytest.raises(CheckpointError, match=f"expected {name} in it, found none"):
            check_complete(folder)
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        check_complete(folder)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        check_content(folder)


@pytest.mark.parametrize("name", ["trainer.pt", "cache.bin", "state.json"])
def test_damage_without_checksums_is_refused_by_name(model_dir, tmp_path, name):
    parts = Parts(model_dir, steps=1)
    parts.fill_cache()
    folder = parts.save(tmp_path)
    path = folder / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    def load():
        load_state(folder)
        load_tensors(folder, parts.optimizer, parts.cache)

    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load()


def test_a_half_removed_checkpoint_is_none(model_dir, tmp_path, monkeypatch):
    parts = Parts(model_dir)
    parts.save(tmp_path, step=1)
    seen = []

    def killed(folder, *args, **kwargs):
        (folder / "model" / "model.safetensors").unlink()
        seen.append([path.name for path in list_checkpoints(tmp_path)])
        raise KeyboardInterrupt

    monkeypatch.setattr(module.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        parts.save(tmp_path, step=2, keep_last=1)
    monkeypatch.undo()
    assert seen == [["step-00000002"]]
    assert [path.name for path in all_checkpoints(tmp_path)] == ["step-00000002"]
    parts.save(tmp_path, step=3, keep_last=1)  # removes what was left
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_what_is_left_of_a_checkpoint_is_replaced(model_dir, tmp_path):
    parts = Parts(model_dir)
    folder = parts.save(tmp_path)
    (folder / "cache.bin").unlink()
    assert parts.save(tmp_path) == folder
    check_content(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    (folder / "notes").touch()
    parts.save(tmp_path)  # complete: left as it is
    assert (folder / "notes").exists()


def test_incomplete_ones_do_not_count_among_those_kept(model_dir, tmp_path):
    parts = Parts(model_dir)
    for step in (1, 2, 3):
        parts.save(tmp_path, step=step, keep_last=None)
    (tmp_path / "step-00000003" / "trainer.pt").unlink()
    parts.save(tmp_path, step=4, keep_last=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000004"]


@pytest.mark.parametrize("place", ["weights", "moments"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_what_is_not_finite_is_not_written(model_dir, tmp_path, place, value):
    parts = Parts(model_dir, steps=1)
    good = parts.save(tmp_path, step=1, keep_last=1)
    name, parameter = list(parts.model.named_parameters())[3]
    tensor = parameter if place == "weights" else parts.optimizer.state[parameter]["exp_avg_sq"]
    tensor.data.view(-1)[-1] = value
    what = "NaN" if value != value else "infinity"
    named = name if place == "weights" else f"exp_avg_sq of {name}"
    with pytest.raises(
        CheckpointError,
        match=rf"step-00000002.*got {what} in {re.escape(named)} \(1 of {parameter.numel()} num",
    ):
        parts.save(tmp_path, step=2, keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    check_content(good)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs the command sha256sum")
def test_a_checkpoint_is_checked_by_the_usual_command(model_dir, tmp_path):
    folder = Parts(model_dir, steps=1).save(tmp_path)
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    checked = {line.removesuffix(": OK") for line in done.stdout.splitlines()}
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert checked == files - {"SHA256SUMS"}
    assert {"model/model.safetensors", "trainer.pt", "cache.bin", "state.json"} < checked


def test_any_bit_that_flips_is_noticed(model_dir, tmp_path):
    parts = Parts(model_dir, steps=1)
    parts.fill_cache()
    folder = parts.save(tmp_path)
    bits = random.Random(0)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for _ in range(3):
            damaged = bytearray(content)
            damaged[bits.randrange(len(content))] ^= 1 << bits.randrange(8)
            path.write_bytes(damaged)
            name = "SHA256SUMS" if path.name == "SHA256SUMS" else re.escape(str(path))
            with pytest.raises(CheckpointError, match=name):
                check_content(folder)
        path.write_bytes(content)
        check_content(folder)


def test_another_version_is_refused(model_dir, tmp_path):
    folder = Parts(model_dir).save(tmp_path)
    path = folder / "state.json"
    path.write_text(
        path.read_text().replace(f'"format_version": {FORMAT_VERSION}', '"format_version": 99')
    )
    with pytest.raises(
        CheckpointError,
        match=r"state\.json: expected format_version 3 or 4 or 5 or 6 or 7 or 8, got 99",
    ):
        load_state(folder)


def test_optimizer_of_another_model_is_refused(model_dir, tmp_path):
    folder = Parts(model_dir, steps=1).save(tmp_path)
    layer = torch.nn.Linear(2, 2)
    optimizer = make_optimizer(layer, TrainConfig())
    with pytest.raises(
        CheckpointError, match=r"trainer\.pt: expected optimizer and random states of this"
    ):
        load_tensors(folder, optimizer, RolloutCache())
