"""The benchmark of rounding on vLLM, as far as the demo's model goes."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench_runs import tiny_run


@pytest.mark.slow
def test_every_rule_and_tolerance_is_measured_on_vllm(vllm_installed: None, tmp_path: Path) -> None:
    arguments = ["--engines", "vllm", "--dtypes", "float32", "--group", "4", "--max-tokens", "16"]
    (row,) = tiny_run("rounding", tmp_path, *arguments)["rows"]
    assert (row["op"], row["dtype"]) == ("vllm", "float32")
    assert row["rounding"]["largest"] < 1e-4
    assert len(row["rules"]) == 2
    for found in row["rules"]:
        assert found["unchanged"]["reused"] > 0.9
        assert 0 < found["updated"]["reused"] < 1
