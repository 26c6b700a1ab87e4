"""One run's steps: rollouts, rewards, advantages, update, weights to the engine, checkpoints."""

from __future__ import annotations

import contextlib
import json
import operator
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from spec_rollout.acceptance import Coupled, Lenient, Schedule
from spec_rollout.config.sections import RunConfig
from spec_rollout.engines.base import EngineCounters
from spec_rollout.evals.sampling import evaluate
from spec_rollout.loading.data import PromptRow
from spec_rollout.runs.environment import environment
from spec_rollout.runs.files import (
    CHECKPOINTS,
    METRICS,
    RUNNING,
    SAMPLES,
    SUMMARY,
    JsonLines,
    write_atomically,
)
from spec_rollout.runs.loggers import RunLoggers
from spec_rollout.runs.progress import progress
from spec_rollout.runs.summary import RunSummary, summarize
from spec_rollout.train.adapter import engine_weights
from spec_rollout.train.algorithms.base import AdvantageInputs
from spec_rollout.train.components import Components
from spec_rollout.train.experience import gather
from spec_rollout.train.followed import FollowedDrafts, followed_places, followed_rows
from spec_rollout.train.interrupt import RunInterrupted, StopRequest
from spec_rollout.train.keeper import CheckpointKeeper
from spec_rollout.train.rows import Row, sample_rows, step_row, thinned
from spec_rollout.train.watch import TrainingWatch
from spec_rollout.types import FinishReason, Rollouts, RolloutStats


