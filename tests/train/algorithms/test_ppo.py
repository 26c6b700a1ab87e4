"""PPO's advantages and losses against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from spec_rollout.config.sections import ConfigError, TrainConfig
from spec_rollout.train.algorithms import PPO, AdvantageInputs, LossInputs, Needs
from spec_rollout.train.algorithms.losses import value_loss

PLAIN = {"normalize_advantages": False}


def _inputs(rewards: list[list[float]], lens: list[int], values: list[float]) -> AdvantageInputs:
    return AdvantageInputs(
        torch.tensor(rewards, dtype=torch.float64),
        torch.tensor(lens),
        torch.zeros(len(lens), dtype=torch.bool),
        9,
        torch.tensor(values),
    )


def test_what_it_needs() -> None:
    assert PPO(TrainConfig("ppo")).needs == Needs(values=True)  # one response is enough
    assert PPO(TrainConfig("ppo", kl_coef=0.1)).needs == Needs(values=True, reference=True)
    with pytest.raises(ConfigError, match=r"train\.skip_zero_advantage: expected false"):
        PPO(TrainConfig("ppo", skip_zero_advantage=True))


def test_advantages_and_returns_hand_computed() -> None:
    result = PPO(TrainConfig("ppo", **PLAIN)).advantages(
        _inputs([[1.0, math.nan], [0.0, 3.0]], [2, 2, 1, 1], [0.5, 0.0, 7.0, 8.0, 1.0, 2.0])
    )
    # Without discounts: reward - value; the response without a reward teaches nothing.
    assert result.advantages.tolist() == [0.5, 1.0, 0.0, 0.0, -1.0, 1.0]
    assert result.returns is not None
    assert result.returns.tolist() == [1.0, 1.0, 7.0, 8.0, 0.0, 3.0]
    assert result.metrics["value_mean"] == pytest.approx(0.875)
    # Returns 1, 1, 0, 3: variance 1.1875; errors 0.5, 1, -1, 1: variance 0.671875.
    assert result.metrics["explained_variance"] == pytest.approx(1 - 0.671875 / 1.1875)


def test_advantages_are_whitened_over_all_tokens() -> None:
    config = TrainConfig("ppo", gamma=0.9, gae_lambda=0.7)
    inputs = _inputs([[1.0, 0.0]], [3, 2], [0.1, 0.4, 0.2, -0.3, 0.6])
    result = PPO(config).advantages(inputs)
    raw = PPO(TrainConfig("ppo", gamma=0.9, gae_lambda=0.7, **PLAIN)).advantages(inputs)
    # verl's masked_whiten: (x - mean) * rsqrt(unbiased variance + 1e-8).
    expected = (raw.advantages - raw.advantages.mean()) / (raw.advantages.var() + 1e-8).sqrt()
    torch.testing.assert_close(result.advantages, expected)
    assert torch.equal(result.returns, raw.returns)  # the value head learns unscaled ones


def test_value_loss_hand_computed() -> None:
    # Old value 0, clip 0.5, weights 0.1, 0.2, 0.3, 0.4:
    #   V 0.2, R 1: inside, (0.8)^2 = 0.64              gradient w (V - R) = 0.1 * -0.8
    #   V 0.8, R 1: clipped 0.5, max(0.04, 0.25) = 0.25  no gradient
    #   V 0.8, R 0: clipped 0.5, max(0.64, 0.25) = 0.64  gradient 0.3 * 0.8
    #   V -0.9, R -2: clipped -0.5, max(1.21, 2.25)      no gradient
    values = torch.tensor([0.2, 0.8, 0.8, -0.9], requires_grad=True)
    x = torch.zeros(4)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4])
    out = value_loss(
        LossInputs(
            x, x, x, weights, values=values, old_values=x,
            returns=torch.tensor([1.0, 1.0, 0.0, -2.0]),
        ),
        clip=0.5,
    )  # fmt: skip
    per_token = [0.32, 0.125, 0.32, 1.125]
    assert out.loss.item() == pytest.approx(
        sum(w * v for w, v in zip(weights.tolist(), per_token, strict=True))
    )
    out.loss.backward()
    torch.testing.assert_close(values.grad, torch.tensor([-0.08, 0.0, 0.24, 0.0]))
    assert float(out.sums["value_loss"]) == pytest.approx(sum(per_token))
    assert int(out.sums["value_clip_fraction"]) == 2


def test_value_loss_by_finite_differences() -> None:
    generator = torch.Generator().manual_seed(4)

    def draw() -> torch.Tensor:
        return torch.randn(50, generator=generator, dtype=torch.float64)

    old, returns, x = draw(), draw(), torch.zeros(50)
    values = old + 0.6 * draw()
    weights = torch.rand(50, generator=generator, dtype=torch.float64)

    def loss(given: torch.Tensor) -> torch.Tensor:
        inputs = LossInputs(
            x, x, x, weights, values=given, old_values=old, returns=returns
        )  # fmt: skip
        return value_loss(inputs, clip=0.4).loss

    assert torch.autograd.gradcheck(loss, (values.requires_grad_(),), eps=1e-7, atol=1e-6)


def test_the_loss_is_the_sum_of_both() -> None:
    config = TrainConfig("ppo", value_coef=0.25, clip_value=0.5, clip_high=0.3)
    logprobs = torch.log(torch.tensor([0.3, 0.1])).requires_grad_()
    values = torch.tensor([0.2, 0.4], requires_grad=True)
    inputs = LossInputs(
        logprobs,
        torch.log(torch.tensor([0.2, 0.2])),
        torch.tensor([2.0, 2.0]),
        torch.tensor([0.5, 0.5]),
        values=values,
        old_values=torch.zeros(2),
        returns=torch.ones(2),
    )
    ppo = PPO(config)
    out = ppo.loss(inputs)
    policy = -0.5 * (1.3 * 2 + 0.5 * 2)  # ratios 1.5 (clipped at 1.3) and 0.5
    value = 0.5 * 0.5 * (0.8**2 + 0.6**2)
    assert out.loss.item() == pytest.approx(policy + 0.25 * value)
    out.loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, -0.5]))
    torch.testing.assert_close(values.grad, 0.25 * 0.5 * torch.tensor([-0.8, -0.6]))
    assert set(out.sums) == set(ppo.sum_names)


def test_what_is_missing_is_named() -> None:
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="values, old_values, returns: expected all three"):
        value_loss(LossInputs(x, x, x, x, values=x))
    with pytest.raises(ValueError, match=r"returns: expected shape \[3\]"):
        value_loss(LossInputs(x, x, x, x, values=x, old_values=x, returns=torch.zeros(2)))
