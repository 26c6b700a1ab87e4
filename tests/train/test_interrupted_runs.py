"""Runs that are interrupted, wherever that is, and go on as if they had not been."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from whole_runs import (
    SignalAtForward,
    assert_same_weights,
    final_weights,
    interruption_config,
    read_rows,
    without_seconds,
)

from spec_rollout.config.toml import dump_config, load_config
from spec_rollout.train.checkpoint import list_checkpoints
from spec_rollout.train.interrupt import RunInterrupted
from spec_rollout.train.trainer import Job, resume, run, run_together

pytestmark = pytest.mark.usefixtures("one_thread")


# From the first evaluation to the last: every kind of place a signal may find the run in. Shares of
# all forward passes. In the very last one a signal comes too late: the run is over.
@pytest.mark.parametrize(
    "shares",
    [
        (0.0, 0.5, 0.97),
        pytest.param((0.03, 0.2, 0.35, 0.65, 0.8, 0.9, 0.97), marks=pytest.mark.slow),
    ],
    ids=["fast", "slow"],
)
def test_resumed_runs_equal_the_uninterrupted_one(
    make_config, tmp_path, uninterrupted, capsys, shares
):
    rows, weights, num_forwards = uninterrupted
    unevaluated = set()
    for index, share in enumerate(shares):
        config = interruption_config(make_config, tmp_path / f"interrupted{index}")
        run_dir = Path(config.log.run_dir)
        signum = (signal.SIGINT, signal.SIGTERM)[index % 2]
        capsys.readouterr()
        place = max(1, round(num_forwards * share))
        with SignalAtForward(place, signum), pytest.raises(RunInterrupted) as caught:
            run(config)
        assert caught.value.code == 128 + signum
        err = capsys.readouterr().err
        said = [line for line in err.splitlines() if "repeats itself" not in line]
        assert len(said) == 1
        assert f"interrupted by {signum.name} after step" in err
        assert f"spec-rollout train --resume {run_dir}" in err
        readable = read_rows(run_dir)  # every line is whole
        assert without_seconds(readable)[:-1] == without_seconds(rows)[: max(0, len(readable) - 1)]
        assert not (run_dir / "summary.json").exists()
        (checkpoint,) = list_checkpoints(run_dir / "checkpoints")
        unevaluated.add(checkpoint.name.endswith("unevaluated"))
        resume(run_dir)
        assert without_seconds(read_rows(run_dir)) == without_seconds(rows), share
        assert_same_weights(final_weights(run_dir), weights)
        assert (run_dir / "summary.json").exists()
    assert unevaluated == {True, False}


@pytest.mark.slow
def test_interrupted_twice(make_config, tmp_path, uninterrupted):
    rows, weights, _ = uninterrupted
    config = interruption_config(make_config, tmp_path / "twice")
    with SignalAtForward(60, signal.SIGINT), pytest.raises(RunInterrupted):
        run(config)
    with SignalAtForward(70, signal.SIGTERM), pytest.raises(RunInterrupted):
        resume(config.log.run_dir)
    resume(config.log.run_dir)
    assert without_seconds(read_rows(config.log.run_dir)) == without_seconds(rows)
    assert_same_weights(final_weights(config.log.run_dir), weights)


@pytest.mark.slow
def test_a_crash_goes_back_to_the_last_checkpoint(make_config, tmp_path, uninterrupted):
    rows, weights, _ = uninterrupted
    checkpoints = {"every_steps": 2, "keep_last": 1}
    config = interruption_config(make_config, tmp_path / "crashed", checkpoint=checkpoints)

    def crash(row):
        if row["step"] == 5:
            raise MemoryError

    with pytest.raises(MemoryError):
        run(config, on_step=crash)
    run_dir = Path(config.log.run_dir)
    # As a killed process leaves it.
    shutil.rmtree(run_dir / "checkpoints" / "step-00000005")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')
    assert [p.name for p in list_checkpoints(run_dir / "checkpoints")] == ["step-00000004"]
    resume(run_dir)
    assert without_seconds(read_rows(run_dir)) == without_seconds(rows)
    assert_same_weights(final_weights(run_dir), weights)


@pytest.mark.slow
def test_runs_that_take_turns_are_those_alone(make_config, tmp_path, uninterrupted):
    rows, weights, _ = uninterrupted
    order = []
    configs = [
        interruption_config(make_config, tmp_path / "first"),
        interruption_config(make_config, tmp_path / "second", seed=1, epochs=1),
        interruption_config(make_config, tmp_path / "third"),
    ]
    summaries = run_together(
        [
            Job(config, on_step=lambda row, i=i: order.append((row["step"], i)))
            for i, config in enumerate(configs)
        ]
    )
    assert [summary.totals.steps for summary in summaries] == [6, 2, 6]
    turns = [(step, i) for step in range(1, 7) for i in (0, 1, 2) if step <= 2 or i != 1]
    assert [turn for turn in order if turn[0] > 0] == turns
    for config in (configs[0], configs[2]):
        assert without_seconds(read_rows(config.log.run_dir)) == without_seconds(rows)
        assert_same_weights(final_weights(config.log.run_dir), weights)


@pytest.mark.slow
def test_interrupting_runs_that_take_turns_leaves_all_resumable(
    make_config, tmp_path, uninterrupted
):
    rows, weights, num_forwards = uninterrupted
    configs = [interruption_config(make_config, tmp_path / name) for name in ("first", "second")]
    with SignalAtForward(round(1.2 * num_forwards), signal.SIGINT), pytest.raises(RunInterrupted):
        run_together([Job(config) for config in configs])
    for config in configs:
        assert 0 < len(read_rows(config.log.run_dir)) < len(rows)
        resume(config.log.run_dir)
        assert without_seconds(read_rows(config.log.run_dir)) == without_seconds(rows)
        assert_same_weights(final_weights(config.log.run_dir), weights)


@pytest.mark.slow
def test_resuming_with_more_steps(make_config, tmp_path):
    config = interruption_config(make_config, tmp_path / "short", epochs=None, max_steps=3)
    run(config)
    longer = resume(config.log.run_dir, ["train.max_steps=5"])
    assert longer.totals.steps == 5
    assert load_config(Path(config.log.run_dir) / "config.toml").train.max_steps == 5
    whole = interruption_config(make_config, tmp_path / "long", epochs=None, max_steps=5)
    run(whole)
    assert_same_weights(final_weights(config.log.run_dir), final_weights(whole.log.run_dir))


@pytest.mark.slow
def test_resuming_a_finished_run_changes_nothing_and_says_so(make_config, tmp_path, capsys):
    config = interruption_config(make_config, tmp_path / "done")
    first = run(config)
    assert "nothing is left to train" not in capsys.readouterr().err
    # The smaller of both counts.
    again = resume(config.log.run_dir, ["train.max_steps=400"])
    said = f"note: {config.log.run_dir}: nothing is left to train: it has done 6 steps, and "
    assert capsys.readouterr().err.count(said) == 1
    assert again.totals == first.totals
    assert again.accuracy_after == first.accuracy_after


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_from_outside(make_config, tmp_path, signum):
    config = make_config(train={"epochs": 10_000}, log={"run_dir": str(tmp_path / "outside")})
    (tmp_path / "c.toml").write_text(dump_config(config))
    code = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from spec_rollout.config.toml import load_config\n"
        "from spec_rollout.train.trainer import run\n"
        "run(load_config(sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "c.toml"), str(Path(__file__).parents[1])]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        metrics = Path(config.log.run_dir) / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count("\n") > 3):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signum)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 128 + signum
    assert "continue with: spec-rollout train --resume" in err
    assert "Traceback" not in err
    (checkpoint,) = list_checkpoints(Path(config.log.run_dir) / "checkpoints")
    done = int(checkpoint.name[5:13])
    assert [row["step"] for row in read_rows(config.log.run_dir)] == list(range(done + 1))
    summary = resume(config.log.run_dir, ["train.epochs=none", f"train.max_steps={done + 1}"])
    assert summary.totals.steps == done + 1