class TrainingRun:
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
        self._keeper = CheckpointKeeper(config.checkpoint, run_dir / CHECKPOINTS, parts)
        # Optimizer steps begun when weights and moments last were those of a whole step.
        self._num_begun = parts.updater.num_begun
        self._watch = TrainingWatch(str(run_dir), parts.order.steps_per_epoch, config.rollout.rule)
        self._followed = followed_rows(parts.order, config.log.samples_per_step)
        self._step = parts.state.step
        # The row of the last step while its evaluation is still to come.
        self._pending: Row | None = parts.state.pending_row
        self._metrics = JsonLines(
            run_dir / METRICS, keep_through=parts.state.last_recorded, keep_rows=True
        )
        self._samples = JsonLines(run_dir / SAMPLES, keep_through=self._step)
        self._running = JsonLines(run_dir / RUNNING, keep_through=self._step)
        (run_dir / SUMMARY).unlink(missing_ok=True)  # of the run before it was prolonged
        self._environment = environment()
        write_atomically(
            run_dir / "environment.json", json.dumps(self._environment, indent=2) + "\n"
        )
        self._loggers = RunLoggers(config.log, run_dir, asdict(config), self._metrics.rows)

    def close(self) -> None:
        """Closes the files of the run."""
        self._loggers.close(complete=False)
        self._metrics.close()
        self._samples.close()
        self._running.close()

    def summary(self) -> RunSummary:
        """Of a run that has ended; written to summary.json."""
        self._loggers.close(complete=True)
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
            num_unlogged_rows=self._loggers.num_unlogged,
        )
        write_atomically(self._run_dir / SUMMARY, json.dumps(summary.to_dict(), indent=2) + "\n")
        return summary

    def steps(self, stop: StopRequest) -> Iterator[int]:
        """All remaining steps and the last checkpoint; gives the number of each step done."""
        with self._progress() as bar:
            self._keeper.mark()
            if self._pending is not None:
                self._finish_step(self._pending, stop, bar)
            while self._step < self._parts.total_steps:
                try:
                    row = self._train_step(stop, bar)
                finally:
                    self._parts.store.drop()  # what a step that failed has put there
                self._finish_step(row, stop, bar)
                tokens_per_second = row["num_response_tokens"] / max(row["step_seconds"], 1e-9)
                bar.set_postfix(
                    reward=f"{row['reward']:.3f}",
                    reused=f"{row['reused_fraction']:.0%}",
                    tokens_per_second=f"{tokens_per_second:.0f}",
                )
                bar.update(1)
                yield self._step
            if self._config.checkpoint.at_end:
                self._save()

    def _train_step(self, stop: StopRequest, bar: Any) -> Row:
        """One step up to and with the weight update.

        A stop request is heeded only during rollouts.
        """
        parts, config = self._parts, self._config
        start = time.perf_counter()
        epoch = parts.order.epoch_of(self._step)
        bar.set_description(f"{self._run_dir.name}: epoch {epoch} rollout")
        if parts.lenience is not None:
            parts.session.schedule = Schedule(parts.lenience.rule)

        counted: list[EngineCounters] = []  # one of each call

        def roll(rows: Sequence[PromptRow]) -> Rollouts:
            with stop.aborting(parts.engine):
                rollouts = parts.session.rollout(
                    [row.prompt_ids for row in rows],
                    config.rollout.num_samples,
                    parts.sampling,
                    step=self._step,
                    epoch=epoch,
                    user_keys=[row.user_key for row in rows],
                )
            if parts.engine.last_counters is not None:
                counted.append(parts.engine.last_counters)
            if self._on_rollouts is not None:
                self._on_rollouts(self._step + 1, rollouts)
            return rollouts

        places = followed_places(parts.order, self._step, self._followed)
        followed = FollowedDrafts(places, config.rollout.num_samples)
        with followed.listening(parts.session):
            seen = gather(parts, self._step, roll)
        scores = seen.scores
        self._watch.failed(f"step {self._step + 1}", scores.num_failed, scores.failures)
        rollouts = seen.trained
        advantage_start = time.perf_counter()
        engine: Any = parts.engine
        sleeps = config.rollout.engine == "vllm" and config.vllm.sleep
        if sleeps:
            engine.sleep()
        values = parts.updater.values(rollouts)
        trained = parts.algorithm.advantages(
            AdvantageInputs(
                seen.rewards,
                rollouts.response_lens,
                rollouts.finish_reasons == FinishReason.LENGTH,
                parts.sampling.max_tokens,
                values,
            )
        )
        self._watch.idle(bool(trained.advantages.any()))
        drafts = followed.tested(seen.rollouts, self._scored_by_policy())
        train_start = time.perf_counter()
        bar.set_description(f"{self._run_dir.name}: epoch {epoch} update")
        update = parts.updater.update(
            rollouts,
            trained,
            _trainable_rows(rollouts, seen.rewards),
            step=self._step,
            values=values,
        )
        end = time.perf_counter()
        row: Row = {
            **step_row(
                self._step + 1,
                epoch,
                seen.rollouts,
                seen.scores,
                trained,
                update,
                reduce(operator.add, counted).as_row() if counted else {},
            ),
            **seen.metrics,
            **self._lenience_row(seen.rollouts.stats),
            "reward_seconds": seen.seconds + train_start - advantage_start,
            "train_seconds": end - train_start,
            "step_seconds": end - start,
        }
        self._step_done(row)
        if sleeps:
            engine.wake_up()
        engine.update_weights(engine_weights(parts.policy.model, config.rollout.engine))
        end = time.perf_counter()
        row["train_seconds"] = end - train_start
        row["step_seconds"] = end - start
        self._watch.repeated(row)
        lenience = {key: row[key] for key in ("log_lenience",) if key in row}
        for sample in sample_rows(
            {"step": self._step, "epoch": epoch, "rule": config.rollout.rule, **lenience},
            seen.rollouts,
            seen.scores.total,
            seen.rows,
            places,
            drafts,
            parts.policy.tokenizer.decode,
        ):
            self._samples.write(sample)
        if seen.rollouts.running is not None:
            self._running.write({"step": self._step, **thinned(seen.rollouts.running)})
        return row

    def _scored_by_policy(self) -> Callable[[Rollouts], torch.Tensor] | None:
        """Log-probs of the sampling distribution by the trainer's forward pass, which knows no
        top-k and top-p."""
        sampling = self._parts.sampling
        whole = sampling.top_k == 0 and sampling.top_p == 1.0
        return self._parts.updater.logprobs if whole else None

    def _lenience_row(self, stats: RolloutStats) -> Row:
        """Lenience and tolerance of a step, and how its budget stands with the step counted in."""
        rule = self._parts.session.schedule.at(self._step)
        row: Row = {}
        if isinstance(rule, (Lenient, Coupled)):
            row["log_lenience"] = rule.log_lenience
        rounding = self._parts.session.rounding
        if rounding is not None:
            row["tolerance"] = rounding.tolerance
            row["rounding_mean"], row["rounding_largest"] = rounding.mean, rounding.largest
        controller = self._parts.lenience
        if controller is not None:
            controller.observe(stats)
            if controller.estimate is not None:
                row["lenience_estimate"] = controller.estimate
        return row

    def _step_done(self, row: Row) -> None:
        """From here on the step is not done again, whatever fails."""
        self._step += 1
        self._pending = row
        self._num_begun = self._parts.updater.num_begun
        self._parts.store.keep()
        self._keeper.mark()

    def _finish_step(self, row: Row, stop: StopRequest, bar: Any) -> None:
        """Evaluation if one is due, the metrics row, a checkpoint if one is due."""
        if self._evaluation_due():
            bar.set_description(f"{self._run_dir.name}: epoch {row['epoch']} evaluation")
            with stop.aborting(self._parts.engine):
                row.update(self._evaluate())
        if len(row) > 2:
            self._metrics.write(row)
        self._pending = None
        self._keeper.mark()
        if len(row) > 2:
            self._loggers.log(row)
        if len(row) > 2 and self._on_step is not None:
            self._on_step(row)
        if self._keeper.due(self._step):
            self._save()

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
                progress=parts.progress(self._step),
            )
            row[f"accuracy_{name}"] = result.accuracy
            row[f"eval_reward_{name}"] = result.reward
            if result.num_failed:
                row[f"eval_{name}_num_failed_rewards"] = result.num_failed
            self._watch.failed(
                f"evaluation ({name}) after step {self._step}", result.num_failed, result.failures
            )
            row.update({f"eval_{name}_{key}": mean for key, mean in result.means.items()})
            seconds += result.seconds
        return {**row, "eval_seconds": seconds}

    def _save(self) -> None:
        self._metrics.sync()  # a checkpoint must not outlive the rows it follows
        self._keeper.save(self._step, self._pending)

    def interrupted(self, signum: int) -> RunInterrupted:
        """What ends the run after a signal; its last whole step is kept."""
        message = self.stopped(f"interrupted by {signal.Signals(signum).name}", failed=False)
        return RunInterrupted(signum, message)

    def stopped(self, why: str, *, failed: bool) -> str:
        """Writes a checkpoint of the last whole step, and says on stderr how to go on.

        Args:
            why: The run ends.
            failed: By an error.

        Returns:
            What was said.
        """
        of_all = f"of {self._parts.total_steps}"
        place = f"{why} after step {self._step} {of_all}"
        kept = False
        if self._parts.updater.num_begun != self._num_begun:
            place = f"{why} in the update of step {self._step + 1} {of_all}, which is not kept"
        else:
            try:
                self._keep_last_step(prune=not failed)
                kept = True
            except Exception as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                place += f", which could not be kept ({reason})"
        command = f"spec-rollout train --resume {shlex.quote(str(self._run_dir))}"
        newest = None if kept else self._keeper.newest()
        how = "continue"
        if not kept:
            how = "begin again" if newest is None else f"continue after step {newest}"
        message = f"{place}; {how} with: {command}"
        with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
            print(message, file=sys.stderr, flush=True)
        return message

    def _keep_last_step(self, *, prune: bool) -> None:
        if self._pending is not None and len(self._pending) > 2:
            self._metrics.write(self._pending)  # replaced on resume by the row with its evaluation
        self._metrics.sync()
        self._keeper.save(self._step, self._pending, at_mark=True, prune=prune)

    def _progress(self) -> Any:
        return progress(
            self._parts.total_steps,
            "step",
            initial=self._step,
            shown=self._config.log.progress,
        )


def _trainable_rows(rollouts: Rollouts, rewards: torch.Tensor) -> list[list[int]]:
    """Rows of each group that have a reward and a finished response of at least one token."""
    usable = ~torch.isnan(rewards.flatten()) & (rollouts.response_lens > 0)
    usable &= rollouts.finish_reasons != FinishReason.ABORT
    size = rewards.shape[1]
    return [
        [row for row in range(start, start + size) if usable[row]]
        for start in range(0, rollouts.batch, size)
    ]
