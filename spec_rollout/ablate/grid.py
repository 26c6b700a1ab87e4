"""Runs that differ in a few keys of one config: made from it, and trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spec_rollout.ablate.compare import ResponseLog
from spec_rollout.config.sections import RunConfig
from spec_rollout.config.toml import from_dict, to_dict
from spec_rollout.runs.summary import RunSummary
from spec_rollout.train.trainer import Job, run_together

Changes = Mapping[str, Any]
OnStep = Callable[[str, Mapping[str, Any]], None]
RESPONSES = "responses.npz"


def changed(base: RunConfig, changes: Changes) -> RunConfig:
    """`base` with other values, checked as a config file is.

    Args:
        changes: By "section.key".

    Raises:
        ConfigError: naming a key that there is not, or a value that does not fit.
    """
    tables = to_dict(base)
    for name, value in changes.items():
        section, _, key = name.partition(".")
        tables.setdefault(section, {})[key] = value
    return from_dict(tables)


@dataclass(frozen=True, slots=True)
class Grid:
    """What is compared.

    Attributes:
        base: Config of every run.
        runs: What each run changes, by its name; its folder is `out`/name.
        out: Folder of all runs.
        together: The runs take turns, step by step, so that a machine that gets slower or faster
            does so for all of them. Otherwise one follows the other.
        same_start: All runs evaluate the same weights with the same noise before training, so only
            the first one does it, for all.
    """

    base: RunConfig
    runs: Mapping[str, Changes]
    out: Path
    together: bool = True
    same_start: bool = True

    def configs(self) -> dict[str, RunConfig]:
        """The config of each run."""
        configs: dict[str, RunConfig] = {}
        for name, changes in self.runs.items():
            config = changed(self.base, {**changes, "log.run_dir": str(self.out / name)})
            if self.same_start and configs:
                config = replace(config, eval=replace(config.eval, at_start=False))
            configs[name] = config
        return configs

    def turns(self) -> list[list[str]]:
        """Names of the runs that train together, one list after the other."""
        return [list(self.runs)] if self.together else [[name] for name in self.runs]


def train_grid(grid: Grid, on_step: OnStep | None = None) -> dict[str, RunSummary]:
    """Trains all runs; the ids of each one's training rollouts are kept in responses.npz.

    Args:
        on_step: Called with a run's name and each row of its metrics.jsonl.

    Returns:
        The summary of each run, by name.

    Raises:
        As `run_together`.
    """
    responses = {name: ResponseLog() for name in grid.runs}

    def listener(name: str) -> Callable[[Mapping[str, Any]], None] | None:
        return None if on_step is None else lambda row: on_step(name, row)

    jobs = {
        name: Job(config, on_step=listener(name), on_rollouts=responses[name].add)
        for name, config in grid.configs().items()
    }
    summaries: dict[str, RunSummary] = {}
    for names in grid.turns():
        finished = run_together([jobs[name] for name in names])
        for name, summary in zip(names, finished, strict=True):
            responses[name].save(grid.out / name / RESPONSES)
            summaries[name] = summary
    if grid.same_start and summaries:
        first = next(iter(summaries.values()))
        summaries = {
            name: replace(
                summary,
                accuracy_before=first.accuracy_before,
                eval_reward_before=first.eval_reward_before,
            )
            for name, summary in summaries.items()
        }
    return summaries
