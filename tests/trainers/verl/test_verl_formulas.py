"""The trainer's formulas against verl's own functions, on the same inputs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from spec_rollout.config.sections import TrainConfig
from spec_rollout.train.algorithms import DAPO, GRPO, PPO, AdvantageInputs, LossInputs
from spec_rollout.train.algorithms.losses import k3, policy_loss, token_weights, value_loss

core = pytest.importorskip("verl.trainer.ppo.core_algos")

LENS = torch.tensor([4, 1, 7, 2, 5, 3])
MAX_TOKENS = 7
MASK = (torch.arange(MAX_TOKENS) < LENS[:, None]).float()
AGGREGATIONS = {
    "token_mean": "token-mean",
    "seq_mean": "seq-mean-token-mean",
    "constant": "seq-mean-token-sum-norm",
}


def padded(packed: torch.Tensor) -> torch.Tensor:
    """[num_tokens] -> [batch, MAX_TOKENS], zeros elsewhere."""
    return torch.zeros(MASK.shape).masked_scatter(MASK.bool(), packed)


def draw(seed: int) -> torch.Tensor:
    return torch.randn(int(LENS.sum()), generator=torch.Generator().manual_seed(seed))


def inputs(rewards: torch.Tensor, values: torch.Tensor | None = None) -> AdvantageInputs:
    return AdvantageInputs(rewards, LENS, LENS == MAX_TOKENS, MAX_TOKENS, values)


def at_the_end(rewards: torch.Tensor) -> torch.Tensor:
    """The reward of each response at its last token."""
    result = torch.zeros(MASK.shape)
    result[torch.arange(LENS.numel()), LENS - 1] = rewards.flatten().float()
    return result


@pytest.mark.parametrize("normalize", [True, False])
def test_group_advantages(normalize: bool) -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.5], [2.0, 2.0, -1.0]], dtype=torch.float64)
    config = TrainConfig(kl_coef=0.0, normalize_advantages=normalize)
    ours = GRPO(config).advantages(inputs(rewards)).advantages
    expected, _ = core.compute_grpo_outcome_advantage(
        at_the_end(rewards),
        MASK,
        np.array([0, 0, 0, 1, 1, 1]),
        epsilon=1e-4,
        norm_adv_by_std_in_grpo=normalize,
    )
    torch.testing.assert_close(padded(ours), expected)


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 1.0), (0.99, 0.95), (0.5, 0.0)])
def test_generalised_advantages(gamma: float, gae_lambda: float) -> None:
    rewards, values = torch.tensor([[1.0, 0.0, 0.5], [2.0, 2.0, -1.0]]).double(), draw(0)
    config = TrainConfig("ppo", gamma=gamma, gae_lambda=gae_lambda)
    ours = PPO(config).advantages(inputs(rewards, values))
    advantages, returns = core.compute_gae_advantage_return(
        at_the_end(rewards), padded(values), MASK, gamma, gae_lambda
    )
    torch.testing.assert_close(padded(ours.advantages), advantages * MASK)
    assert ours.returns is not None
    torch.testing.assert_close(padded(ours.returns), returns * MASK)


def _weights(aggregation: str) -> torch.Tensor:
    return torch.repeat_interleave(token_weights(LENS, aggregation, MAX_TOKENS), LENS)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("importance", [False, True])
def test_policy_loss_and_gradient(aggregation: str, importance: bool) -> None:
    old, advantages = draw(1) - 3, draw(2)
    new = (old + 0.3 * draw(3)).clamp(max=0)
    assert float((new - old).max()) < np.log(3)  # verl's second clip, which is not ours, is at 3
    weights = draw(4).exp() if importance else None
    ours_at, verls_at = new.clone().requires_grad_(), new.clone().requires_grad_()
    ours = policy_loss(
        LossInputs(ours_at, old, advantages, _weights(aggregation), importance=weights),
        clip_low=0.2,
        clip_high=0.28,
    )
    config: Any = SimpleNamespace(
        clip_ratio=0.2,
        clip_ratio_low=0.2,
        clip_ratio_high=0.28,
        global_batch_info={},
        get=lambda _key, default: default,
    )
    expected, metrics = core.compute_policy_loss_vanilla(
        padded(old),
        padded(verls_at),
        padded(advantages),
        MASK,
        AGGREGATIONS[aggregation],
        config,
        None if weights is None else padded(weights),
    )
    torch.testing.assert_close(ours.loss, expected)
    ours.loss.backward()
    expected.backward()
    torch.testing.assert_close(ours_at.grad, verls_at.grad)
    share = float(ours.sums["clip_fraction"]) / int(LENS.sum())
    assert share == pytest.approx(metrics["actor/pg_clipfrac"])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_value_loss_and_gradient(aggregation: str) -> None:
    old, returns = draw(5), draw(6)
    new = old + 0.6 * draw(7)
    ours_at, verls_at = new.clone().requires_grad_(), new.clone().requires_grad_()
    x = torch.zeros_like(old)
    ours = value_loss(
        LossInputs(x, x, x, _weights(aggregation), values=ours_at, old_values=old, returns=returns),
        clip=0.4,
    )
    expected, clipped = core.compute_value_loss(
        padded(verls_at), padded(returns), padded(old), MASK, 0.4, AGGREGATIONS[aggregation]
    )
    torch.testing.assert_close(ours.loss, expected)
    ours.loss.backward()
    expected.backward()
    torch.testing.assert_close(ours_at.grad, verls_at.grad)
    share = float(ours.sums["value_clip_fraction"]) / int(LENS.sum())
    assert share == pytest.approx(float(clipped))


def test_kl_estimate() -> None:
    new, ref = draw(8) - 2, draw(9) - 2
    expected = core.kl_penalty(new, ref, "low_var_kl")
    torch.testing.assert_close(k3(ref - new), expected)


def test_dapos_loss_is_over_tokens_with_the_higher_clip() -> None:
    old, advantages = draw(1) - 3, draw(2)
    new = (old + 0.3 * draw(3)).clamp(max=0)
    dapo = DAPO(TrainConfig("dapo"))
    weights = torch.repeat_interleave(dapo.token_weights(LENS, MAX_TOKENS), LENS)
    grpo_like = policy_loss(
        LossInputs(new, old, advantages, _weights("token_mean")), clip_low=0.2, clip_high=0.28
    )
    ours = dapo.loss(LossInputs(new, old, advantages, weights))
    torch.testing.assert_close(ours.loss, grpo_like.loss)
