"""What is said while several runs train, by a clock that the test sets."""

from __future__ import annotations

import io
import time
from typing import Any

import pytest

from spec_rollout.ablate.progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def row(step: int, seconds: float, *, reused: int = 0, per_epoch: int = 2) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": (step - 1) // per_epoch,
        "step_seconds": seconds,
        "rollout_seconds": seconds / 2,
        "num_response_tokens": 100,
        "num_reused_tokens": reused,
    }


def progress(out: io.StringIO, clock: Clock, **settings: Any) -> Progress:
    """Two runs that take turns: two epochs of two steps each."""
    arguments: dict[str, Any] = {"turns": [["a", "b"]], "num_steps": 4, "num_epochs": 2}
    return Progress(**{**arguments, **settings}, stream=out, bar=False, clock=clock)


def test_figures_come_after_every_epoch_of_all_runs() -> None:
    out, clock = io.StringIO(), Clock()
    shown = progress(out, clock)
    for step in (1, 2):
        clock.now += 15
        shown.on_step("a", row(step, 10.0))
        assert len(out.getvalue().splitlines()) == step - 1
        shown.on_step("b", row(step, 5.0))
    assert out.getvalue() == (
        "step 1 of 4: rollout seconds a 5.0, b 2.5 (nothing to reuse yet); "
        "0:15 gone, about 0:45 left\n"
        "epoch 1 of 2: rollout seconds a 10.0, b 5.0 (nothing to reuse yet); "
        "0:30 gone, about 0:30 left\n"
    )
    for step in (3, 4):
        clock.now += 12
        shown.on_step("a", row(step, 10.0))
        shown.on_step("b", row(step, 2.0, reused=60))
    assert out.getvalue().splitlines()[2:] == [
        "epoch 2 of 2: rollout seconds a 10.0, b 2.0 (5.00x, 60% reused); "
        "0:54 gone, about 0:00 left"
    ]


def test_the_evaluation_before_training_is_the_first_figure() -> None:
    out = io.StringIO()
    shown = progress(out, Clock())
    accuracies = {"accuracy_train": 0.40625, "accuracy_heldout": 0.5}
    shown.on_step("a", {"step": 0, "epoch": 0, "eval_seconds": 7.0, **accuracies})
    assert out.getvalue() == (
        "accuracy before training: 40.6% on training prompts, 50.0% on held-out prompts\n"
    )


def test_the_estimate_is_what_was_measured_last() -> None:
    shown = progress(io.StringIO(), Clock(), num_evals_after=3)
    assert shown.left() is None
    shown.on_step("a", {"step": 0, "epoch": 0, "eval_seconds": 7.0})
    assert shown.left() is None  # an evaluation is no step
    shown.on_step("a", row(1, 10.0))
    assert shown.left() == pytest.approx(3 * 10 + 4 * 10 + 3 * 7)  # b: as a, until measured
    shown.on_step("b", row(1, 4.0))
    shown.on_step("a", row(2, 6.0))
    assert shown.left() == pytest.approx(2 * 6 + 3 * 4 + 3 * 7)


def test_the_status_names_what_runs_now() -> None:
    clock = Clock()
    shown = progress(io.StringIO(), clock)
    clock.now += 61
    assert shown.status() == "1:01 gone, the first step tells how long: a, step 1 of 4"
    shown.on_step("a", row(1, 10.0))
    assert shown.status() == "1:01 gone, about 1:10 left: b, step 1 of 4"
    shown.on_step("b", row(1, 10.0))
    # 100 tokens in the 10 seconds of its last step
    assert shown.status() == "1:01 gone, about 1:00 left: a, step 2 of 4, 10 tokens/s"
    for step in range(2, 5):
        shown.on_step("b", row(step, 10.0))
    for step in range(2, 5):
        shown.on_step("a", row(step, 10.0))
    assert shown.status() == "1:01 gone: evaluating"


def test_runs_one_after_the_other_have_lines_of_their_own() -> None:
    out, clock = io.StringIO(), Clock()
    shown = progress(out, clock, turns=[["a"], ["b"]])
    for name in ("a", "b"):
        for step in range(1, 5):
            shown.on_step(name, row(step, 10.0))
    lines = [line for line in out.getvalue().splitlines() if line.startswith("epoch")]
    figures = [line.partition(";")[0] for line in lines]
    assert figures == [
        "epoch 1 of 2: rollout seconds a 10.0 (nothing to reuse yet)",
        "epoch 2 of 2: rollout seconds a 10.0",
        "epoch 1 of 2: rollout seconds b 10.0 (nothing to reuse yet)",
        "epoch 2 of 2: rollout seconds b 10.0",
    ]


@pytest.mark.slow
def test_a_long_silence_is_broken() -> None:
    out, clock = io.StringIO(), Clock()
    with progress(out, clock, every=30.0) as shown:
        clock.now += 29.0
        shown.tick_once()
        assert out.getvalue() == ""
        clock.now += 1.0
        deadline = time.monotonic() + 60
        while not out.getvalue() and time.monotonic() < deadline:
            time.sleep(0.05)  # the thread looks every second
        clock.now += 29.0
        shown.tick_once()
    assert out.getvalue() == "0:30 gone, the first step tells how long: a, step 1 of 4\n"


def test_a_terminal_gets_a_bar_and_the_figures_above_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = Progress([["a"]], num_steps=2, num_epochs=2, bar=True, clock=Clock())
    with shown:
        for step in (1, 2):
            shown.on_step("a", row(step, 10.0, per_epoch=1))
    out, err = capsys.readouterr()
    assert out.count("epoch") == 2
    assert "2/2 steps" in err
    assert "about 0:10 left: a, step 2 of 2" in err
