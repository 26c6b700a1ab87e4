"""The benchmark of rounding on vLLM, as far as the demo's model goes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_every_rule_and_tolerance_is_measured_on_vllm(vllm_installed: None, tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/bench_rounding.py", "--tiny", "--folder", str(tmp_path)]
    command += ["--out", str(tmp_path), "--engines", "vllm", "--dtypes", "float32"]
    command += ["--group", "4", "--max-tokens", "16"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads((tmp_path / "rounding.json").read_text())["rows"]
    assert (row["op"], row["dtype"]) == ("vllm", "float32")
    assert row["rounding"]["largest"] < 1e-4
    assert len(row["rules"]) == 2
    for found in row["rules"]:
        assert found["unchanged"]["reused"] > 0.9
        assert 0 < found["updated"]["reused"] < 1
