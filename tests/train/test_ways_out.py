"""However a run ends early, its last whole step is kept and the advice that is printed works."""

from __future__ import annotations

import json
import os
import shlex
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.hooks import RemovableHandle
from whole_runs import (
    assert_same_weights,
    final_weights,
    interruption_config,
    read_rows,
    without_seconds,
)

from spec_rollout.cli import main
from spec_rollout.config.sections import RewardConfig
from spec_rollout.config.toml import dump_config
from spec_rollout.engines import TransformersEngine
from spec_rollout.rewards.rewards import RewardError
from spec_rollout.train import loop
from spec_rollout.train.checkpoint import list_checkpoints
from spec_rollout.train.interrupt import RunInterrupted
from spec_rollout.train.trainer import Job, resume, run, run_together
from spec_rollout.train.update import DivergedError

pytestmark = pytest.mark.usefixtures("one_thread")

CALLS_PER_STEP = 12  # of the reward: 3 prompts, 4 samples each
CALLS_PER_EVALUATION = 8  # 4 prompts, 2 samples each


class Calls:
    """Counts calls and raises in one of them."""

    def __init__(self) -> None:
        self.count = 0
        self.fails_at: int | None = None

    def __call__(self) -> None:
        self.count += 1
        if self.count == self.fails_at:
            raise Interfered


class Interfered(BaseException):
    """No Exception: whatever catches errors of a usual kind does not help."""


REWARD_CALLS = Calls()
HOOKS: list[RemovableHandle] = []


def remove_hooks() -> None:
    while HOOKS:
        HOOKS.pop().remove()


def noisy_reward(prompt: str, response: str, answer: str) -> float:
    """Draws from a random generator of the process: a step done again draws the same."""
    try:
        REWARD_CALLS()
    except Interfered:
        raise RuntimeError("no verifier") from None
    share = sum(c.isdigit() for c in response) / max(1, len(response))
    return share + 0.01 * np.random.rand()  # noqa: NPY002


@pytest.fixture
def noisy(make_config):
    """A run of six steps, with evaluations before the first and after the third and last."""
    REWARD_CALLS.__init__()

    def make(run_dir, checkpoint=None, **train):
        config = interruption_config(make_config, run_dir, checkpoint, **train)
        return replace(config, reward=RewardConfig((f"{__name__}:noisy_reward",)))

    yield make
    remove_hooks()


@pytest.fixture
def whole(noisy, tmp_path):
    """Rows and weights of such a run that goes through."""
    config = noisy(tmp_path / "whole")
    run(config)
    REWARD_CALLS.__init__()
    return without_seconds(read_rows(config.log.run_dir)), final_weights(config.log.run_dir)


def advice(err: str) -> tuple[str, list[str]]:
    """The one line on stderr, and the command in it."""
    (line,) = [line for line in err.splitlines() if "spec-rollout" in line]
    text, _, command = line.partition(": spec-rollout ")
    return text, shlex.split(command)


def checkpoints(run_dir) -> list[str]:
    return [path.name for path in list_checkpoints(Path(run_dir) / "checkpoints")]


def fails_in_reward(n, monkeypatch):
    REWARD_CALLS.fails_at = n
    return RewardError


def fails_in_update(n, monkeypatch):
    """In the n-th forward pass that computes gradients; two of them make a step."""
    calls = Calls()
    calls.fails_at = n

    def hook(module, _args):
        if torch.is_grad_enabled() and type(module).__name__ == "Qwen3ForCausalLM":
            calls()

    HOOKS.append(torch.nn.modules.module.register_module_forward_pre_hook(hook))
    return Interfered


def fails_in_sync(n, monkeypatch):
    calls, real = Calls(), TransformersEngine.update_weights
    calls.fails_at = n
    monkeypatch.setattr(
        TransformersEngine, "update_weights", lambda self, named: (real(self, named), calls())
    )
    return Interfered


