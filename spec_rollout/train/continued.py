"""An engine in a run that went on in another process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from spec_rollout.acceptance import AcceptanceRule
from spec_rollout.engines.base import EngineCounters, RolloutEngine
from spec_rollout.types import RolloutRequests, Rollouts, SamplingParams


class ContinuedEngine:
    """Another engine, whose `policy_version` counts on from the updates of the run before.

    See `RolloutEngine`.
    """

    def __init__(self, engine: RolloutEngine, first_version: int) -> None:
        """
        Args:
            engine: Does all the work.
            first_version: Updates that its weights had seen when it was made.
        """
        self._engine: Any = engine
        self._first_version = first_version - engine.policy_version

    @property
    def before_step(self) -> Callable[[], None] | None:
        return self._engine.before_step

    @before_step.setter
    def before_step(self, call: Callable[[], None] | None) -> None:
        self._engine.before_step = call

    @property
    def policy_version(self) -> int:
        return self._first_version + self._engine.policy_version

    @property
    def supports_history(self) -> bool:
        return self._engine.supports_history

    @property
    def batch_invariant(self) -> bool | None:
        """See `TransformersEngine`; None of an engine that does not say."""
        return getattr(self._engine, "batch_invariant", None)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """See `TransformersEngine`; none of an engine that does not say."""
        return getattr(self._engine, "eos_token_ids", ())

    @property
    def last_counters(self) -> EngineCounters | None:
        return self._engine.last_counters

    def rollout(
        self, requests: RolloutRequests, sampling: SamplingParams, acceptance: AcceptanceRule
    ) -> Rollouts:
        rollouts = self._engine.rollout(requests, sampling, acceptance)
        return replace(rollouts, policy_version=self._first_version + rollouts.policy_version)

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self._engine.update_weights(named_tensors)

    def sleep(self) -> None:
        """Of vLLM's; see `VLLMEngine`."""
        self._engine.sleep()

    def wake_up(self) -> None:
        """Of vLLM's; see `VLLMEngine`."""
        self._engine.wake_up()
