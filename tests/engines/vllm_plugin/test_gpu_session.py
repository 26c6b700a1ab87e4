"""The script for a GPU that is lent for minutes, as far as it goes without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_a_dry_run_leaves_logs_and_figures(vllm_installed: None, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu/session.py", "--dry-run", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    phases = json.loads((tmp_path / "session.json").read_text())
    assert [(phase["phase"], phase["status"]) for phase in phases] == [
        ("tests", 0),
        ("rollouts", 0),
    ]
    rows = {
        (row["contender"], row["which"]): row
        for row in json.loads((tmp_path / "serving.json").read_text())["rows"]
    }
    assert {name for name, _ in rows} == {"stock", "coupled"}
    # The same weights, the same noise, in float32: token for token the first pass again.
    assert rows["coupled", "second"]["same_as_first"] == 1.0
    assert rows["coupled", "second"]["engine_steps"] < rows["stock", "second"]["engine_steps"]
    assert rows["stock", "second"]["same_as_first"] < 1.0
    assert '"round": 1' in (tmp_path / "rollouts.log").read_text()