def fails_in_log(n, monkeypatch):
    calls, real = Calls(), loop.sample_rows
    calls.fails_at = n
    monkeypatch.setattr(loop, "sample_rows", lambda *args: (calls(), real(*args))[1])
    return Interfered


def fails_in_metrics(n, monkeypatch):
    calls, real = Calls(), loop.JsonLines.write
    calls.fails_at = n

    def write(self, row):
        if "reward" in row and "prompt" not in row:
            calls()
        real(self, row)

    monkeypatch.setattr(loop.JsonLines, "write", write)
    return Interfered


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fails", "n", "kept"),
    [
        # In evaluations, the second of them after step 3.
        (fails_in_reward, CALLS_PER_EVALUATION // 2, "step-00000000-unevaluated"),
        (
            fails_in_reward,
            CALLS_PER_EVALUATION + 3 * CALLS_PER_STEP + 5,
            "step-00000003-unevaluated",
        ),
        # In the rewards of steps 1, 2 and 4, when the rollouts are there already.
        (fails_in_reward, CALLS_PER_EVALUATION + 5, "step-00000000"),
        (fails_in_reward, CALLS_PER_EVALUATION + CALLS_PER_STEP + 1, "step-00000001"),
        (fails_in_reward, 2 * CALLS_PER_EVALUATION + 4 * CALLS_PER_STEP, "step-00000003"),
        # In the first half of the update, before anything has changed.
        (fails_in_update, 1, "step-00000000"),
        (fails_in_update, 7, "step-00000003"),
        # Between the update of step 4 and its row of metrics.
        (fails_in_sync, 4, "step-00000004-unevaluated"),
        (fails_in_log, 4, "step-00000004-unevaluated"),
        (fails_in_metrics, 4, "step-00000004-unevaluated"),
    ],
)
def test_an_error_loses_no_whole_step(noisy, whole, tmp_path, capsys, monkeypatch, fails, n, kept):
    rows, weights = whole
    config = noisy(tmp_path / "failed")
    run_dir = config.log.run_dir
    with monkeypatch.context() as patch:
        error = fails(n, patch)
        with pytest.raises(error):
            run(config)
        REWARD_CALLS.fails_at = None
    text, command = advice(capsys.readouterr().err)
    step = int(kept[5:13])
    assert text == f"stopped by {error.__name__} after step {step} of 6; continue with"
    assert command == ["train", "--resume", run_dir]
    assert checkpoints(run_dir) == [kept]
    remove_hooks()
    resume(run_dir)
    assert without_seconds(read_rows(run_dir)) == rows
    assert_same_weights(final_weights(run_dir), weights)


@pytest.mark.slow
@pytest.mark.parametrize("every_steps", [None, 2])
def test_a_half_done_update_is_not_kept(noisy, whole, tmp_path, capsys, monkeypatch, every_steps):
    rows, weights = whole
    config = noisy(tmp_path / "failed", {"every_steps": every_steps})
    run_dir = config.log.run_dir
    with monkeypatch.context() as patch:
        fails_in_update(8, patch)  # the second minibatch of step 4
        with pytest.raises(Interfered):
            run(config)
    remove_hooks()
    text, command = advice(capsys.readouterr().err)
    how = "begin again" if every_steps is None else "continue after step 2"
    assert text == "stopped by Interfered in the update of step 4 of 6, which is not kept; " + (
        f"{how} with"
    )
    assert checkpoints(run_dir) == ([] if every_steps is None else ["step-00000002"])
    assert len(read_rows(run_dir)) == 4
    assert command == ["train", "--resume", run_dir]
    resume(run_dir)
    err = capsys.readouterr().err
    assert ("there is no checkpoint yet; the run begins again" in err) == (every_steps is None)
    assert without_seconds(read_rows(run_dir)) == rows
    assert_same_weights(final_weights(run_dir), weights)


