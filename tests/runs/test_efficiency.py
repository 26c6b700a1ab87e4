from __future__ import annotations

import pytest

from spec_rollout.runs.efficiency import Point, accuracy_curve, cost_of, mean_curve


def row(step: int, accuracy: float | None = None, seconds: float = 2.0) -> dict[str, float]:
    found = {
        "step": step,
        "rollout_seconds": seconds,
        "step_seconds": 5.0,
        "num_generated_tokens": 100,
    }
    return found if accuracy is None else {**found, "accuracy_heldout": accuracy}


ROWS = [{"step": 0, "accuracy_heldout": 0.25}, row(1), row(2, 0.5), row(3), row(4, 0.75, 6.0)]


def test_costs_add_up_to_each_evaluation() -> None:
    curve = accuracy_curve(ROWS)
    assert curve == [
        Point(0, 0.0, 0.0, 0.0, 0.25),
        Point(2, 4.0, 10.0, 200.0, 0.5),
        Point(4, 12.0, 20.0, 400.0, 0.75),
    ]
    assert accuracy_curve(ROWS, before=0.9) == curve  # the run's own counts
    assert accuracy_curve(ROWS[1:], before=0.25) == curve
    assert accuracy_curve(ROWS, "train") == []


def test_accuracies_of_a_run_with_the_same_weights() -> None:
    rows = [row(step) for step in range(1, 5)]
    curve = accuracy_curve(rows, judged={2: 0.5, 4: 0.75}, before=0.25)
    assert [(point.step, point.accuracy) for point in curve] == [(0, 0.25), (2, 0.5), (4, 0.75)]


def test_the_cost_of_an_accuracy_is_linear_between_evaluations() -> None:
    curve = accuracy_curve(ROWS)
    assert cost_of(curve, 0.5) == 4.0
    assert cost_of(curve, 0.625) == pytest.approx(8.0)
    assert cost_of(curve, 0.625, "generated_tokens") == pytest.approx(300.0)
    assert cost_of(curve, 0.2) == 0.0
    assert cost_of(curve, 0.76) is None
    assert cost_of([], 0.5) is None
    # It counts when it is reached first, even if it is lost again.
    assert cost_of([*curve, Point(6, 20.0, 30.0, 500.0, 0.6)], 0.75) == 12.0


def test_the_mean_of_curves_takes_the_steps_of_all() -> None:
    curve = accuracy_curve(ROWS)
    other = [Point(0, 0.0, 0.0, 0.0, 0.35), Point(4, 14.0, 22.0, 300.0, 0.65)]
    assert mean_curve([curve, other]) == [
        Point(0, 0.0, 0.0, 0.0, pytest.approx(0.3)),
        Point(4, 13.0, 21.0, 350.0, pytest.approx(0.7)),
    ]
    assert mean_curve([]) == []
