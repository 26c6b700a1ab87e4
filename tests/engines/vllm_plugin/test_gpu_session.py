"""The script for a GPU that is lent for minutes, as far as it goes without one."""

from __future__ import annotations

import argparse
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
        ("v2", 0),
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

    rows = {
        (row["contender"], row["which"]): row
        for row in json.loads((tmp_path / "v2_engines.json").read_text())["rows"]
    }
    assert [engine["engine"]["runner"] for engine in rows.values()] == ["v2"] * 5
    stock, ours = rows["stock", "first"], rows["v2-async-8", "first"]
    assert stock["engine"]["async_scheduling"]
    assert ours["engine"]["async_scheduling"]
    assert ours["engine"]["scheduler"] == "ReuseScheduler"
    # Room for a draft of 8 tokens: 9 rows a request where there was one.
    sizes = [row["engine"]["grammar_bitmask_bytes"] for row in (stock, ours)]
    assert sizes[1] == 9 * sizes[0] > 0
    assert ours["same_as_stock"] == rows["stock", "second"]["same_as_first"] == 1.0
    for which in ("second", "changed"):
        row = rows["v2-async-8", which]
        assert row["same_as_first"] == 1.0
        assert row["logprob_gap"] < 1e-4
        assert row["steps"] < ours["steps"] <= stock["steps"] + 1


def test_names_of_contenders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu"))
    from v2_engines import USUAL, Contender

    assert len({Contender.named(name) for name in USUAL}) == len(USUAL)
    found = Contender.named("v2-async-32-full_decode_only")
    assert (found.runner, found.is_async, found.num_speculative_tokens) == ("v2", True, 32)
    assert found.cudagraph_mode == "FULL_DECODE_ONLY"
    assert Contender.named("v1-16").is_async is None
    for name in ("v2-16", "v1", "v2-sync-0", "stock-8", "drafting"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"got {name}"):
            Contender.named(name)
