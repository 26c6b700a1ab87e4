"""PPO (Schulman et al., 2017, arXiv 1707.06347): a value head is the baseline of every token."""

from __future__ import annotations

import torch

from spec_rollout.config.sections import ConfigError, TrainConfig
from spec_rollout.train.algorithms.advantages import per_token
from spec_rollout.train.algorithms.base import (
    AdvantageInputs,
    Advantages,
    LossInputs,
    LossOutputs,
    Needs,
)
from spec_rollout.train.algorithms.gae import gae, whitened
from spec_rollout.train.algorithms.losses import policy_loss, token_weights, value_loss


class PPO:
    """GAE, the clipped policy loss and the clipped value loss.

    Raises:
        ConfigError: if responses without advantage were to be left out: their values are learned.
    """

    def __init__(self, config: TrainConfig) -> None:
        if config.skip_zero_advantage:
            raise ConfigError(
                "train.skip_zero_advantage: expected false with train.algorithm = 'ppo' (the value "
                "head learns from every response), got True"
            )
        self._config = config
        self._numbers = config.numbers()

    @property
    def needs(self) -> Needs:
        return Needs(
            reference=self._numbers.kl_coef > 0,
            recomputed_logprobs=self._config.recompute_logprobs,
            values=True,
        )

    @property
    def sum_names(self) -> tuple[str, ...]:
        names = ("approx_kl", "clip_fraction", "value_loss", "value_clip_fraction")
        return (*names, "kl") if self.needs.reference else names

    def advantages(self, inputs: AdvantageInputs) -> Advantages:
        if inputs.values is None:
            raise ValueError("values: expected those of the value head, got None")
        rewards = inputs.rewards.flatten()
        given = per_token(~torch.isnan(rewards), inputs.response_lens)
        estimate = gae(
            rewards.nan_to_num(),
            inputs.values,
            inputs.response_lens,
            gamma=self._config.gamma,
            gae_lambda=self._config.gae_lambda,
        )
        advantages = torch.where(given, estimate.advantages, 0.0)
        if self._config.normalize_advantages:
            advantages = whitened(advantages, given)
        return Advantages(
            advantages,
            # A response that is left out teaches the value head nothing.
            torch.where(given, estimate.returns, inputs.values),
            {
                "value_mean": float(inputs.values[given].mean()) if bool(given.any()) else 0.0,
                "explained_variance": _explained(inputs.values[given], estimate.returns[given]),
            },
        )

    def token_weights(self, response_lens: torch.Tensor, max_tokens: int) -> torch.Tensor:
        return token_weights(response_lens, self._config.loss_aggregation, max_tokens)

    def loss(self, inputs: LossInputs) -> LossOutputs:
        numbers, config = self._numbers, self._config
        policy = policy_loss(
            inputs,
            clip_low=numbers.clip_low,
            clip_high=numbers.clip_high,
            kl_coef=numbers.kl_coef,
        )
        value = value_loss(inputs, clip=config.clip_value)
        return LossOutputs(
            policy.loss + config.value_coef * value.loss, {**policy.sums, **value.sums}
        )


def _explained(values: torch.Tensor, returns: torch.Tensor) -> float:
    """Share of the returns' variance that the values explain; 0 where there is none."""
    if returns.numel() < 2:
        return 0.0
    variance = float(returns.double().var(correction=0))
    left = float((returns.double() - values.double()).var(correction=0))
    return 1.0 - left / variance if variance > 0 else 0.0
