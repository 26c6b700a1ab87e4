"""What a run comes to.

Computed from its metrics rows alone, so that the summary of a resumed run is that of the whole run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from spec_rollout.counters import RolloutStats
from spec_rollout.runs.load import number

Row = Mapping[str, Any]


@dataclass(slots=True)
class Totals(RolloutStats):
    """Sums over the metrics rows of training steps: all rollout counters, and the trainer's own.

    Attributes:
        steps: Training steps.
        train_seconds, step_seconds: Wall time of updates, and of whole steps.
    """

    steps: int = 0
    train_seconds: float = 0.0
    step_seconds: float = 0.0

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Totals:
        """Totals of metrics rows; a row from before a counter existed, or in which it was no
        number, counts 0 for it."""
        names = [f.name for f in fields(cls) if f.name != "steps"]
        return cls(steps=len(rows), **{n: sum(row.get(n) or 0 for row in rows) for n in names})

    def to_dict(self) -> dict[str, Any]:
        """For summary.json: by name without "num_", and the ratios."""
        values = {f.name.removeprefix("num_"): getattr(self, f.name) for f in fields(self)}
        return {**values, **self.ratios()}


@dataclass(frozen=True, slots=True)
class RunSummary:
    """Content of summary.json.

    Attributes:
        run_dir: Where the run was written.
        rule, reuse, drafting, seed: From the config.
        epochs: Epochs begun.
        num_prompts, num_dropped_prompts: Training rows used, and left out as too long.
        totals: Over all steps.
        after_first_epoch: Over the steps of the second epoch and later ones, where there are
            drafts.
        reward_last: Mean reward of the last step's rollouts, reused ones included; None if none was
            judged.
        accuracy_before, accuracy_after: {"train": ..., "heldout": ...} by fresh plain sampling
            before the first and after the last update; what was not evaluated is left out, and
            where no response was judged.
        eval_reward_before, eval_reward_after: The same for the mean reward.
        eval_seconds: Sampling time of all evaluations.
        environment: Machine and versions.
        num_unlogged_rows: Metrics rows that a logger of `log.to` did not take, by its name; those
            that took all are left out.
    """

    run_dir: str
    rule: str
    reuse: bool
    drafting: bool
    seed: int
    epochs: int
    num_prompts: int
    num_dropped_prompts: int
    totals: Totals
    after_first_epoch: Totals
    reward_last: float | None
    accuracy_before: dict[str, float]
    accuracy_after: dict[str, float]
    eval_reward_before: dict[str, float]
    eval_reward_after: dict[str, float]
    eval_seconds: float
    environment: dict[str, Any]
    num_unlogged_rows: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the fields, those of `totals` at the top level."""
        content = {f.name: getattr(self, f.name) for f in fields(self)}
        totals = content.pop("totals")
        content["after_first_epoch"] = self.after_first_epoch.to_dict()
        return {**content, **totals.to_dict()}


def summarize(rows: Sequence[Row], **facts: Any) -> RunSummary:
    """The summary of a run's metrics rows.

    Args:
        rows: Of metrics.jsonl; row 0 may hold the evaluation before the first update.
        facts: The fields of `RunSummary` that do not follow from the rows.
    """
    steps = [row for row in rows if row["step"] > 0]
    last = rows[-1] if rows else {}
    first = rows[0] if rows and rows[0]["step"] == 0 else {}
    return RunSummary(
        epochs=steps[-1]["epoch"] + 1 if steps else 0,
        totals=Totals.of(steps),
        after_first_epoch=Totals.of([row for row in steps if row["epoch"] > 0]),
        reward_last=number(steps[-1]["reward"]) if steps else None,
        accuracy_before=_parts(first, "accuracy_"),
        accuracy_after=_parts(last, "accuracy_"),
        eval_reward_before=_parts(first, "eval_reward_"),
        eval_reward_after=_parts(last, "eval_reward_"),
        eval_seconds=sum(row.get("eval_seconds", 0.0) for row in rows),
        **facts,
    )


def _parts(row: Row, prefix: str) -> dict[str, float]:
    parts = {part: number(row.get(prefix + part)) for part in ("train", "heldout")}
    return {part: value for part, value in parts.items() if value is not None}
