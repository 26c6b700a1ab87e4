"""The script for a GPU that is lent for minutes, as far as it goes without one."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
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
        # Where nothing is installed but what it needs, the script finds the package.
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p != str(ROOT))},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    phases = json.loads((tmp_path / "session.json").read_text())
    assert [(phase["phase"], phase["status"]) for phase in phases] == [
        ("rollouts", 0),
        ("v2", 0),
        ("tests", 0),
    ]
    rows = {
        (row["contender"], row["which"]): row
        for row in json.loads((tmp_path / "serving.json").read_text())["rows"]
    }
    assert {name for name, _ in rows} == {"stock", "coupled"}
    # The same weights, the same noise, in float32: token for token the first pass again.
    assert rows["coupled", "second"]["same_as_first"] == 1.0
    # Not fewer for sure: what is proposed follows the times that steps take on this machine.
    assert rows["coupled", "second"]["engine_steps"] <= rows["stock", "second"]["engine_steps"]
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


def test_phases_share_the_session_and_leave_what_they_do_not_need(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu"))
    import session

    args = argparse.Namespace(
        **{"out": tmp_path, "policies": None, "model": None, "moved": None, "data": None},
        **{"shape": "1.7b", "dtype": "bfloat16", "batches": [64], "max_tokens": 384},
        **{"phases": session.PHASES, "dry_run": False, "seconds": 570.0},
        contenders=["stock", "drafting"],
    )
    monkeypatch.setattr(session, "version", lambda _: "0.31.2")
    assert session.without_v2() == "vLLM 0.31.2 is older than 0.32"
    monkeypatch.setattr(session, "without_v2", lambda: "too old")
    assert [phase.name for phase in session.phases(args)] == ["build", "model", "rollouts", "tests"]
    monkeypatch.setattr(session, "without_v2", lambda: None)
    todo = session.phases(args)
    assert [phase.name for phase in todo] == ["build", "model", "rollouts", "v2", "tests"]
    assert sum(phase.share for phase in todo) == pytest.approx(1.0)
    assert max(todo, key=lambda phase: phase.share).name == "rollouts"
    rollouts = todo[2].command(200.0)
    assert rollouts[rollouts.index("--contenders") + 1 :][:3] == ["stock", "drafting", "--batches"]
    # Build and model may have all the time: without them there is nothing to do in it.
    assert [session.limit_of(todo[number:], 555.0) for number in (0, 1)] == [555.0, 555.0]
    limits, left = [], 455.0
    for number in (2, 3, 4):  # each takes all that it has
        limits.append(session.limit_of(todo[number:], left))
        left -= limits[-1]
    assert limits == pytest.approx([455.0 * phase.share / 0.65 for phase in todo[2:]])
    # What build and model leave is not for rollouts alone.
    assert session.limit_of(todo[2:], 455.0) == pytest.approx(245.0)
    assert session.limit_of(todo[4:], 100.0) == pytest.approx(100.0)
    assert session.limit_of(todo[4:], -1.0) == 0.0


def test_it_needs_nothing_of_ours_before_it_has_built_it() -> None:
    code = "import sys, session; assert 'spec_rollout' not in sys.modules; session.without_v2()"
    code += "; assert 'spec_rollout' not in sys.modules"
    folder = str(ROOT / "benchmarks" / "gpu")
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)


def test_each_batch_size_has_its_part_of_the_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench_serving

    clock, parts = [0.0], []

    def batch(args: object, results: object, children: object, size: int, end: float) -> None:
        parts.append((size, end - clock[0]))
        clock[0] += 10.0 if size == 64 else end - clock[0]

    monkeypatch.setattr(bench_serving.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(bench_serving, "_run_batch", batch)
    monkeypatch.setattr(bench_serving, "_kv_bytes", lambda *_: 0)
    args = argparse.Namespace(contenders=[], batches=[256, 64, 16], budget=300.0)
    results = argparse.Namespace(write=lambda: None)
    bench_serving.run(args, results, tmp_path)
    assert parts == [(256, 100.0), (64, 100.0), (16, 190.0)]


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


def test_contenders_on_v2_are_left_out_where_the_plugin_does_not_run_on_it(
    vllm_installed: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu"))
    import session
    import v2_engines

    from spec_rollout.engines.vllm.compat.versions import OLDEST_V2

    assert session._OLDEST_V2 == OLDEST_V2
    names = ("v2-async-16", "drafting-v2")
    args = argparse.Namespace(contenders=list(map(v2_engines.Contender.named, names)), budget=0.0)
    assert not v2_engines.run(args, None)  # there was no time
    assert capsys.readouterr().out == "no time left for v2-async-16\n"
    monkeypatch.setattr(session, "version", lambda _: "0.31.2")
    assert v2_engines.run(args, None)
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said] == [f"{n} is left out" for n in names]
    assert "vLLM 0.31.2 is older than 0.32" in said[0]


def test_a_session_that_is_ended_ends_what_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A phase that is left running would hold the GPU."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu"))
    script = f"""
import sys
sys.path.insert(0, {str(ROOT / "benchmarks" / "gpu")!r})
from pathlib import Path
import session
code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
phase = session.Phase("sleep", lambda _: [sys.executable, "-c", code], 1.0)
session.run(phase, Path({str(tmp_path)!r}), 600.0)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL)
    log, sleeper = tmp_path / "sleep.log", None
    try:
        deadline = time.monotonic() + 60
        while not (log.exists() and log.read_text().endswith("\n")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        sleeper = int(log.read_text())
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
        while _runs(sleeper):
            assert time.monotonic() < deadline + 60, f"{sleeper} runs on"
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
        if sleeper is not None and _runs(sleeper):
            os.kill(sleeper, signal.SIGKILL)


def _runs(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
