"""Accuracy against what it cost: seconds of rollouts, generated tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spec_rollout.runs.load import number

Row = Mapping[str, Any]
SPLITS = ("heldout", "train")


@dataclass(frozen=True, slots=True)
class Point:
    """An evaluation, and what training had cost until then.

    Attributes:
        step: Updates done.
        rollout_seconds, step_seconds, generated_tokens: Sums over the steps up to it.
        accuracy: Of fresh plain samples.
    """

    step: int
    rollout_seconds: float
    step_seconds: float
    generated_tokens: float
    accuracy: float


def accuracy_curve(
    rows: Sequence[Row],
    split: str = "heldout",
    before: float | None = None,
    judged: Mapping[int, float] | None = None,
) -> list[Point]:
    """The evaluations of a run, in order.

    Args:
        rows: Of metrics.jsonl.
        split: "heldout" or "train".
        before: Accuracy before the first update, where the rows do not have it: of several runs
            with the same start only one is evaluated there.
        judged: Accuracies by step of a run whose weights were the same, in the place of the rows'
            own.
    """
    points: list[Point] = []
    seconds = step_seconds = tokens = 0.0
    for row in rows:
        seconds += number(row.get("rollout_seconds")) or 0.0
        step_seconds += number(row.get("step_seconds")) or 0.0
        tokens += number(row.get("num_generated_tokens")) or 0.0
        step = number(row.get("step"))
        if step is None:
            continue
        accuracy = number(row.get(f"accuracy_{split}"))
        if judged is not None:
            accuracy = judged.get(int(step))
        if accuracy is not None:
            points.append(Point(int(step), seconds, step_seconds, tokens, accuracy))
    if before is not None and (not points or points[0].step > 0):
        points.insert(0, Point(0, 0.0, 0.0, 0.0, before))
    return points


def mean_curve(curves: Sequence[Sequence[Point]]) -> list[Point]:
    """The mean of several runs' curves, over the steps that all of them were evaluated at."""
    if not curves:
        return []
    by_step = [{point.step: point for point in curve} for curve in curves]
    names = ("rollout_seconds", "step_seconds", "generated_tokens", "accuracy")
    found = []
    for step in sorted(set.intersection(*(set(points) for points in by_step))):
        same = [points[step] for points in by_step]
        means = (sum(getattr(point, name) for point in same) / len(same) for name in names)
        found.append(Point(step, *means))
    return found


def cost_of(curve: Sequence[Point], accuracy: float, cost: str = "rollout_seconds") -> float | None:
    """What a curve had cost when it first reached an accuracy, linear between its evaluations.

    Args:
        cost: Field of `Point`.

    Returns:
        None if it never did.
    """
    for index, point in enumerate(curve):
        if point.accuracy < accuracy:
            continue
        if index == 0:
            return float(getattr(point, cost))
        last = curve[index - 1]
        share = (accuracy - last.accuracy) / (point.accuracy - last.accuracy)
        return float(getattr(last, cost) + share * (getattr(point, cost) - getattr(last, cost)))
    return None
