"""benchmarks/bench_cache.py with actors in its short mode: it checks what it times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ray_clusters import ENVIRONMENT

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "bench_cache.py"


@pytest.mark.slow
def test_a_store_in_actors_is_measured_beside_memory(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--ray", "2", "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["cache_ray.json"]
    rows = json.loads((tmp_path / "cache_ray.json").read_text())["rows"]
    assert [row["op"] for row in rows] == ["store in actors", "hand over", "lookup in actors"]
    # Handing over to a thread is not the whole work, as it is in memory.
    assert [list(row.get("peers", {})) for row in rows] == [["in memory"], [], ["in memory"]]
    assert rows[0]["shape"]["actors"] == 2
