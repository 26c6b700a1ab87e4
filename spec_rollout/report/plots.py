"""The figures of the page as inline SVG: curves against the training step.

The same quantities as figures 4 to 6 of SPEC-RL (arXiv 2509.23232).
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from spec_rollout.report.texts import cut, visible
from spec_rollout.runs.load import Run, number

# Okabe and Ito's colours: told apart with any colour vision. Eight more, less well; runs beyond the
# sixteenth share colours.
RUN_COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#e69f00",
    "#444444",
    "#b2a800",
    "#7f3c8d",
    "#6b3d12",
    "#117733",
    "#e31a5c",
    "#8fa3c4",
    "#a3d977",
    "#d9a5c7",
    "#2b2b72",
)
_LEAST_RANGE = 1e-6  # of a y axis
PART_COLOURS = {"verification": "#d55e00", "decode": "#0072b2", "other": "#bbbbbb"}
STYLE: Any = {  # matplotlib types it by a literal of all its keys
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8f98",
    "axes.labelcolor": "#3b4048",
    "xtick.color": "#5b616b",
    "ytick.color": "#5b616b",
    "axes.grid": True,
    "grid.color": "#e8eaed",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
}


@dataclass(frozen=True, slots=True)
class Panel:
    """One small figure.

    Attributes:
        key: Key of the metrics rows.
        title: Heading.
        note: What the curve means, in one sentence.
        percent: Values are fractions, shown in percent.
        smooth: Noisy per step: drawn thin, with a running mean on top.
        points: Few measured points (evaluations), marked.
    """

    key: str
    title: str
    note: str
    percent: bool = False
    smooth: bool = False
    points: bool = False


def colour(index: int) -> str:
    """Colour of the run at `index`, the same in every figure and in the legend."""
    return RUN_COLOURS[index % len(RUN_COLOURS)]


def smoothing_window(num_points: int) -> int:
    """Width of the running mean: odd, about a tenth of the run, 1 (off) for short runs."""
    return max(1, 2 * (num_points // 20) + 1)


def running_mean(values: Sequence[float], window: int) -> np.ndarray:
    """Centred mean over `window` points, over fewer at the ends. [n], float64."""
    array = np.asarray(values, dtype=np.float64)
    cumulative = np.concatenate([[0.0], np.cumsum(array)])
    index = np.arange(array.size)
    low = np.maximum(index - window // 2, 0)
    high = np.minimum(index + window // 2 + 1, array.size)
    return (cumulative[high] - cumulative[low]) / (high - low)


def new_figures(width: float, height: float, num_frames: int) -> tuple[Figure, list[Axes]]:
    """A figure of frames side by side, in inches; made and drawn within `STYLE`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, list(figure.subplots(1, num_frames, squeeze=False).flat)


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of one frame; see `new_figures`."""
    figure, (axes,) = new_figures(width, height, 1)
    return figure, axes


def svg_of(figure: Figure, salt: str) -> str:
    """The figure as an <svg> element that fits its container and shares no ids with others."""
    buffer = io.StringIO()
    style: Any = {"svg.hashsalt": salt}
    with matplotlib.rc_context(style):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    # Groups are numbered alike in every figure ("axes_1"); on one page ids must differ.
    text = re.sub(r'\bid="([^"]*)"', rf'id="{salt}-\1"', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{salt}-", text)
    # The page's font, and the size of the container (the viewBox stays).
    text = re.sub(r"font-family: [^;\"]*; ?", "", text)
    opening, rest = text.split(">", 1)
    return re.sub(r' (width|height)="[^"]*"', "", opening) + ">" + rest


def _finish(axes: Axes, percent: bool) -> None:
    low, high = axes.get_ylim()
    if high - low < _LEAST_RANGE:  # rounding noise is not a curve
        middle = (low + high) / 2
        axes.set_ylim(middle - _LEAST_RANGE / 2, middle + _LEAST_RANGE / 2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.tick_params(length=0)
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _epoch_starts(run: Run) -> list[float]:
    """Steps at which `epoch` grows."""
    steps, epochs = run.series("epoch")
    return [step for step, a, b in zip(steps[1:], epochs, epochs[1:], strict=False) if b > a]


def panel_svg(panel: Panel, runs: Sequence[Run], salt: str) -> str | None:
    """Curves of `panel.key` of all runs, or None if no run recorded it."""
    curves = [(index, *run.series(panel.key)) for index, run in enumerate(runs)]
    curves = [curve for curve in curves if curve[1]]
    if not curves:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(4.0, 2.35)
        for index, steps, values in curves:
            window = smoothing_window(len(values)) if panel.smooth else 1
            if window > 1:
                axes.plot(steps, values, color=colour(index), linewidth=0.8, alpha=0.28)
            axes.plot(
                steps,
                running_mean(values, window),
                color=colour(index),
                linewidth=1.8,
                # Every second run is dashed, so that equal curves do not hide each other.
                linestyle=(0, (4, 2)) if index % 2 else "-",
                marker="o" if panel.points or len(values) == 1 else None,
                markersize=3.5,
            )
        for step in _epoch_starts(runs[curves[0][0]]):
            axes.axvline(
                step - 0.5, color="#b9bec6", linewidth=0.8, linestyle=(0, (2, 3)), zorder=0
            )
        _finish(axes, panel.percent)
        return svg_of(figure, salt)


def seconds_parts(run: Run) -> tuple[list[float], dict[str, list[float]]]:
    """Rollout seconds of every step split into verification, decode and all the rest."""
    steps: list[float] = []
    parts: dict[str, list[float]] = {name: [] for name in PART_COLOURS}
    for index, row in enumerate(run.metrics):
        total = number(row.get("rollout_seconds"))
        if total is None:
            continue
        step = number(row.get("step"))
        verification = number(row.get("verification_seconds")) or 0.0
        decode = number(row.get("decode_seconds")) or 0.0
        steps.append(index if step is None else step)
        parts["verification"].append(verification)
        parts["decode"].append(decode)
        parts["other"].append(max(0.0, total - verification - decode))
    return steps, parts


def seconds_svg(runs: Sequence[Run], salt: str) -> str | None:
    """Stacked rollout seconds per step, one frame per run on a common scale; None without any."""
    stacks = [(run, *seconds_parts(run)) for run in runs]
    stacks = [stack for stack in stacks if stack[1]]
    if not stacks:
        return None
    columns = min(4, len(stacks))
    lines = -(-len(stacks) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(4.0, 3.05 * columns), 2.35 * lines), layout="constrained")
        FigureCanvasSVG(figure)
        grid = figure.subplots(lines, columns, sharey=True, squeeze=False)
        for axes in grid.flat[len(stacks) :]:
            axes.set_visible(False)
        for axes, (run, steps, parts) in zip(grid.flat, stacks, strict=False):
            axes.stackplot(
                steps,
                *(parts[name] for name in PART_COLOURS),
                colors=list(PART_COLOURS.values()),
                step="mid",
                linewidth=0,
            )
            axes.set_ylim(bottom=0)
            # A run's name is the user's text: never parsed as a formula.
            axes.set_title(
                cut(visible(run.name), 60),
                loc="left",
                fontsize=9,
                color="#3b4048",
                parse_math=False,
            )
            _finish(axes, percent=False)
        return svg_of(figure, salt)


def running_curve(run: Run) -> tuple[float, list[float], list[float]] | None:
    """The last step of which it is known: its number, seconds within its rollouts, requests running
    then."""
    for row in reversed(run.running):
        step = number(row.get("step"))
        columns = [row.get("seconds"), row.get("running")]
        if step is None or not all(isinstance(column, list) and column for column in columns):
            continue
        seconds, running = ([number(value) for value in column or ()] for column in columns)
        if len(seconds) == len(running) and None not in seconds + running:
            return step, [0.0, *seconds], [running[0], *running]  # type: ignore[list-item]
    return None


def running_svg(runs: Sequence[Run], salt: str) -> str | None:
    """Requests running over the seconds of the last step's rollouts, one curve per run; None
    without any."""
    curves = [(i, curve) for i, run in enumerate(runs) if (curve := running_curve(run)) is not None]
    if not curves:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(8.0, 2.6)
        for index, (_, seconds, running) in curves:
            axes.plot(
                seconds,
                running,
                color=colour(index),
                linewidth=1.6,
                linestyle=(0, (4, 2)) if index % 2 else "-",
            )
        axes.set_ylim(bottom=0)
        axes.set_xlabel("seconds since the rollouts began")
        _finish(axes, percent=False)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8))
        return svg_of(figure, salt)
