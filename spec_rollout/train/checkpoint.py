"""Resumable checkpoints: a folder per checkpoint, complete or absent."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spec_rollout.cache import RolloutCache
from spec_rollout.loading.policy import no_progress_bars

FORMAT_VERSION = 2
_NAME = re.compile(r"step-(\d{8})(-unevaluated)?")


class CheckpointError(ValueError):
    """A checkpoint is not usable; the message names the file, and what was expected and found."""


@dataclass(frozen=True, slots=True)
class TrainState:
    """What a checkpoint holds besides tensors.

    Attributes:
        step: Updates done. The next step's prompts follow from it.
        data_fingerprint: Of the training prompts.
        pending_row: Metrics of the last step when its evaluation was still to come, else None.
        data_rendering: Of the prompts' token ids.
    """

    step: int
    data_fingerprint: str
    pending_row: dict[str, Any] | None = None
    data_rendering: str = ""

    @property
    def num_recorded(self) -> int:
        """Steps whose metrics row was complete."""
        return max(0, self.step - 1) if self.pending_row else self.step


def save_checkpoint(
    root: Path,
    state: TrainState,
    *,
    model: Any,
    tokenizer: Any,
    optimizer: torch.optim.Optimizer,
    cache: RolloutCache,
    keep_last: int,
    value_head: torch.nn.Module | None = None,
) -> Path:
    """Writes `root`/step-XXXXXXXX, unless it is there already; keeps the newest `keep_last`.

    Layout: model/ (loads with `from_pretrained`), trainer.pt (optimizer, value head, random
    states), cache.bin, state.json. Everything is written under a temporary name, synced, and
    renamed.

    Returns:
        The checkpoint's folder.
    """
    final = root / (f"step-{state.step:08d}" + ("-unevaluated" if state.pending_row else ""))
    if final.exists():  # resumed and stopped again before anything happened
        return final
    root.mkdir(parents=True, exist_ok=True)
    for left in root.glob(".tmp-*"):  # of a process that was killed while it wrote
        shutil.rmtree(left, ignore_errors=True)
    part = root / f".tmp-{final.name}"
    part.mkdir()
    try:
        with no_progress_bars():
            model.save_pretrained(part / "model")
        tokenizer.save_pretrained(part / "model")
        tensors: dict[str, Any] = {"optimizer": optimizer.state_dict(), "rng": _rng_state()}
        if value_head is not None:
            tensors["value_head"] = value_head.state_dict()
        torch.save(tensors, part / "trainer.pt")
        cache.save(part / "cache.bin")
        content = {"format_version": FORMAT_VERSION, **asdict(state)}
        (part / "state.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        _sync(part)
        os.replace(part, final)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    _sync_folder(root)
    for old in list_checkpoints(root)[:-keep_last]:
        shutil.rmtree(old)
    return final


def list_checkpoints(root: Path) -> list[Path]:
    """Folders of complete checkpoints, oldest first."""
    if not root.is_dir():
        return []
    matches = [(_NAME.fullmatch(p.name), p) for p in root.iterdir() if p.is_dir()]
    return [p for _, _, p in sorted((int(m[1]), m[2] is None, p) for m, p in matches if m)]


def load_state(folder: Path) -> TrainState:
    """The state of a checkpoint.

    Raises:
        CheckpointError: if a file is missing or not as written.
    """
    for name in ("model", "trainer.pt", "cache.bin", "state.json"):
        if not (folder / name).exists():
            raise CheckpointError(f"checkpoint {str(folder)!r}: expected {name} in it, found none")
    path = folder / "state.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format_version"]
        state = TrainState(
            content["step"],
            content["data_fingerprint"],
            content["pending_row"],
            content.get("data_rendering", ""),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: expected the state of a checkpoint, cannot read it: {error!r}"
        ) from None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: expected format_version {FORMAT_VERSION}, got {version!r}")
    return state


def load_tensors(
    folder: Path,
    optimizer: torch.optim.Optimizer,
    cache: RolloutCache,
    value_head: torch.nn.Module | None = None,
) -> None:
    """Restores optimizer, value head, random states and cache.

    The model is loaded from `folder`/model beforehand.

    Raises:
        CheckpointError: if trainer.pt is damaged or of another model.
        ValueError: if the cache file is damaged, naming the offset.
    """
    cache.load(folder / "cache.bin")
    path = folder / "trainer.pt"
    device = optimizer.param_groups[0]["params"][0].device
    settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        optimizer.load_state_dict(content["optimizer"])
        if value_head is not None:
            value_head.load_state_dict(content["value_head"])
        _set_rng_state(content["rng"])
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"{path}: expected optimizer and random states of this model, cannot restore them: "
            f"{type(error).__name__}: {reason}"
        ) from error
    # Learning rate, betas and so on are the config's, which may have been overridden.
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)


def _rng_state() -> dict[str, Any]:
    # Rewards may use NumPy's global generator.
    legacy: Any = np.random.get_state(legacy=True)  # noqa: NPY002
    name, keys, position, has_gauss, cached = legacy
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_rng_state(state: Mapping[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    keys = keys.cpu().numpy().astype(np.uint32)
    np.random.set_state((name, keys, *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


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
