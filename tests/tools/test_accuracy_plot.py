"""The picture of a grid draws the curves of its file."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
plot = importlib.import_module("accuracy_plot")
GRID = ROOT / "benchmarks" / "results" / "ablation_small" / "ablation.json"


def test_a_line_is_a_variants_curve() -> None:
    content = json.loads(GRID.read_text())
    seconds, tokens = plot.figure_of(content).axes
    both = {line.get_label(): line for line in seconds.lines}["both"]
    curve = content["variants"]["both"]["curve"]
    assert both.get_xdata().tolist() == [point[1] for point in curve]
    assert both.get_ydata().tolist() == [point[4] for point in curve]
    assert tokens.lines[-1].get_xdata().tolist() == pytest.approx([p[3] / 1000 for p in curve])


def test_a_grid_without_a_variant_is_refused() -> None:
    with pytest.raises(ValueError, match="both"):
        plot.figure_of({"variants": {name: {} for name in plot.SHOWN[:-1]}})
