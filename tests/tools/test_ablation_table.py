"""The tables of a grid, from a made-up ablation.json."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
tables = importlib.import_module("results_tables")


def variant(share: float, speedup: float, seconds: float | None, published: Any) -> dict[str, Any]:
    return {
        "mean": {"token_share": share, "effective_speedup": speedup, "step_speedup": speedup / 1.5, "accuracy": 0.75, "later_entropy": 0.25},
        "sd": {"accuracy": 0.0125},
        "until_plain_accuracy": {"rollout_seconds": seconds, "generated_tokens": seconds and 1000.0},
        "published": published,
    }  # fmt: skip


def test_a_grid_has_a_line_per_variant(tmp_path: Path) -> None:
    plain = {"speedup": 1.0, "tokens_m": 500.0, "accuracy": 46.0}
    lenient = {"speedup": 2.0, "tokens_m": 200.0, "accuracy": 47.5}
    environment = {
        "cpu": "X", "cores": 2, "isa": [], "packages": {"torch": "2"}, "python": "3", "commit": "a" * 40,
    }  # fmt: skip
    content = {
        "command": "spec-rollout ablate demo", "date": "2026-01-02", "environment": environment,
        "variants": {
            "plain": variant(1.0, 1.0, 20.0, plain),
            "lenient_0.5": variant(0.4, 1.875, None, lenient),
            "both": variant(0.6, 1.5, 10.0, None),
        },
    }  # fmt: skip
    (tmp_path / "ablation_small").mkdir()
    (tmp_path / "ablation_small" / "ablation.json").write_text(json.dumps(content))
    lines = tables.table("ablation_small", tmp_path).splitlines()
    assert (
        "| `lenient_0.5` | 40% | **1.88x** | **1.25x** | 75.0% ± 1.2 | not reached | not reached | 2.00x, 40% | +1.5 |"
        in lines
    )
    assert "| `both` | 60% | **1.5x** | 1x | 75.0% ± 1.2 | 10.0 | 1,000 |  |  |" in lines
    assert sum(line.startswith("| `plain` |") for line in lines) == 2
    assert lines[-1].endswith("`spec-rollout ablate demo`</sub>")
    summary = tables.table("ablation_small_summary", tmp_path).splitlines()
    assert [line.split(" |")[0] for line in summary[2:5]] == [
        "| `plain`",
        "| `lenient_0.5`",
        "| `both`",
    ]
    assert (
        summary[3] == "| `lenient_0.5` | 40% | **1.88x** | **1.25x** | 75.0% ± 1.2 | not reached |"
    )
    assert summary[-1] == "<sub>X, 2 cores, torch 2, commit aaaaaaaaaa, 2026-01-02</sub>"
    assert tables.table("ablation_large", tmp_path) == "*Not measured yet.*"
