"""Algorithms by name, and what each needs of the trainer."""

from __future__ import annotations

import pytest
import torch

from spec_rollout.config.sections import ConfigError, TrainConfig
from spec_rollout.train import algorithms
from spec_rollout.train.algorithms import DAPO, GRPO, PPO, AdvantageInputs, LossInputs, Needs


def test_a_name_gives_its_algorithm() -> None:
    assert algorithms.names() == ("grpo", "ppo", "dapo")
    assert isinstance(algorithms.make(TrainConfig()), GRPO)
    assert isinstance(algorithms.make(TrainConfig("ppo")), PPO)
    assert isinstance(algorithms.make(TrainConfig("dapo")), DAPO)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    expected = "train.algorithm: expected one of grpo, ppo, dapo, got 'gpro'; did you mean 'grpo'?"
    with pytest.raises(ConfigError) as caught:
        algorithms.make(TrainConfig(algorithm="gpro"))
    assert str(caught.value) == expected


def test_what_grpo_needs_follows_from_its_settings() -> None:
    # A response alone is its own mean: its advantage is 0.
    assert GRPO(TrainConfig(kl_coef=0.0)).needs == Needs(group_size=2)
    assert GRPO(TrainConfig()).needs == Needs(reference=True, group_size=2)
    recomputed = GRPO(TrainConfig(recompute_logprobs=True, kl_coef=0.0)).needs
    assert recomputed == Needs(recomputed_logprobs=True, group_size=2)


def test_grpo_spreads_group_advantages_over_tokens() -> None:
    config = TrainConfig(normalize_advantages=False)
    rewards = torch.tensor([[1.0, 0.0], [2.0, 2.0]], dtype=torch.float64)
    result = GRPO(config).advantages(
        AdvantageInputs(rewards, torch.tensor([2, 1, 1, 0]), torch.zeros(4, dtype=torch.bool), 2)
    )
    assert result.advantages.tolist() == [0.5, 0.5, -0.5, 0.0]
    assert result.advantages.dtype == torch.float32
    assert result.returns is None


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_the_sums_of_a_loss_are_those_named(kl_coef: float) -> None:
    grpo = GRPO(TrainConfig(kl_coef=kl_coef))
    x = torch.zeros(3)
    ref_logprobs = torch.ones(3) if kl_coef else None
    out = grpo.loss(LossInputs(x, x, x, x, ref_logprobs))
    assert set(out.sums) == set(grpo.sum_names)
    assert ("kl" in out.sums) == bool(kl_coef)
