"""When checkpoints are due: by steps, by time, and not so often that writing takes long."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from checkpoint_parts import Parts

from spec_rollout.config.sections import CheckpointConfig
from spec_rollout.train.checkpoint import TrainState
from spec_rollout.train.keeper import CheckpointKeeper


class Clock:
    """Seconds as they are told; so many pass between two looks at it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.per_look = 0.0

    def __call__(self) -> float:
        self.now += self.per_look
        return self.now


def keeper_of(parts: Any, root, clock: Clock, **config: Any) -> CheckpointKeeper:
    return CheckpointKeeper(CheckpointConfig(**config), root, parts, clock)


def test_by_steps(tmp_path) -> None:
    keeper = keeper_of(None, tmp_path, Clock(), every_steps=3, every_minutes=None)
    assert [step for step in range(10) if keeper.due(step)] == [3, 6, 9]
    never = keeper_of(None, tmp_path, Clock(), every_minutes=None)
    assert not any(never.due(step) for step in range(10))


def test_by_time(model_dir, tmp_path) -> None:
    model = Parts(model_dir)
    parts = SimpleNamespace(
        state=TrainState(0, "abc"),
        policy=SimpleNamespace(model=model.model, tokenizer=model.policy.tokenizer),
        optimizer=model.optimizer,
        cache=model.cache,
        value_head=None,
        lenience=None,
        rounding_state=dict,
        store=SimpleNamespace(inner=None),
    )
    clock = Clock()
    keeper = keeper_of(parts, tmp_path, clock)
    assert CheckpointConfig().every_minutes == 10
    clock.now += 599
    assert not keeper.due(5)
    clock.now += 1
    assert keeper.due(5)
    assert keeper.newest() is None
    keeper.save(5, None)
    assert keeper.newest() == 5
    clock.now += 599
    assert not keeper.due(6)
    clock.now += 1
    assert keeper.due(6)
    # One that takes a minute is not written more often than every twenty.
    clock.per_look = 60.0
    keeper.save(6, {"step": 6, "epoch": 0})
    clock.per_look = 0.0
    clock.now += 1199
    assert not keeper.due(7)
    clock.now += 1
    assert keeper.due(7)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000005",
        "step-00000006-unevaluated",
    ]
