"""The training loop: prompts, rollouts, rewards, advantages, update, weights to the engine.

One row per step goes to metrics.jsonl: `step` (updates done), `epoch` (0-based), `reward` and the
like, all fields and ratios of `RolloutStats`, the fields of `UpdateResult`, `*_seconds`, with the
engine vllm `vllm_*`; `accuracy_train`, `accuracy_heldout`, `eval_reward_*` and `eval_seconds` where
evaluated. Row 0 is the evaluation before the first update.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spec_rollout.config.sections import RunConfig
from spec_rollout.config.toml import dump_config, load_config
from spec_rollout.evals.sampling import evaluate, score
from spec_rollout.loading.data import PromptRow
from spec_rollout.runs.environment import environment
from spec_rollout.runs.files import (
    METRICS,
    RUNNING,
    SAMPLES,
    SUMMARY,
    JsonLines,
    check_new_run_dir,
    check_steps,
    write_atomically,
)
from spec_rollout.runs.pieces import pieces
from spec_rollout.runs.summary import RunSummary, summarize
from spec_rollout.train.algorithms.base import AdvantageInputs
from spec_rollout.train.checkpoint import (
    CheckpointError,
    TrainState,
    list_checkpoints,
    load_state,
    save_checkpoint,
)
from spec_rollout.train.components import Components, build
from spec_rollout.train.interrupt import Aborted, RunInterrupted, StopRequest
from spec_rollout.types import FinishReason, Rollouts

Row = dict[str, Any]


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
        runs.append(_Run(components.config, components, run_dir, job.on_step, job.on_rollouts))
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
    return _fit([_Run(parts.config, parts, run_dir, on_step, on_rollouts)])[0]


def _fit(runs: Sequence[_Run]) -> list[RunSummary]:
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


class _Run:
    """One process's share of a run."""

    def __init__(
        self,
        config: RunConfig,
        parts: Components,
        run_dir: Path,
        on_step: Callable[[Row], None] | None,
        on_rollouts: Callable[[int, Rollouts], None] | None,
    ) -> None:
        self._config = config
        self._parts = parts
        self._run_dir = run_dir
        self._on_step = on_step
        self._on_rollouts = on_rollouts
        self._step = parts.state.step
        # The row of the last step while its evaluation is still to come.
        self._pending: Row | None = parts.state.pending_row
        if self._step == 0:
            self._pending = {"step": 0, "epoch": 0}
        kept = parts.state.num_recorded if self._step > 0 else -1
        self._metrics = JsonLines(run_dir / METRICS, keep_through=kept)
        self._samples = JsonLines(run_dir / SAMPLES, keep_through=self._step)
        self._running = JsonLines(run_dir / RUNNING, keep_through=self._step)
        (run_dir / SUMMARY).unlink(missing_ok=True)  # of the run before it was prolonged
        self._environment = environment()
        write_atomically(
            run_dir / "environment.json", json.dumps(self._environment, indent=2) + "\n"
        )

    def close(self) -> None:
        """Closes the files of the run."""
        self._metrics.close()
        self._samples.close()
        self._running.close()

    def summary(self) -> RunSummary:
        """Of a run that has ended; written to summary.json."""
        summary = summarize(
            self._metrics.rows,
            run_dir=str(self._run_dir),
            rule=self._config.rollout.rule,
            reuse=self._config.rollout.reuse,
            drafting=self._config.rollout.drafting,
            seed=self._config.train.seed,
            num_prompts=len(self._parts.data),
            num_dropped_prompts=self._parts.data.num_dropped,
            environment=self._environment,
        )
        write_atomically(self._run_dir / SUMMARY, json.dumps(summary.to_dict(), indent=2) + "\n")
        return summary

    def steps(self, stop: StopRequest) -> Iterator[int]:
        """All remaining steps and the last checkpoint; gives the number of each step done."""
        with self._progress() as bar:
            if self._pending is not None:
                self._finish_step(self._pending, stop, bar)
            while self._step < self._parts.total_steps:
                row = self._train_step(stop, bar)
                self._step += 1
                self._finish_step(row, stop, bar)
                bar.update(1)
                bar.set_postfix(
                    reward=f"{row['reward']:.3f}", reused=f"{row['reused_fraction']:.0%}"
                )
                yield self._step
            if self._config.checkpoint.at_end:
                self._checkpoint()

    def _train_step(self, stop: StopRequest, bar: Any) -> Row:
        """One step up to and with the weight update.

        A stop request is heeded only before rollouts are stored.
        """
        parts, config = self._parts, self._config
        start = time.perf_counter()
        epoch = parts.order.epoch_of(self._step)
        rows = [parts.data.rows[i] for i in parts.order.rows_of(self._step)]
        num_samples = config.rollout.num_samples
        bar.set_description(f"{self._run_dir.name}: epoch {epoch} rollout")
        with stop.aborting(parts.engine):
            rollouts = parts.session.rollout(
                [row.prompt_ids for row in rows],
                num_samples,
                parts.sampling,
                step=self._step,
                epoch=epoch,
                user_keys=[row.user_key for row in rows],
            )
        if self._on_rollouts is not None:
            self._on_rollouts(self._step + 1, rollouts)
        reward_start = time.perf_counter()
        scores = score(
            parts.rewards,
            parts.policy.tokenizer,
            rollouts,
            rows,
            num_samples,
            keep_special_tokens=config.reward.keep_special_tokens,
        )
        rewards = scores.total
        values = parts.updater.values(rollouts)
        trained = parts.algorithm.advantages(
            AdvantageInputs(
                rewards,
                rollouts.response_lens,
                rollouts.finish_reasons == FinishReason.LENGTH,
                parts.sampling.max_tokens,
                values,
            )
        )
        train_start = time.perf_counter()
        bar.set_description(f"{self._run_dir.name}: epoch {epoch} update")
        update = parts.updater.update(
            rollouts,
            trained,
            _trainable_rows(rollouts, rewards),
            step=self._step,
            values=values,
        )
        parts.engine.update_weights(parts.policy.model.named_parameters())
        end = time.perf_counter()
        given = rewards[~torch.isnan(rewards)]
        row: Row = {
            "step": self._step + 1,
            "epoch": epoch,
            "reward": float(given.mean()) if given.numel() else 0.0,
            "reward_std": float(given.std(correction=0)) if given.numel() else 0.0,
            **scores.means(),
            "num_skipped_rewards": rewards.numel() - given.numel(),
            **trained.metrics,
            "response_len": float(rollouts.response_lens.double().mean()),
            "truncated_fraction": float(
                (rollouts.finish_reasons == FinishReason.LENGTH).double().mean()
            ),
            **rollouts.stats.as_row(),
            **parts.engine.last_counters,
            **update.as_row(),
            "reward_seconds": train_start - reward_start,
            "train_seconds": end - train_start,
            "step_seconds": end - start,
        }
        self._write_samples(rollouts, rewards, rows)
        if rollouts.running is not None:
            self._running.write({"step": self._step + 1, **thinned(rollouts.running)})
        return row

    def _finish_step(self, row: Row, stop: StopRequest, bar: Any) -> None:
        """Evaluation if one is due, the metrics row, a checkpoint if one is due."""
        self._pending = row
        if self._evaluation_due():
            bar.set_description(f"{self._run_dir.name}: epoch {row['epoch']} evaluation")
            with stop.aborting(self._parts.engine):
                row.update(self._evaluate())
        self._pending = None
        if len(row) > 2:
            self._metrics.write(row)
            if self._on_step is not None:
                self._on_step(row)
        every = self._config.checkpoint.every_steps
        if every is not None and self._step > 0 and self._step % every == 0:
            self._checkpoint()

    def _evaluation_due(self) -> bool:
        config = self._config.eval
        if not self._parts.eval_rows:
            return False
        if self._step == 0:
            return config.at_start
        if self._step == self._parts.total_steps and config.at_end:
            return True
        return config.every_steps is not None and self._step % config.every_steps == 0

    def _evaluate(self) -> Row:
        parts, config = self._parts, self._config.eval
        row: Row = {}
        seconds = 0.0
        for name, rows in parts.eval_rows.items():
            result = evaluate(
                parts.session,
                parts.rewards,
                parts.policy.tokenizer,
                rows,
                config.num_samples,
                parts.eval_sampling,
                step=self._step,
                correct_at=config.correct_at,
                keep_special_tokens=self._config.reward.keep_special_tokens,
            )
            row[f"accuracy_{name}"] = result.accuracy
            row[f"eval_reward_{name}"] = result.reward
            seconds += result.seconds
        return {**row, "eval_seconds": seconds}

    def _write_samples(
        self, rollouts: Rollouts, rewards: torch.Tensor, rows: list[PromptRow]
    ) -> None:
        """The first response of some prompts, token by token, for the report's viewer."""
        tokenizer = self._parts.policy.tokenizer
        for index, row in enumerate(rows[: self._config.log.samples_per_step]):
            r = index * rewards.shape[1]
            span = slice(int(rollouts.cu_response_lens[r]), int(rollouts.cu_response_lens[r + 1]))
            reward = float(rewards[index, 0])
            self._samples.write(
                {
                    "step": self._step + 1,
                    "prompt": row.rendered,
                    "tokens": pieces(rollouts.response_ids[span].tolist(), tokenizer.decode),
                    "logprobs": [round(x, 4) for x in rollouts.logprobs[span].tolist()],
                    "accepted_tokens": int(rollouts.accepted_lens[r]),
                    "finish_reason": FinishReason(int(rollouts.finish_reasons[r])).name.lower(),
                    "reward": None if reward != reward else reward,
                }
            )

    def _checkpoint(self) -> Path:
        parts = self._parts
        return save_checkpoint(
            self._run_dir / "checkpoints",
            TrainState(self._step, parts.data.fingerprint, self._pending, parts.data.rendering),
            model=parts.policy.model,
            tokenizer=parts.policy.tokenizer,
            optimizer=parts.optimizer,
            cache=parts.cache,
            value_head=parts.value_head,
            keep_last=self._config.checkpoint.keep_last,
        )

    def interrupted(self, signum: int) -> RunInterrupted:
        self._checkpoint()
        if self._pending is not None and len(self._pending) > 2:
            self._metrics.write(self._pending)  # replaced on resume by the row with its evaluation
        message = (
            f"interrupted by {signal.Signals(signum).name} after step {self._step} of "
            f"{self._parts.total_steps}; "
            f"continue with: spec-rollout train --resume {self._run_dir}"
        )
        print(message, file=sys.stderr, flush=True)
        return RunInterrupted(signum, message)

    def _progress(self) -> Any:
        from tqdm import tqdm

        disable = {"auto": None, "on": False, "off": True}[self._config.log.progress]
        total, initial = self._parts.total_steps, self._step
        return tqdm(total=total, initial=initial, unit="step", disable=disable, dynamic_ncols=True)


def _trainable_rows(rollouts: Rollouts, rewards: torch.Tensor) -> list[list[int]]:
    """Rows of each group that have a reward and a finished response of at least one token."""
    usable = ~torch.isnan(rewards.flatten()) & (rollouts.response_lens > 0)
    usable &= rollouts.finish_reasons != FinishReason.ABORT
    size = rewards.shape[1]
    return [
        [row for row in range(start, start + size) if usable[row]]
        for start in range(0, rollouts.batch, size)
    ]


def thinned(running: torch.Tensor, most: int = 200) -> dict[str, list[float]]:
    """`Rollouts.running` with about `most` points, the last one kept.

    Returns:
        {"seconds": ..., "running": ...}, of equal length.
    """
    every = -(-running.shape[0] // most) if running.shape[0] else 1
    points = running.flip(0)[::every].flip(0)
    return {
        "seconds": [round(value, 4) for value in points[:, 0].tolist()],
        "running": points[:, 1].long().tolist(),
    }
