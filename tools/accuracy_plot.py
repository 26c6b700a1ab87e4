"""Makes docs/accuracy.png of a grid: fresh accuracy against what it cost.

    python tools/accuracy_plot.py benchmarks/results/ablation_small/ablation.json

Curves are means over the seeds, of the variants that a user chooses between.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from spec_rollout.report.plots import colour

ROOT = Path(__file__).resolve().parents[1]
SHOWN = ("plain", "lenient_0.2", "lenient_0.5", "drafting", "coupled", "both")
COSTS = {1: "seconds of rollouts so far", 3: "generated tokens so far, thousands"}
SCALE = {1: 1.0, 3: 1e-3}


def figure_of(content: Mapping[str, Any]) -> Figure:
    """Two plots, a line per variant; a point of a curve is [step, rollout seconds, step seconds,
    generated tokens, accuracy].

    Raises:
        ValueError: a grid without one of the variants.
    """
    missing = [name for name in SHOWN if name not in content["variants"]]
    if missing:
        raise ValueError(f"expected a grid with the variants {', '.join(SHOWN)}, {missing} missing")
    figure = Figure(figsize=(9.6, 3.1), layout="constrained")
    for axes, (column, label) in zip(
        figure.subplots(1, 2, sharey=True), COSTS.items(), strict=True
    ):
        axes.axhline(content["plain_accuracy"], color="0.7", linewidth=1)
        for index, name in enumerate(SHOWN):
            curve = content["variants"][name]["curve"]
            axes.plot(
                [SCALE[column] * point[column] for point in curve],
                [point[4] for point in curve],
                marker="o",
                markersize=3,
                linestyle="--" if name == "drafting" else "-",
                color=colour(index),
                label=name,
            )
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    axes = figure.axes[0]
    axes.set_ylabel("held-out accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    figure.axes[1].legend(frameon=False, fontsize="small")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the picture."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("grid", type=Path, help="ablation.json")
    options.add_argument("--out", type=Path, default=ROOT / "docs" / "accuracy.png")
    args = options.parse_args(argv)
    figure_of(json.loads(args.grid.read_text())).savefig(args.out, dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main())
