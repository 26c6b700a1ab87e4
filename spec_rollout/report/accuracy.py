"""Fresh accuracy against what it cost: figures, and lines of the summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.ticker import MaxNLocator, PercentFormatter

from spec_rollout.report.plots import STYLE, colour, new_figure, svg_of
from spec_rollout.runs.efficiency import SPLITS, Point, accuracy_curve, cost_of
from spec_rollout.runs.load import Run, number

NOTE = "Plain samples of the current weights with fresh noise. What evaluation costs is left out."
COSTS = {
    "rollout_seconds": "seconds of rollouts so far",
    "generated_tokens": "generated tokens so far",
}


def curve_of(run: Run, split: str) -> list[Point]:
    """A run's evaluations; the one before training from its summary where its rows lack it."""
    before: Any = run.summary.get("accuracy_before")
    start = number(before.get(split)) if isinstance(before, Mapping) else None
    judged = run.judged_elsewhere.get(split)
    return accuracy_curve(run.metrics, split, start, judged)


def curves_of(runs: Sequence[Run]) -> tuple[str, list[list[Point]]]:
    """Curves on held-out prompts, or on training prompts where no run was evaluated on others."""
    for split in SPLITS:
        curves = [curve_of(run, split) for run in runs]
        if any(len(curve) > 1 for curve in curves):
            return split, curves
    return SPLITS[0], [[] for _ in runs]


def plain_run(runs: Sequence[Run]) -> int | None:
    """Index of the run that reuses nothing and proposes nothing; None if there is none."""
    for index, run in enumerate(runs):
        if run.summary.get("reuse") is False and run.summary.get("drafting") is False:
            return index
    return None


def reach_rows(runs: Sequence[Run]) -> list[list[str]]:
    """What each run had cost when it first reached the plain run's final accuracy: lines of a
    table, a cell per run; none without a plain run that was evaluated."""
    plain = plain_run(runs)
    _, curves = curves_of(runs)
    if plain is None or len(curves[plain]) < 2:
        return []
    target = curves[plain][-1].accuracy
    rows = []
    for cost, name, form in (
        ("rollout_seconds", "rollout seconds", ",.1f"),
        ("step_seconds", "training seconds", ",.1f"),
        ("generated_tokens", "generated tokens", ",.0f"),
    ):
        reached = [cost_of(curve, target, cost) for curve in curves]
        cells = [
            ("not reached" if curve else "\N{EN DASH}") if value is None else format(value, form)
            for value, curve in zip(reached, curves, strict=True)
        ]
        rows.append([f"{name} until {runs[plain].name}'s last accuracy ({target:.1%})", *cells])
    return rows


def accuracy_svg(runs: Sequence[Run], cost: str, salt: str) -> str | None:
    """Accuracy against a cost, a curve per run; None without any.

    Args:
        cost: Key of `COSTS`.
    """
    _, curves = curves_of(runs)
    if not any(len(curve) > 1 for curve in curves):
        return None
    plain = plain_run(runs)
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(5.6, 3.1)
        for index, curve in enumerate(curves):
            axes.plot(
                [getattr(point, cost) for point in curve],
                [point.accuracy for point in curve],
                color=colour(index),
                linewidth=1.8,
                linestyle=(0, (4, 2)) if index % 2 else "-",
                marker="o",
                markersize=3.5,
            )
        if plain is not None and curves[plain]:
            axes.axhline(curves[plain][-1].accuracy, color="#8a8f98", linewidth=0.9, zorder=0)
        axes.set_xlabel(COSTS[cost])
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.tick_params(length=0)
        return svg_of(figure, salt)
