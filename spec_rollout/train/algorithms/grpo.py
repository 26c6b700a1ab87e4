"""GRPO (Shao et al., 2024, arXiv 2402.03300): a group's rewards are each other's baseline.

With `normalize_advantages = false` and `loss_aggregation = "constant"` it is Dr. GRPO (Liu et al.,
2025, arXiv 2503.20783), which divides neither by the deviation of a group's rewards nor by the
length of a response.
"""

from __future__ import annotations

import torch

from spec_rollout.config.sections import TrainConfig
from spec_rollout.train.algorithms.advantages import group_advantages, per_token
from spec_rollout.train.algorithms.base import (
    AdvantageInputs,
    Advantages,
    LossInputs,
    LossOutputs,
    Needs,
)
from spec_rollout.train.algorithms.losses import policy_loss, token_weights


class GRPO:
    """Group advantages and the clipped policy loss, with a KL term if `kl_coef` > 0."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._numbers = config.numbers()

    @property
    def needs(self) -> Needs:
        return Needs(
            reference=self._numbers.kl_coef > 0,
            recomputed_logprobs=self._config.recompute_logprobs,
            group_size=2,
        )

    @property
    def sum_names(self) -> tuple[str, ...]:
        names = ("approx_kl", "clip_fraction")
        return (*names, "kl") if self.needs.reference else names

    def advantages(self, inputs: AdvantageInputs) -> Advantages:
        grouped = group_advantages(inputs.rewards, normalize=self._config.normalize_advantages)
        return Advantages(per_token(grouped.flatten(), inputs.response_lens))

    def token_weights(self, response_lens: torch.Tensor, max_tokens: int) -> torch.Tensor:
        return token_weights(response_lens, self._config.loss_aggregation, max_tokens)

    def loss(self, inputs: LossInputs) -> LossOutputs:
        numbers = self._numbers
        return policy_loss(
            inputs,
            clip_low=numbers.clip_low,
            clip_high=numbers.clip_high,
            kl_coef=numbers.kl_coef,
        )
