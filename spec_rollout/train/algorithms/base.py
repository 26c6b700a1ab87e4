"""What an algorithm is: advantages from rewards, a loss from log-probs, and what both need.

The trainer rolls out, scores, asks for advantages, and sums the loss over micro-batches. It knows
nothing of the formulas; an algorithm knows nothing of models, batches and devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class Needs:
    """What an algorithm needs of the trainer.

    Attributes:
        reference: `LossInputs.ref_logprobs`, from a frozen model.
        recomputed_logprobs: `LossInputs.old_logprobs` from a forward pass of the trainer before the
            first optimizer step, instead of the engine's own.
        values: `AdvantageInputs.values` and `LossInputs.values`, from a value head that is trained
            with the policy.
        group_size: Responses per prompt; with fewer nothing would be learned.
        refill_rounds: How often a step draws other prompts in the place of those whose rewards are
            all equal; what is left of these then is no part of the update.
    """

    reference: bool = False
    recomputed_logprobs: bool = False
    values: bool = False
    group_size: int = 1
    refill_rounds: int = 0


@dataclass(frozen=True, slots=True)
class AdvantageInputs:
    """A batch of scored rollouts. Tensors are on the CPU.

    Rollout r is sample r % group_size of prompt r // group_size.

    Attributes:
        rewards: NaN where a response is skipped. [num_groups, group_size], float64.
        response_lens: [num_groups * group_size], int64.
        truncated: Whether a response ended at `max_tokens`. [num_groups * group_size], bool.
        max_tokens: Longest response allowed.
        values: Of the state in which each response token was drawn, response after response; None
            without `Needs.values`. [num_response_tokens], float32.
    """

    rewards: torch.Tensor
    response_lens: torch.Tensor
    truncated: torch.Tensor
    max_tokens: int
    values: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Advantages:
    """What the update trains with.

    Attributes:
        advantages: One per response token, response after response. [num_response_tokens],
            float32.
        returns: What the value head should say there; None without `Needs.values`.
            [num_response_tokens], float32.
        metrics: By their names in metrics.jsonl.
    """

    advantages: torch.Tensor
    returns: torch.Tensor | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LossInputs:
    """Response tokens of one micro-batch, end to end, on the model's device.

    Attributes:
        logprobs: Under the policy being trained. [num_tokens], float32, differentiable.
        old_logprobs: Under the policy that drew them; of reused tokens under the one that took
            them again, unless `train.correction` says otherwise. [num_tokens], float32.
        advantages: [num_tokens], float32.
        weights: Share of each token in the minibatch's loss (`Algorithm.token_weights`).
            [num_tokens], float32.
        ref_logprobs: Under the reference; None without `Needs.reference`. [num_tokens], float32.
        values: Of the value head now; None without `Needs.values`. [num_tokens], float32,
            differentiable.
        old_values: The same before the first optimizer step. [num_tokens], float32.
        returns: See `Advantages`. [num_tokens], float32.
        importance: Factor of each token's policy loss, of who drew it; None is 1. [num_tokens],
            float32.
    """

    logprobs: torch.Tensor
    old_logprobs: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor
    ref_logprobs: torch.Tensor | None = None
    values: torch.Tensor | None = None
    old_values: torch.Tensor | None = None
    returns: torch.Tensor | None = None
    importance: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class LossOutputs:
    """Loss of the tokens given, and sums over them.

    Attributes:
        loss: Scalar, differentiable. Losses of micro-batches add up to that of the minibatch.
        sums: Scalars without gradient, one for each of `Algorithm.sum_names`. Divided by the number
            of tokens they are the means in metrics.jsonl.
    """

    loss: torch.Tensor
    sums: Mapping[str, torch.Tensor]


class Algorithm(Protocol):
    """Pure functions and their settings: no state changes between calls."""

    @property
    def needs(self) -> Needs:
        """What the trainer must provide."""
        ...

    @property
    def sum_names(self) -> tuple[str, ...]:
        """Keys of `LossOutputs.sums`, as the metrics they become are called."""
        ...

    def advantages(self, inputs: AdvantageInputs) -> Advantages:
        """Advantages of a whole batch, from its rewards."""
        ...

    def token_weights(self, response_lens: torch.Tensor, max_tokens: int) -> torch.Tensor:
        """Weight of each token of a minibatch in its loss; its tokens' weights sum to 1 at most.

        Args:
            response_lens: Of all responses of the minibatch. [batch], int64, at least 1 each.
            max_tokens: Longest response allowed.

        Returns:
            One weight per response; its tokens all have it. [batch], float32.
        """
        ...

    def loss(self, inputs: LossInputs) -> LossOutputs:
        """The loss of a micro-batch."""
        ...