@pytest.mark.slow
def test_the_advice_works_as_it_is_printed(make_config, tmp_path, capsys, monkeypatch):
    REWARD_CALLS.__init__()
    REWARD_CALLS.fails_at = CALLS_PER_EVALUATION + CALLS_PER_STEP + 3
    config = make_config(
        reward={"functions": [f"{__name__}:noisy_reward"]},
        train={"max_steps": 3},
        log={"run_dir": str(tmp_path / "my run; it's")},
    )
    (tmp_path / "c.toml").write_text(dump_config(config))
    assert main(["train", str(tmp_path / "c.toml")]) == 2
    err = capsys.readouterr().err
    assert "error: reward.functions" in err or "no verifier" in err
    _, command = advice(err)
    # Who begins again instead is told the same.
    assert main(["train", str(tmp_path / "c.toml")]) == 2
    again = capsys.readouterr().err
    assert f"(--resume {shlex.quote(config.log.run_dir)} continues the run)" in again
    assert main(command) == 0
    assert [row["step"] for row in read_rows(config.log.run_dir)] == [0, 1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("error", [SystemExit(0), KeyboardInterrupt(), MemoryError()])
def test_any_exception_of_a_callback(noisy, whole, tmp_path, capsys, error):
    rows, weights = whole
    config = noisy(tmp_path / "failed")

    def on_step(row):
        if row["step"] == 2:
            raise error

    with pytest.raises(type(error)):
        run(config, on_step=on_step)
    assert f"stopped by {type(error).__name__} after step 2 of 6;" in capsys.readouterr().err
    assert checkpoints(config.log.run_dir) == ["step-00000002"]
    resume(config.log.run_dir)
    assert without_seconds(read_rows(config.log.run_dir)) == rows
    assert_same_weights(final_weights(config.log.run_dir), weights)


@pytest.mark.slow
def test_an_error_removes_no_older_checkpoint(noisy, tmp_path):
    config = noisy(tmp_path / "failed", {"every_steps": 1, "keep_last": 1})
    REWARD_CALLS.fails_at = 2 * CALLS_PER_EVALUATION + 3 * CALLS_PER_STEP + 2
    with pytest.raises(RewardError):
        run(config)
    assert checkpoints(config.log.run_dir) == ["step-00000003"]
    REWARD_CALLS.__init__()
    other = noisy(tmp_path / "other", {"every_steps": 2, "keep_last": 1})
    REWARD_CALLS.fails_at = 2 * CALLS_PER_EVALUATION + 3 * CALLS_PER_STEP + 2
    with pytest.raises(RewardError):
        run(other)
    assert checkpoints(other.log.run_dir) == ["step-00000002", "step-00000003"]


def test_a_state_that_cannot_be_written_is_said(noisy, tmp_path, capsys, monkeypatch):
    config = noisy(tmp_path / "failed", {"every_steps": 2})

    def full_disk(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    def on_step(row):
        if row["step"] == 3:
            monkeypatch.setattr("spec_rollout.train.checkpoint.write_manifest", full_disk)
            raise Interfered

    with pytest.raises(Interfered):
        run(config, on_step=on_step)
    text, _ = advice(capsys.readouterr().err)
    assert text == (
        "stopped by Interfered after step 3 of 6, which could not be kept (OSError: [Errno 28] No "
        "space left on device); continue after step 2 with"
    )
    assert sorted(os.listdir(Path(config.log.run_dir) / "checkpoints")) == ["step-00000002"]


@pytest.mark.slow
def test_all_runs_that_take_turns_are_kept(noisy, whole, tmp_path, capsys):
    rows, _ = whole

    def on_step(row):
        if row["step"] == 3:
            raise Interfered

    first, second = noisy(tmp_path / "first"), noisy(tmp_path / "second")
    with pytest.raises(Interfered):
        run_together([Job(first), Job(second, on_step=on_step)])
    err = capsys.readouterr().err
    assert [line.split()[5] for line in err.splitlines()] == ["3", "3"]
    for config in (first, second):
        assert checkpoints(config.log.run_dir) == ["step-00000003"]
        resume(config.log.run_dir)
        found = without_seconds(read_rows(config.log.run_dir))
        assert [row["step"] for row in found] == [row["step"] for row in rows]


@pytest.mark.slow
def test_a_terminal_that_goes_away_stops_the_run(noisy, whole, tmp_path, capsys):
    rows, weights = whole
    config = noisy(tmp_path / "interrupted")
    before = signal.signal(signal.SIGHUP, signal.default_int_handler)

    def on_step(row):
        if row["step"] == 2:
            os.kill(os.getpid(), signal.SIGHUP)

    try:
        with pytest.raises(RunInterrupted) as caught:
            run(config, on_step=on_step)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert caught.value.code == 129
    assert "interrupted by SIGHUP after step 2 of 6;" in capsys.readouterr().err
    resume(config.log.run_dir)
    assert without_seconds(read_rows(config.log.run_dir)) == rows
    assert_same_weights(final_weights(config.log.run_dir), weights)


def test_what_nohup_ignores_stays_ignored(noisy, tmp_path):
    config = noisy(tmp_path / "whole", max_steps=2)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def on_step(row):
        os.kill(os.getpid(), signal.SIGHUP)

    try:
        assert run(config, on_step=on_step).totals.steps == 2
    finally:
        signal.signal(signal.SIGHUP, before)


def test_who_asks_twice_does_not_wait(noisy, tmp_path, capsys):
    config = noisy(tmp_path / "interrupted")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_rollouts(step, rollouts):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    try:
        with pytest.raises(KeyboardInterrupt):
            run(config, on_rollouts=on_rollouts)
    finally:
        signal.signal(signal.SIGINT, before)
    assert checkpoints(config.log.run_dir) == []
    assert "continue" not in capsys.readouterr().err


@pytest.mark.slow
def test_weights_that_diverge_are_not_kept(noisy, whole, tmp_path, capsys):
    rows, weights = whole
    config = noisy(tmp_path / "diverged", {"every_steps": 2})
    run_dir = config.log.run_dir

    def on_step(row):
        if row["step"] == 4:
            raise Interfered

    with pytest.raises(Interfered):
        run(config, on_step=on_step)
    before = checkpoints(run_dir)
    assert before == ["step-00000002", "step-00000004"]
    capsys.readouterr()
    with pytest.raises(
        DivergedError,
        match=r"train: expected finite weights after the update of step 5, got (NaN|infinity) in "
        r"model\.embed_tokens\.weight \(\d+ of \d+ numbers\); a smaller train\.lr may help",
    ):
        resume(run_dir, ["train.lr=1e39"])
    err = capsys.readouterr().err
    assert "in the update of step 5 of 6, which is not kept; continue after step 4 with" in err
    assert checkpoints(run_dir) == before
    assert [row["step"] for row in read_rows(run_dir)] == [0, 1, 2, 3, 4]
    resume(run_dir, ["train.lr=3e-3"])
    assert without_seconds(read_rows(run_dir)) == rows
    assert_same_weights(final_weights(run_dir), weights)


@pytest.mark.slow
def test_checkpoints_by_time(noisy, tmp_path, monkeypatch):
    from spec_rollout.train import keeper

    monkeypatch.setattr(keeper, "_SHARE", float("inf"))  # however long writing takes
    config = noisy(tmp_path / "timed", {"every_minutes": 1e-9, "keep_last": 9})
    run(config)
    assert checkpoints(config.log.run_dir) == [f"step-{step:08d}" for step in range(7)]
    off = noisy(tmp_path / "off", {"every_minutes": None, "keep_last": 9})
    run(off)
    assert checkpoints(off.log.run_dir) == ["step-00000006"]
    stored = json.loads(
        (Path(config.log.run_dir) / "checkpoints" / "step-00000003" / "state.json").read_text()
    )
    assert stored["order"] == {
        "train.seed": 7,
        "train.prompts_per_step": 3,
        "data.shuffle": True,
    }
