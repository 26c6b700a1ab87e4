"""The benchmark of rounding, as far as the demo's model goes."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench_runs import ROOT, tiny_run

for _folder in ("benchmarks", "tools"):
    sys.path.insert(0, str(ROOT / _folder))

import bench_rounding  # noqa: E402
from renderers.rounding import rounding_table  # noqa: E402

PADDED, UNROUNDED_HEAD = "embedded, padded", "embedded, padded, float32 head"


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    arguments = ["--engines", "embedded", "--group", "4", "--max-tokens", "32"]
    return tiny_run("rounding", tmp_path_factory.mktemp("rounding"), *arguments)


@pytest.mark.slow
def test_rounding_is_what_rejects_under_unchanged_weights(content: dict[str, Any]) -> None:
    rows = {(row["op"], row["dtype"]): row for row in content["rows"]}
    assert list(rows) == [
        *((name, "float32") for name in ("embedded", PADDED)),
        *((name, "bfloat16") for name in ("embedded", PADDED, UNROUNDED_HEAD)),
    ]
    for row in rows.values():
        assert [(r["rule"], r["tolerance"]) for r in row["rules"]] == [
            (name, t)
            for t in ((0.0,) if row["dtype"] == "float32" else (0.0, "auto", 0.1))
            for name in ("coupled", "lenient 0")
        ]
        for found in row["rules"]:
            assert {"unchanged", "updated"} < found.keys()
            assert 0 < found["updated"]["reused"] < 1
    for dtype in ("float32", "bfloat16"):
        row = rows["embedded", dtype]
        if row["batch_invariant"]:
            assert row["rounding"]["largest"] == 0
            for found in row["rules"]:
                assert found["unchanged"]["rejections_per_token"] == 0
                assert found["unchanged"]["same_texts"] == 1
            assert row["rules"][0]["updated"]["same_texts"] == 1
    # The demo's model is too small to round much.
    assert rows[PADDED, "float32"]["rounding"]["mean"] < 1e-5
    assert rows[PADDED, "bfloat16"]["rounding"]["mean"] < 0.1
    assert not rows[PADDED, "bfloat16"]["batch_invariant"]


def test_a_row_is_rejected_once_and_compared_with_what_is_drawn_without_a_draft() -> None:
    def rollouts(accepted: list[int], *responses: list[int]) -> Any:
        return SimpleNamespace(
            accepted_lens=torch.tensor(accepted),
            response_ids=torch.tensor([token for row in responses for token in row]),
            response_lens=torch.tensor([len(row) for row in responses]),
            stats=SimpleNamespace(rollout_seconds=1.0),
        )

    drafts = rollouts([0, 0, 0], [1, 2, 3], [4, 5], [6])
    again = rollouts([3, 1, 0], [1, 2, 3], [4, 7, 8, 9], [5, 5, 5])
    plain = rollouts([0, 0, 0], [1, 2, 3], [4, 7, 8, 9], [6])
    assert bench_rounding.outcome(again, drafts, plain) == {
        "rejections_per_token": 2 / (4 + 2),
        "reused": 4 / 10,
        "same_texts": 2 / 3,
        "seconds": 1.0,
    }


@pytest.mark.slow
def test_what_came_out_has_tables(content: dict[str, Any]) -> None:
    lines = rounding_table(content).splitlines()
    assert sum(line.startswith("| embedded") for line in lines) == 5 + 5 * 2
    assert any(
        line.startswith("| embedded | float32 | coupled | 0.00% | 100% | ") for line in lines
    )


def test_an_engine_that_does_not_run_is_named_with_its_error() -> None:
    found = {"rule": "coupled", "tolerance": 0.0}
    row = {
        "op": "vllm",
        "dtype": "bfloat16",
        "rounding": {
            "num_tokens": 1024, "mean": 0.03, "largest": 0.33,
            "quantiles": [[0.9, 0.1], [0.99, 0.2]],
        },
        "rules": [
            {**found, "unchanged": {"rejections_per_token": 0.0271, "same_texts": 0.125}},
            {**found, "tolerance": "auto"},
        ],
        "bias": {"auto": {"nats": 0.2, "most": 0.18, "coupled_mean": 0.01}},
    }  # fmt: skip
    failed = {"op": "vllm, batch-invariant", "dtype": "bfloat16", "error": "RuntimeError: no"}
    told = {"data": "words", "prompts": 8, "group": 8, "max_tokens": 96, "temperature": 0.5}
    table = rounding_table({**told, "training": {"updates": 4}, "rows": [row, failed]})
    assert "| vllm | bfloat16 | 1,024 | 0.03 | 0.1 | 0.2 | 0.33 | 18.00% | 1.00% |" in table
    assert "| vllm | bfloat16 | coupled | 2.71% / - | 12% / - | - / - | - / - |" in table
    assert table.endswith("vllm, batch-invariant, bfloat16 does not run here: `RuntimeError: no`")


def test_the_mean_of_the_bias_is_that_of_the_documented_sum() -> None:
    p = torch.tensor([0.95, 0.03, 0.02], dtype=torch.float64)
    t = 0.05
    expected = sum(k * (1 - k) * math.expm1(t) / (k + (1 - k) * math.exp(t)) for k in p.tolist())
    drawn = p.repeat_interleave(torch.tensor([95, 3, 2]))
    assert bench_rounding.mean_bias(drawn.log(), t) == pytest.approx(expected, rel=1e-9)
    assert expected == pytest.approx(0.005, rel=0.1)  # as docs/acceptance.md says
    assert bench_rounding.mean_bias(drawn.log(), 0.0) == 0
