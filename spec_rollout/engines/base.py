"""What every rollout engine promises."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, Self, runtime_checkable

import torch

from spec_rollout.acceptance import AcceptanceRule
from spec_rollout.types import RolloutRequests, Rollouts, SamplingParams


class EngineCounters(Protocol):
    """What only one engine counts, of one or more rollouts; beside `RolloutStats` in a log."""

    def __add__(self, other: Self, /) -> Self:
        """Of the rollouts of both."""
        ...

    def as_row(self) -> Mapping[str, float]:
        """Keys begin with the engine's name (`vllm_num_wasted_tokens`).

        Shares are of the sums, so they cannot be made of the rows of several rollouts.
        """
        ...


@runtime_checkable
class RolloutEngine(Protocol):
    """Verifies drafts, keeps the KV cache of the accepted prefix and generates on from there.

    This is all that a rollout session and a trainer ask of an engine.

    Attributes:
        before_step: Called before every engine step of a rollout; None calls nothing. What it
            raises ends the rollout, and leaves the engine ready for the next one.
    """

    before_step: Callable[[], None] | None

    @property
    def policy_version(self) -> int:
        """Number of `update_weights` calls so far."""
        ...

    @property
    def supports_history(self) -> bool:
        """Whether `RolloutRequests.history` is taken and proposed from.

        An engine that does not is never given one.
        """
        ...

    @property
    def last_counters(self) -> EngineCounters | None:
        """What only this engine counts, of the last rollout; None if there is no such thing."""
        ...

    def rollout(
        self, requests: RolloutRequests, sampling: SamplingParams, acceptance: AcceptanceRule
    ) -> Rollouts:
        """Generates one response per request.

        A row without a draft is plain sampling. Stop tokens, max_tokens and empty drafts behave
        exactly as without drafts. Rows come back in the order of the requests.

        Raises:
            ValueError: naming the argument, before anything is computed.
        """
        ...

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copies new weights in place and forgets everything computed with the old ones."""
        ...
