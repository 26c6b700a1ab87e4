"""benchmarks/bench_cache.py in its short mode: it checks what it times, and writes every row."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "bench_cache.py"


def _run(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), str(ROOT), *sys.path])},
    )  # fmt: skip


@pytest.mark.slow
def test_the_short_mode_writes_every_row(tmp_path: Path) -> None:
    done = _run("import bench_cache; bench_cache.main()", "--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["cache.json"]
    rows = {row["op"]: row for row in json.loads((tmp_path / "cache.json").read_text())["rows"]}
    assert {op: list(row.get("peers", {})) for op, row in rows.items()} == {
        "store": ["torch.save"],
        "lookup": ["torch.load"],
        "save": ["torch.save", "torch.save, fsync"],
        "load": ["torch.load"],
        "store on disk": ["torch.save, fsync"],
        "hand over": [],  # to a thread: the peers do the whole work
        "lookup on disk": ["torch.load"],
    }
    shape = rows["lookup"]["shape"]
    assert shape["rollouts"] == 128
    # Ids and log-probs, each read and written.
    assert rows["lookup"]["bytes_moved"] == rows["store"]["bytes_moved"] == 16 * shape["tokens"]
    assert 0 < rows["store on disk"]["bytes_per_token"] < 4  # small steps: mostly the tree's own
    # A file holds them, and little else.
    assert 0 < rows["save"]["file_bytes"] - 8 * shape["tokens"] < 100 * 128


@pytest.mark.slow
def test_wrong_drafts_are_not_timed(tmp_path: Path) -> None:
    code = """
import bench_cache
lookup = bench_cache.Step.lookup
def wrong(step, cache):
    drafts = lookup(step, cache)
    drafts.token_ids[-1] ^= 1
    return drafts
bench_cache.Step.lookup = wrong
bench_cache.main()
"""
    done = _run(code, "--quick", "--out", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "the drafts looked up are not the rollouts stored"
    assert list(tmp_path.iterdir()) == []
