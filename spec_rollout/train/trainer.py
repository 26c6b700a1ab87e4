"""Training runs: started, resumed, several in turns.

One row per step goes to metrics.jsonl: `step` (updates done), `epoch` (0-based), `reward` and the
like, all fields and ratios of `RolloutStats`, the fields of `UpdateResult`, `*_seconds`, with the
engine vllm `vllm_*`; `accuracy_train`, `accuracy_heldout`, `eval_reward_*` and `eval_seconds` where
evaluated. Row 0 is the evaluation before the first update.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from spec_rollout.config.sections import ConfigError, RunConfig
from spec_rollout.config.toml import dump_config, load_config
from spec_rollout.loading.dropped import json_lines
from spec_rollout.runs.files import CONFIG, DROPPED, check_new_run_dir, write_atomically
from spec_rollout.runs.lock import RunLock
from spec_rollout.runs.summary import RunSummary
from spec_rollout.train.components import Components, build
from spec_rollout.train.drafts import without_logprobs
from spec_rollout.train.interrupt import Aborted, StopRequest
from spec_rollout.train.launch import check_one_process
from spec_rollout.train.loop import TrainingRun
from spec_rollout.train.resume_point import check_is_run, find_resume_point
from spec_rollout.train.rows import Row
from spec_rollout.train.run_store import check_new, open_run_store
from spec_rollout.types import Rollouts


def run(
    config: RunConfig,
    *,
    on_step: Callable[[Row], None] | None = None,
    on_rollouts: Callable[[int, Rollouts], None] | None = None,
) -> RunSummary:
    """Trains from the beginning.

    Everything named in the config is loaded and checked first; only then is `log.run_dir` created.
    It receives config.toml, environment.json, metrics.jsonl, samples.jsonl, checkpoints/ and, at
    the end, summary.json.

    Args:
        config: See `RunConfig`.
        on_step: Called with each row of metrics.jsonl.
        on_rollouts: Called with the number of each step (from 1) and its rollouts, before they are
            rewarded.

    Returns:
        The summary, as in summary.json.

    Raises:
        ConfigError, DataError, ValueError: naming what was expected and what was found; nothing is
            written then.
        RunInUseError: if another process uses `log.run_dir`.
        RunInterrupted: on SIGINT, SIGTERM or SIGHUP, a `SystemExit` with code 130, 143 or 129.

    Whatever ends the run early, a checkpoint of its last whole step is written first, unless an
    update was half done: then the newest checkpoint, or the beginning, is what is left.
    """
    return run_together([Job(config, on_step, on_rollouts)])[0]


@dataclass(frozen=True, slots=True)
class Job:
    """A run to start: the arguments of `run`."""

    config: RunConfig
    on_step: Callable[[Row], None] | None = None
    on_rollouts: Callable[[int, Rollouts], None] | None = None


def run_together(jobs: Sequence[Job]) -> list[RunSummary]:
    """`run` for several runs at once, one step of each in turn.

    To compare their times: a machine that gets slower or faster meanwhile does so for all of them.
    What each run computes is what it computes alone, as long as rewards do not draw from the
    process's random generators. All models, optimizers and engines are in memory together.

    Raises:
        As `run`. An interruption leaves every run resumable; nothing is written if any config is
        refused.
    """
    check_one_process(os.environ)
    for job in jobs:
        check_new_run_dir(Path(job.config.log.run_dir))
        check_new(job.config, Path(job.config.log.run_dir))
    parts = [build(job.config) for job in jobs]
    with ExitStack() as held:
        notes = [note for components in parts for note in components.notes]
        for job in jobs:
            run_dir = Path(job.config.log.run_dir)
            run_dir.mkdir(parents=True, exist_ok=True)
            notes += _lock(run_dir, "log.run_dir", held)
            check_new_run_dir(run_dir)  # another may have been faster
        _print_notes(notes)
        runs = [
            _start(components, Path(job.config.log.run_dir), job, held)
            for job, components in zip(jobs, parts, strict=True)
        ]
        return _fit(runs)


def _lock(run_dir: Path, key: str, held: ExitStack) -> list[str]:
    """Locks a run until `held` is closed; notes for the user."""
    lock = RunLock(run_dir, key)
    held.callback(lock.release)
    return [] if lock.note is None else [lock.note]


def _start(
    parts: Components, run_dir: Path, job: Job, held: ExitStack, checkpoint: Path | None = None
) -> TrainingRun:
    """A run whose files are open until `held` is closed."""
    write_atomically(run_dir / CONFIG, dump_config(parts.config))
    if any(parts.dropped.values()):
        write_atomically(run_dir / DROPPED, json_lines(parts.dropped))
    if parts.config.rollout.cache_store != "memory":
        open_run_store(parts.config, run_dir, parts.store, checkpoint, held)
        if checkpoint is not None:
            _print_notes(without_logprobs(parts.config, parts.store))
    a_run = TrainingRun(parts.config, parts, run_dir, job.on_step, job.on_rollouts)
    held.callback(a_run.close)
    return a_run


def _print_notes(notes: Iterable[str]) -> None:
    for note in dict.fromkeys(notes):
        print(f"note: {note}", file=sys.stderr, flush=True)


def resume(
    run_dir: str | os.PathLike[str],
    overrides: Iterable[str] = (),
    *,
    on_step: Callable[[Row], None] | None = None,
    on_rollouts: Callable[[int, Rollouts], None] | None = None,
) -> RunSummary:
    """Continues an interrupted run from its newest checkpoint, as if it had not been interrupted.

    Metrics of steps after the checkpoint are dropped; those steps are done again. A checkpoint that
    is not whole, or whose metrics are lost, is passed over with a note. A run that was killed
    before its first checkpoint begins again; one that has all its steps says so, and trains nothing
    more.

    Args:
        run_dir: Folder of the run; its config.toml applies.
        overrides: "section.key=value" each, on top of it (a larger train.epochs, say). The run ends
            by train.epochs or train.max_steps, whichever gives fewer steps.
        on_step, on_rollouts: As in `run`.

    Raises:
        ConfigError, DataError, CheckpointError, RunInUseError, ValueError: as `run`; the run is
            left as it was.
    """
    check_one_process(os.environ)
    run_dir = Path(run_dir)
    check_is_run(run_dir)
    with ExitStack() as held:
        notes = _lock(run_dir, "resume", held)
        point = find_resume_point(run_dir)
        overrides = list(overrides)
        config = _resumed_config(run_dir, overrides)
        parts = build(config, point.checkpoint)
        if point.checkpoint is not None:
            notes += _said_by_checkpoint(overrides, config)
        if parts.state.step >= parts.total_steps and parts.state.pending_row is None:
            notes.append(
                f"{run_dir}: nothing is left to train: it has done {parts.state.step} steps, and "
                f"train.epochs and train.max_steps ask for {parts.total_steps}"
            )
        _print_notes([*notes, *point.notes, *parts.notes])
        point.set_aside()
        job = Job(config, on_step, on_rollouts)
        return _fit([_start(parts, run_dir, job, held, point.checkpoint)])[0]


def _resumed_config(run_dir: Path, overrides: Sequence[str]) -> RunConfig:
    """The config of a run, which stays where it is."""
    config = load_config(run_dir / CONFIG, overrides)
    if (
        "log.run_dir" in _keys(overrides)
        and Path(config.log.run_dir).resolve() != run_dir.resolve()
    ):
        raise ConfigError(
            f"log.run_dir: expected {str(run_dir)!r}, where the resumed run is, got "
            f"{config.log.run_dir!r}"
        )
    return replace(config, log=replace(config.log, run_dir=str(run_dir)))


def _keys(overrides: Iterable[str]) -> set[str]:
    return {text.partition("=")[0].strip() for text in overrides}


def _said_by_checkpoint(overrides: Iterable[str], config: RunConfig) -> list[str]:
    """Notes on keys that say where a run begins, which a checkpoint now does."""
    weights = "the weights are the checkpoint's; only the reference of a KL is loaded from there"
    if config.model.lora_rank is not None:
        weights = (
            "the adapter is the checkpoint's; the weights beneath it, the tokenizer and the "
            "reference of a KL are loaded from there"
        )
    notes = {
        "model.path": weights,
        "rollout.cache_path": "the rollouts are the checkpoint's",
    }
    return [f"{key}: {notes[key]}" for key in notes if key in _keys(overrides)]


def _fit(runs: Sequence[TrainingRun]) -> list[RunSummary]:
    """All remaining steps of the runs, one of each in turn, and their summaries.

    Whatever ends them early, their last whole steps are kept.
    """
    stop = StopRequest()
    try:
        with stop:
            try:
                unfinished = [a_run.steps(stop) for a_run in runs]
                while unfinished:
                    unfinished = [steps for steps in unfinished if next(steps, None) is not None]
            except Aborted:
                raise
            except BaseException as error:
                # Who asks a second time does not want to wait.
                if not (isinstance(error, KeyboardInterrupt) and stop.signum is not None):
                    for a_run in runs:
                        a_run.stopped(f"stopped by {type(error).__name__}", failed=True)
                raise
    except Aborted:
        assert stop.signum is not None
        raise [a_run.interrupted(stop.signum) for a_run in runs][-1] from None
    return [a_run.summary() for a_run in runs]
