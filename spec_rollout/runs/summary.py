"""What a run comes to, computed from its metrics rows alone (so a resumed run's is that of the
whole run)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over steps; fields as in `RolloutStats`, seconds are wall time."""

    steps: int
    rollout_seconds: float
    verification_seconds: float
    decode_seconds: float
    train_seconds: float
    step_seconds: float
    generated_tokens: int
    response_tokens: int
    verified_tokens: int
    computed_tokens: int
    proposed_tokens: int
    accepted_proposals: int
    decode_steps: int
    max_row_steps: int
    tail_seconds: float
    reused_fraction: float
    fully_reused_fraction: float
    mean_accepted_len: float

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Totals:
        """Totals of metrics rows of training steps."""

        def total(key: str) -> Any:
            return sum(row[key] for row in rows)

        reused = total("num_reused_tokens")
        return cls(
            steps=len(rows),
            rollout_seconds=total("rollout_seconds"),
            verification_seconds=total("verification_seconds"),
            decode_seconds=total("decode_seconds"),
            train_seconds=total("train_seconds"),
            step_seconds=total("step_seconds"),
            generated_tokens=total("num_generated_tokens"),
            response_tokens=total("num_response_tokens"),
            verified_tokens=total("num_verified_tokens"),
            computed_tokens=total("num_computed_tokens"),
            proposed_tokens=total("num_proposed_tokens"),
            accepted_proposals=total("num_accepted_proposals"),
            decode_steps=total("num_decode_steps"),
            max_row_steps=total("max_row_steps"),
            tail_seconds=total("tail_seconds"),
            reused_fraction=reused / max(1, total("num_response_tokens")),
            fully_reused_fraction=total("num_fully_reused") / max(1, total("num_rollouts")),
            mean_accepted_len=reused / max(1, total("num_drafts")),
        )


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
        reward_last: Mean reward of the last step's rollouts, reused ones included.
        accuracy_before, accuracy_after: {"train": ..., "heldout": ...} by fresh plain sampling
            before the first and after the last update; what was not evaluated is left out.
        eval_reward_before, eval_reward_after: The same for the mean reward.
        eval_seconds: Sampling time of all evaluations.
        environment: Machine and versions.
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

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the fields, those of `totals` at the top level."""
        content = asdict(self)
        totals = content.pop("totals")
        return {**content, **totals}


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
        reward_last=steps[-1]["reward"] if steps else None,
        accuracy_before=_parts(first, "accuracy_"),
        accuracy_after=_parts(last, "accuracy_"),
        eval_reward_before=_parts(first, "eval_reward_"),
        eval_reward_after=_parts(last, "eval_reward_"),
        eval_seconds=sum(row.get("eval_seconds", 0.0) for row in rows),
        **facts,
    )


def _parts(row: Row, prefix: str) -> dict[str, float]:
    return {part: row[prefix + part] for part in ("train", "heldout") if prefix + part in row}
