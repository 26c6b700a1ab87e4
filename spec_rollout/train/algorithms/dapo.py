"""DAPO (Yu et al., 2025, arXiv 2503.14476).

GRPO with a higher upper clip, a loss over tokens, groups that differ in reward, and a penalty for
responses that are nearly too long.
"""

from __future__ import annotations

import torch

from spec_rollout.config.sections import ConfigError, TrainConfig
from spec_rollout.train.algorithms.advantages import group_advantages, per_token
from spec_rollout.train.algorithms.base import (
    AdvantageInputs,
    Advantages,
    LossInputs,
    LossOutputs,
    Needs,
)
from spec_rollout.train.algorithms.losses import policy_loss, token_weights

# Of 20,480 tokens the last 4,096 cost reward in the paper.
_BUFFER_SHARE = 5


class DAPO:
    """Group advantages of shaped rewards, and the clipped policy loss over tokens, without a KL.

    The trainer puts other prompts in the place of groups whose rewards are all equal.

    Raises:
        ConfigError: if a KL or another loss than that over tokens is asked for.
    """

    def __init__(self, config: TrainConfig) -> None:
        for key, wanted in (("kl_coef", 0.0), ("loss_aggregation", "token_mean")):
            value = getattr(config, key)
            if value not in (None, wanted):
                raise ConfigError(
                    f"train.{key}: expected {wanted!r} with train.algorithm = 'dapo' (grpo takes "
                    f"others), got {value!r}"
                )
        self._config = config
        self._numbers = config.numbers()

    @property
    def needs(self) -> Needs:
        return Needs(
            recomputed_logprobs=self._config.recompute_logprobs,
            group_size=2,
            refill_rounds=self._config.refill_rounds,
        )

    @property
    def sum_names(self) -> tuple[str, ...]:
        return ("approx_kl", "clip_fraction")

    def advantages(self, inputs: AdvantageInputs) -> Advantages:
        buffer = self._config.overlong_buffer
        if buffer is None:
            buffer = inputs.max_tokens // _BUFFER_SHARE
        penalties = overlong_penalties(
            inputs.response_lens, inputs.max_tokens, buffer, self._config.overlong_penalty
        )
        shaped = inputs.rewards + penalties.view_as(inputs.rewards)
        grouped = group_advantages(shaped, normalize=self._config.normalize_advantages)
        return Advantages(
            per_token(grouped.flatten(), inputs.response_lens),
            metrics={"overlong_penalty": float(penalties.mean()) if penalties.numel() else 0.0},
        )

    def token_weights(self, response_lens: torch.Tensor, max_tokens: int) -> torch.Tensor:
        return token_weights(response_lens, "token_mean", max_tokens)

    def loss(self, inputs: LossInputs) -> LossOutputs:
        numbers = self._numbers
        return policy_loss(inputs, clip_low=numbers.clip_low, clip_high=numbers.clip_high)


def overlong_penalties(
    lens: torch.Tensor, max_tokens: int, buffer: int, penalty: float
) -> torch.Tensor:
    """What each response loses by its length: 0 up to `max_tokens - buffer`, then in proportion,
    `penalty` at `max_tokens` (DAPO, eq. 13).

    Args:
        lens: [batch], int64.
        buffer: 0 is off.

    Returns:
        [batch], float64, at most 0.
    """
    if buffer == 0:
        return torch.zeros(lens.shape, dtype=torch.float64)
    over = (lens - (max_tokens - buffer)).clamp(min=0).double()
    return -penalty * (over / buffer).clamp(max=1.0)
