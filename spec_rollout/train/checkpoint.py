"""Resumable checkpoints: a folder per checkpoint, complete or absent."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from spec_rollout.cache import DiskStore, RolloutCache
from spec_rollout.loading.policy import no_progress_bars
from spec_rollout.train.adapter import has_adapter, merged, save_adapter
from spec_rollout.train.finite import nonfinite
from spec_rollout.train.manifest import check_complete, write_manifest
from spec_rollout.train.run_store import forget_marks, read_reference, write_reference
from spec_rollout.train.state import STATE, CheckpointError, TrainState, age_of, load_state
from spec_rollout.train.tensors import TENSORS, moments_of, restore_tensors, rng_state, save_tensors

__all__ = [
    "CheckpointError",
    "TrainState",
    "list_checkpoints",
    "load_state",
    "load_tensors",
    "save_checkpoint",
]

CACHE = "cache.bin"
MODEL = "model"
_PART = ".tmp-"


def save_checkpoint(
    root: Path,
    state: TrainState,
    *,
    model: Any,
    tokenizer: Any,
    optimizer: torch.optim.Optimizer,
    cache: RolloutCache,
    keep_last: int | None,
    store: DiskStore | None = None,
    value_head: torch.nn.Module | None = None,
    rng: Mapping[str, Any] | None = None,
) -> Path:
    """Writes `root`/step-XXXXXXXX, unless it is there already; keeps the newest `keep_last`.

    Layout: model/ (loads with `from_pretrained`; an adapter is merged into it), with an adapter
    adapter.safetensors (of peft's names), trainer.pt (optimizer, value head, random states),
    cache.bin or rollouts.json, state.json, SHA256SUMS (of all the others). Everything is written
    under a temporary name, synced, and renamed.

    Args:
        store: That holds the cached rollouts on disk, and is referred to; None copies them.
        keep_last: None removes none.
        rng: What `rng_state` gave; None takes the states of now.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: if weights or the optimizer's moments are not finite; nothing is written
            then.
    """
    final = root / state.folder_name
    if _is_complete(final):  # resumed and stopped again before anything happened
        return final
    problem = nonfinite(model.named_parameters()) or nonfinite(moments_of(optimizer))
    if problem is None and value_head is not None:
        problem = nonfinite(value_head.named_parameters())
    if problem is not None:
        raise CheckpointError(
            f"checkpoint {str(final)!r}: expected finite weights and moments, got {problem}; it is "
            "not written"
        )
    root.mkdir(parents=True, exist_ok=True)
    for left in root.glob(f"{_PART}*"):  # of a process that was killed while it wrote or removed
        shutil.rmtree(left, ignore_errors=True)
    part = root / f"{_PART}{final.name}"
    part.mkdir()
    try:
        with no_progress_bars():
            if has_adapter(model):
                # A GPU has no room for the weights a second time.
                weights = merged(model, torch.device("cpu"))
                model.save_pretrained(part / MODEL, state_dict=dict(weights))
                save_adapter(part, model)
            else:
                model.save_pretrained(part / MODEL)
        tokenizer.save_pretrained(part / MODEL)
        save_tensors(part / TENSORS, optimizer, value_head, rng or rng_state())
        if store is None:
            cache.save(part / CACHE)
        else:
            cache.flush()
            write_reference(part, store)
        (part / STATE).write_text(state.to_json(), encoding="utf-8")
        write_manifest(part)
        _sync(part)
        if final.exists():
            _remove(final)  # what was left of it: it is not complete
        os.replace(part, final)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    _sync_folder(root)
    if keep_last is not None:
        for old in list_checkpoints(root)[:-keep_last]:
            _remove(old)
    if store is not None:
        forget_marks(store, all_checkpoints(root))
    return final


def all_checkpoints(root: Path) -> list[Path]:
    """Folders that are called like checkpoints, whatever is in them, oldest first."""
    if not root.is_dir():
        return []
    ages = {path: age_of(path) for path in root.iterdir() if path.is_dir()}
    return [p for _, p in sorted((age, path) for path, age in ages.items() if age is not None)]


def list_checkpoints(root: Path) -> list[Path]:
    """Folders of complete checkpoints, oldest first; their content is not checked."""
    return [path for path in all_checkpoints(root) if _is_complete(path)]


def load_tensors(
    folder: Path,
    optimizer: torch.optim.Optimizer,
    cache: RolloutCache,
    value_head: torch.nn.Module | None = None,
) -> None:
    """Restores optimizer, value head, random states, and the cache if the checkpoint has a copy.

    The model is loaded from `folder`/model beforehand.

    Raises:
        CheckpointError: if trainer.pt is damaged or of another model.
        ValueError: if the cache file is damaged, naming the offset.
    """
    if read_reference(folder) is None:
        cache.load(folder / CACHE)
    restore_tensors(folder / TENSORS, optimizer, value_head)


def _is_complete(folder: Path) -> bool:
    try:
        check_complete(folder)
    except CheckpointError:
        return False
    return True


def _remove(folder: Path) -> None:
    """First under another name: half removed it would look like a checkpoint."""
    part = folder.with_name(f"{_PART}removed-{folder.name}")
    os.replace(folder, part)
    shutil.rmtree(part)


def _sync(folder: Path) -> None:
    """Flushes all files under a folder to the disk: a rename must not outlive the content."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every platform lets a folder be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
