"""The store of a run that is not in its memory: opened, brought to the state of a checkpoint.

A checkpoint refers to a store on disk by a mark of it; of one in Ray actors it has a copy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path

from spec_rollout.cache import DiskStore, RayStore, ray_pool
from spec_rollout.config.sections import ConfigError, RunConfig
from spec_rollout.runs.lock import RunLock
from spec_rollout.train.state import CheckpointError
from spec_rollout.train.step_store import StepStore

REFERENCE = "rollouts.json"
_FOLDER = "rollouts"
_IDENTITY = re.compile(r"[0-9a-f]{32}")


def folder_of(config: RunConfig, run_dir: Path) -> Path:
    """Where a run's disk store is."""
    given = config.rollout.cache_folder
    return run_dir / _FOLDER if given is None else Path(given)


def write_reference(folder: Path, store: DiskStore) -> None:
    """Marks a store, and writes rollouts.json of a checkpoint, which says where it stands."""
    content = {"store": store.identity, "mark": store.mark()}
    (folder / REFERENCE).write_text(json.dumps(content) + "\n", encoding="utf-8")


def read_reference(checkpoint: Path) -> tuple[str, int] | None:
    """Identity and mark of the store that a checkpoint refers to; None if it has a file instead.

    Raises:
        CheckpointError: if rollouts.json is not as it is written.
    """
    path = checkpoint / REFERENCE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        store, mark = content["store"], content["mark"]
        if type(mark) is int and mark > 0 and _IDENTITY.fullmatch(store):
            return store, mark
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise CheckpointError(f"{path}: expected the identity of a store and a mark of it, got others")


def forget_marks(store: DiskStore, checkpoints: Iterable[Path]) -> None:
    """Lets go of all states of a store but those that checkpoints refer to."""
    marks = []
    for checkpoint in checkpoints:
        with suppress(CheckpointError):  # nobody can go on from that one
            reference = read_reference(checkpoint)
            if reference is not None and reference[0] == store.identity:
                marks.append(reference[1])
    store.keep_marks(marks)


def check_new(config: RunConfig, run_dir: Path) -> None:
    """ConfigError if a run that begins would find rollouts in its store."""
    if config.rollout.cache_store == "ray":
        _check_new_pool(config.rollout.cache_ray or "")
        return
    folder = folder_of(config, run_dir)
    if config.rollout.cache_store != "disk" or not (folder / "data.mdb").exists():
        return
    with DiskStore(folder, create=False) as store:
        num_samples = store.size().num_samples
    if num_samples:
        raise ConfigError(
            f"rollout.cache_folder: expected an empty store or none at {str(folder)!r}, got one of "
            f"{num_samples} rollouts (rollout.cache_path begins with those of a file)"
        )


def _check_new_pool(name: str) -> None:
    num_samples = RayStore(name, create=False).size().num_samples if ray_pool.exists(name) else 0
    if num_samples:
        raise ConfigError(
            f"rollout.cache_ray: expected an empty pool of actors or none called {name!r}, got one "
            f"of {num_samples} rollouts (spec-rollout cache stop ray:{name} ends it; "
            "rollout.cache_path begins with those of a file)"
        )


def check_resumable(config: RunConfig, run_dir: Path, checkpoint: Path) -> tuple[str, ...]:
    """Notes on a checkpoint that refers to a store; changes nothing.

    Raises:
        CheckpointError: if the state that it refers to cannot be brought back.
    """
    reference = read_reference(checkpoint)
    if reference is None:
        return ()
    if config.rollout.cache_store != "disk":
        return (
            "rollout.cache_store: the rollouts so far are in a store on disk; they are not reused",
        )
    folder, (identity, mark) = folder_of(config, run_dir), reference
    without = "--set rollout.cache_store=memory goes on without them"
    try:
        with DiskStore(folder, create=False) as store:
            found, marks = store.identity, store.marks()
    except OSError as error:
        raise CheckpointError(f"rollout.cache_store: {error} ({without})") from error
    if found != identity or mark not in marks:
        raise CheckpointError(
            f"rollout.cache_store: expected the store {identity} with mark {mark} at "
            f"{str(folder)!r}, to which {str(checkpoint)!r} refers; got {found} with "
            f"{marks or 'none'} ({without})"
        )
    return ()


def open_run_store(
    config: RunConfig,
    run_dir: Path,
    steps: StepStore,
    checkpoint: Path | None,
    held: ExitStack,
) -> None:
    """Moves a run's rollouts to its store, as they were at the checkpoint.

    Args:
        steps: Holds what the run begins with, in memory.
        checkpoint: That the run goes on from; None if it begins, or begins again.
        held: Closes the store.
    """
    max_bytes = config.rollout.cache_max_bytes
    if config.rollout.cache_store == "ray":
        pool = _pool_of(config)
        pool.replace_all(steps.iterate(), max_bytes)
        steps.inner = pool
    else:
        folder = folder_of(config, run_dir)
        store = DiskStore(folder)
        held.callback(store.close)
        held.callback(RunLock(folder, "rollout.cache_folder").release)
        reference = None if checkpoint is None else read_reference(checkpoint)
        if reference is not None:
            store.roll_back(reference[1])
        else:
            store.keep_marks([])
            store.replace_all(steps.iterate(), max_bytes)
        steps.inner = store
    if steps.writer is not None:
        held.callback(steps.writer.close)


def _pool_of(config: RunConfig) -> RayStore:
    rollout = config.rollout
    assert rollout.cache_ray is not None  # `RolloutConfig` sees to it
    return RayStore(rollout.cache_ray, num_actors=rollout.cache_actors, folder=rollout.cache_folder)
