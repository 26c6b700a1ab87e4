"""The controller of lenience: by hand, on plants that answer as rollouts do, and in whole runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
from whole_runs import assert_same_weights, final_weights, read_rows, without_seconds

from spec_rollout import rollout
from spec_rollout.config.rollouts import RolloutConfig
from spec_rollout.counters import RolloutStats
from spec_rollout.rounding import Rounding
from spec_rollout.train.lenience import LenienceController
from spec_rollout.train.trainer import resume, run


def _controller(budget: str, target: float, start: float = 0.0, **options) -> LenienceController:
    return LenienceController(
        RolloutConfig(
            rule="lenient",
            log_lenience=start,
            scale=0.5,
            lenience_budget=budget,
            lenience_target=target,
            **options,
        )
    )


def _stats(budget: str, value: float) -> RolloutStats:
    counts = RolloutStats(num_drafts=1, num_reused_tokens=1000, num_response_tokens=1000)
    if budget == "kl_reused":
        counts.sum_kl_reused = 1000 * value
    elif budget == "reused_fraction":
        counts.num_reused_tokens = round(1000 * value)
    else:
        counts.num_groups, counts.num_new_responses = 1000, round(1000 * value)
    return counts


def test_hand_computed_moves() -> None:
    controller = _controller("reused_fraction", 0.5, start=0.25, lenience_gain=0.2)
    assert controller.rule.log_lenience == 0.25
    assert controller.rule.scale == 0.5  # the rule's other settings stay
    controller.observe(RolloutStats(num_response_tokens=9))  # no draft, nothing said
    assert (controller.estimate, controller.rule.log_lenience) == (None, 0.25)
    controller.observe(_stats("reused_fraction", 0.4))
    # (0.5 - 0.4) / 0.5 = 0.2, times 0.2.
    assert controller.estimate == pytest.approx(0.4)
    assert controller.rule.log_lenience == pytest.approx(0.29)
    controller.observe(_stats("reused_fraction", 0.8))
    # Estimate 0.6: -0.2 * 0.2.
    assert controller.estimate == pytest.approx(0.6)
    assert controller.rule.log_lenience == pytest.approx(0.25)


def test_a_move_is_at_most_the_gain_and_stays_in_range() -> None:
    controller = _controller("kl_reused", 0.001, lenience_gain=0.3, lenience_range=(-0.5, 1.0))
    moves = []
    for _ in range(4):
        controller.observe(_stats("kl_reused", 1.0))
        moves.append(controller.rule.log_lenience)
    assert moves == pytest.approx([-0.3, -0.5, -0.5, -0.5])
    rising = _controller("new_per_prompt", 1.0, start=0.9, lenience_range=(-0.5, 1.0))
    rising.observe(_stats("new_per_prompt", 8.0))  # too many new ones: reuse more
    rising.observe(_stats("new_per_prompt", 8.0))
    assert rising.rule.log_lenience == 1.0


# What a step gives at a lenience: rising, rising, falling, as measured in the demo.
PLANTS: dict[str, tuple[float, Callable[[float], float]]] = {
    "kl_reused": (0.006, lambda x: 0.012 * math.exp(1.5 * (x - 0.5))),
    "reused_fraction": (0.55, lambda x: 1 / (1 + math.exp(-2 * x))),
    "new_per_prompt": (3.0, lambda x: 8 / (1 + math.exp(2.5 * (x - 0.1)))),
}


@pytest.mark.parametrize("start", [-1.0, 2.0])
@pytest.mark.parametrize("budget", PLANTS)
def test_it_finds_the_budget_from_either_end_and_holds_it(budget: str, start: float) -> None:
    target, plant = PLANTS[budget]
    controller = _controller(budget, target, start)
    values = []
    for step in range(120):
        value = plant(controller.rule.log_lenience) * (1 + 0.1 * math.sin(1.7 * step))
        values.append(value)
        controller.observe(_stats(budget, value))
    late = values[60:]
    assert sum(late) / len(late) == pytest.approx(target, rel=0.05)
    assert max(late) < 1.3 * target
    assert min(late) > 0.7 * target


def test_the_state_is_all_there_is() -> None:
    a, b = (_controller("kl_reused", 0.01) for _ in range(2))
    a.restore(a.state())  # before the first step
    for value in (0.1, 0.001, 0.02):
        a.observe(_stats("kl_reused", value))
    b.restore(a.state())
    for controller in (a, b):
        controller.observe(_stats("kl_reused", 0.005))
    assert a.state() == b.state()
    assert a.rule == b.rule
    b.restore({})
    assert a.state() == b.state()


def _config(make_config, run_dir, **train):
    return make_config(
        rollout={
            "rule": "lenient",
            "lenience_budget": "reused_fraction",
            "lenience_target": 0.5,
            "lenience_gain": 0.3,
        },
        train={"epochs": 6, **train},
        eval={"num_train_prompts": 0},
        log={"run_dir": str(run_dir)},
    )


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_run_logs_its_lenience_and_is_resumed_exactly(make_config, tmp_path) -> None:
    run(_config(make_config, tmp_path / "whole"))
    run(_config(make_config, tmp_path / "part", max_steps=5))
    resume(tmp_path / "part", ["train.max_steps=none"])
    rows = [without_seconds(read_rows(tmp_path / name)) for name in ("whole", "part")]
    assert rows[0] == rows[1]
    assert_same_weights(final_weights(tmp_path / "whole"), final_weights(tmp_path / "part"))
    # The published start; the first epoch has no drafts; then it moves.
    assert [row["log_lenience"] for row in rows[0][:3]] == [0.5] * 3
    assert "lenience_estimate" not in rows[0][1]
    assert rows[0][2]["lenience_estimate"] == pytest.approx(rows[0][2]["reused_fraction"])
    assert len({row["log_lenience"] for row in rows[0]}) > 5


@pytest.mark.usefixtures("one_thread")
def test_a_schedule_is_logged_too(make_config, tmp_path) -> None:
    config = make_config(
        rollout={"rule": "lenient", "start_log_lenience": 0.0, "schedule_steps": 4},
        eval={"num_train_prompts": 0},
        log={"run_dir": str(tmp_path / "a")},
    )
    run(config)
    logged = [row["log_lenience"] for row in read_rows(tmp_path / "a")]
    assert logged == pytest.approx([0.0, 0.125, 0.25, 0.375, 0.5, 0.5])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "later"),
    [
        ("train.lr=1e-3", 0.01),
        ("rollout.batch_invariant=false", 0.02),
        ("model.attention=eager", 0.02),
        ("rollout.temperature=0.5", 0.02),
    ],
)
def test_a_measured_rounding_is_kept_by_a_resumed_run_of_the_same_engine(
    make_config, tmp_path, monkeypatch, override, later
) -> None:
    """Here every measurement gives another."""
    measured = (Rounding(9, 0.01, 0.1 * n, ((0.99, 0.01 * n),)) for n in itertools.count(1))
    monkeypatch.setattr(rollout, "measure_rounding", lambda *_, **__: next(measured))
    config = make_config(
        rollout={"rule": "coupled", "tolerance": "auto"},
        train={"epochs": 4, "max_steps": 5},
        eval={"num_train_prompts": 0},
        log={"run_dir": str(tmp_path / "run")},
    )
    run(config)
    resume(tmp_path / "run", ["train.max_steps=none", override])
    rows = read_rows(tmp_path / "run")
    assert [row.get("tolerance") for row in rows] == [None] * 2 + [0.01] * 3 + [later] * 3
    assert {row.get("rounding_largest") for row in rows} == {None, 0.1, 10 * later}
