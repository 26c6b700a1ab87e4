"""Training runs: started, resumed, several in turns.

One row per step goes to metrics.jsonl: `step` (updates done), `epoch` (0-based), `reward` and the
like, all fields and ratios of `RolloutStats`, the fields of `UpdateResult`, `*_seconds`, with the
engine vllm `vllm_*`; `accuracy_train`, `accuracy_heldout`, `eval_reward_*` and `eval_seconds` where
evaluated. Row 0 is the evaluation before the first update.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from spec_rollout.config.sections import RunConfig
from spec_rollout.config.toml import dump_config, load_config
from spec_rollout.runs.files import (
    METRICS,
    check_new_run_dir,
    check_steps,
    write_atomically,
)
from spec_rollout.runs.summary import RunSummary
from spec_rollout.train.checkpoint import (
    CheckpointError,
    list_checkpoints,
    load_state,
)
from spec_rollout.train.components import Components, build
from spec_rollout.train.interrupt import Aborted, StopRequest
from spec_rollout.train.loop import TrainingRun
from spec_rollout.train.rows import Row
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
        RunInterrupted: on SIGINT or SIGTERM, a `SystemExit` with code 130 or 143; a checkpoint is
            written first.
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
    for job in jobs:
        check_new_run_dir(Path(job.config.log.run_dir))
    parts = [build(job.config) for job in jobs]
    _print_notes(parts)
    runs = []
    for job, components in zip(jobs, parts, strict=True):
        run_dir = Path(job.config.log.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(run_dir / "config.toml", dump_config(components.config))
        runs.append(
            TrainingRun(components.config, components, run_dir, job.on_step, job.on_rollouts)
        )
    return _fit(runs)


def _print_notes(parts: Sequence[Components]) -> None:
    for note in dict.fromkeys(note for components in parts for note in components.notes):
        print(f"note: {note}", file=sys.stderr, flush=True)


def resume(
    run_dir: str | os.PathLike[str],
    overrides: Iterable[str] = (),
    *,
    on_step: Callable[[Row], None] | None = None,
    on_rollouts: Callable[[int, Rollouts], None] | None = None,
) -> RunSummary:
    """Continues an interrupted run from its newest checkpoint, as if it had not been interrupted.

    Metrics of steps after the checkpoint are dropped; those steps are done again.

    Args:
        run_dir: Folder of the run; its config.toml applies.
        overrides: "section.key=value" each, on top of it (a larger train.max_steps, say).
        on_step, on_rollouts: As in `run`.

    Raises:
        ConfigError, DataError, CheckpointError, ValueError: as `run`; the run is left as it was.
    """
    run_dir = Path(run_dir)
    found = list_checkpoints(run_dir / "checkpoints")
    if not found:
        what = "none" if run_dir.is_dir() else "no such folder"
        raise CheckpointError(
            f"resume: expected a run with a checkpoint in {str(run_dir / 'checkpoints')!r}, got "
            f"{what}"
        )
    check_steps(run_dir / METRICS, load_state(found[-1]).num_recorded)
    config = load_config(
        run_dir / "config.toml", [*overrides, f"log.run_dir={json.dumps(str(run_dir))}"]
    )
    parts = build(config, found[-1])
    _print_notes([parts])
    write_atomically(run_dir / "config.toml", dump_config(parts.config))
    return _fit([TrainingRun(parts.config, parts, run_dir, on_step, on_rollouts)])[0]


def _fit(runs: Sequence[TrainingRun]) -> list[RunSummary]:
    """All remaining steps of the runs, one of each in turn, and their summaries."""
    stop = StopRequest()
    with ExitStack() as files:
        for a_run in runs:
            files.callback(a_run.close)
        try:
            with stop:
                unfinished = [a_run.steps(stop) for a_run in runs]
                while unfinished:
                    unfinished = [steps for steps in unfinished if next(steps, None) is not None]
        except Aborted:
            assert stop.signum is not None
            raise [a_run.interrupted(stop.signum) for a_run in runs][-1] from None
    return [a_run.summary() for a_run in runs]
