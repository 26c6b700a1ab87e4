"""The embedded engine keeps the whole promise of `RolloutEngine`."""

from __future__ import annotations

import pytest
from tiny_models import SAMPLING, assert_same, build, drafts_of, random_requests, with_drafts

from spec_rollout.acceptance import Coupled
from spec_rollout.engines.base import RolloutEngine
from spec_rollout.engines.transformers import TransformersEngine


class StopError(Exception):
    pass


@pytest.fixture
def engine() -> TransformersEngine:
    return TransformersEngine(build("llama"), num_slots=2)


def test_it_is_a_rollout_engine_without_counters_of_its_own(engine: TransformersEngine) -> None:
    assert isinstance(engine, RolloutEngine)
    assert engine.supports_history
    engine.rollout(random_requests(2), SAMPLING, Coupled())
    assert engine.last_counters is None


def test_before_step_is_called_before_each_step(engine: TransformersEngine) -> None:
    calls = []
    engine.before_step = lambda: calls.append(0)
    rollouts = engine.rollout(random_requests(5), SAMPLING, Coupled())
    assert rollouts.running is not None
    assert len(calls) == rollouts.running.shape[0] > 5


@pytest.mark.parametrize("step", [1, 2, 9])
def test_what_before_step_raises_ends_the_rollout_and_leaves_the_engine_as_it_was(
    engine: TransformersEngine, step: int
) -> None:
    requests = random_requests(5)
    expected = engine.rollout(requests, SAMPLING, Coupled())
    left = [step]

    def count() -> None:
        left[0] -= 1
        if left[0] == 0:
            raise StopError

    engine.before_step = count
    again = with_drafts(requests, drafts_of(expected).cut_to(expected.response_lens // 2))
    with pytest.raises(StopError):
        engine.rollout(again, SAMPLING, Coupled())
    engine.before_step = None
    assert_same(engine.rollout(again, SAMPLING, Coupled()), expected)
