"""What every rollout engine promises."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import torch

from spec_rollout.acceptance import AcceptanceRule
from spec_rollout.types import RolloutRequests, Rollouts, SamplingParams


@runtime_checkable
class RolloutEngine(Protocol):
    """Verifies drafts, keeps the KV cache of the accepted prefix and generates on from there.

    An engine with an attribute `supports_history` that is true also takes `RolloutRequests.history`
    and proposes from it; others are never given one.
    """

    @property
    def policy_version(self) -> int:
        """Number of `update_weights` calls so far."""
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
