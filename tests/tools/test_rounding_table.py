"""The table of bench_rounding.py, and the law that its numbers are read by."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch
from tiny_models import build

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks")]
rounding_table = importlib.import_module("renderers.rounding").rounding_table
bench = importlib.import_module("bench_rounding")


def test_a_line_per_engine_and_a_line_per_rule() -> None:
    rule = {
        "rule": "Coupled",
        "tolerance": 0.0,
        "nats": 0.0,
        "rejections_per_token": 0.0271,
        "reused": 0.5,
        "same_texts": 0.125,
        "reused_after_update": 0.4321,
    }
    auto = {**rule, "tolerance": "auto", "nats": 0.0625, "rejections_per_token": 0.0}
    row = {
        "op": "embedded",
        "dtype": "bfloat16",
        "seconds": {"p50": 1.5},
        "rounding": {"mean": 0.03, "largest": 0.33, "quantiles": [[0.5, 0.01], [0.99, 0.2]]},
        "rules": [rule, auto],
    }
    lines = rounding_table({"rows": [row]}).splitlines()
    assert lines[2] == "| embedded | bfloat16 | 0.03 | 0.2 | 0.33 | 1.5 s |"
    assert lines[6:] == [
        "| embedded | bfloat16 | `Coupled` | 0 | 2.71% | 50.0% | 12% | 43.2% |",
        "| embedded | bfloat16 | `Coupled` | auto: 0.062 | 0.00% | 50.0% | 12% | 43.2% |",
    ]


def test_the_head_in_float32_is_the_head_unrounded() -> None:
    model = build("llama").to(torch.bfloat16)
    hidden = torch.randn(3, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    hidden = hidden.to(torch.bfloat16)
    logits = bench.Float32Head(model.lm_head)(hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(
        logits.to(torch.bfloat16), model.lm_head(hidden), rtol=2**-7, atol=1e-3
    )
