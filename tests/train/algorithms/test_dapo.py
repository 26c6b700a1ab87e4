"""DAPO's shaping, advantages and loss against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from spec_rollout.config.sections import ConfigError, TrainConfig
from spec_rollout.train.algorithms import DAPO, AdvantageInputs, LossInputs, Needs
from spec_rollout.train.algorithms.dapo import overlong_penalties


def test_what_it_needs_and_refuses() -> None:
    assert DAPO(TrainConfig("dapo")).needs == Needs(group_size=2, refill_rounds=3)
    assert DAPO(TrainConfig("dapo", kl_coef=0.0)).needs.reference is False
    with pytest.raises(ConfigError, match=r"train\.kl_coef: expected 0\.0 with .*, got 0\.1"):
        DAPO(TrainConfig("dapo", kl_coef=0.1))
    with pytest.raises(ConfigError, match=r"train\.loss_aggregation: expected 'token_mean'"):
        DAPO(TrainConfig("dapo", loss_aggregation="seq_mean"))


def test_penalties_hand_computed() -> None:
    # At most 20 tokens, of which the last 4 cost: eq. 13 of the paper.
    lens = torch.tensor([0, 10, 16, 17, 18, 20])
    expected = [0.0, 0.0, 0.0, -0.5, -1.0, -2.0]
    assert overlong_penalties(lens, 20, 4, 2.0).tolist() == expected
    assert overlong_penalties(lens, 20, 0, 2.0).tolist() == [0.0] * 6


def test_advantages_are_of_the_shaped_rewards() -> None:
    rewards = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    lens = torch.tensor([4, 10, 9, 2])
    inputs = AdvantageInputs(rewards, lens, lens == 10, 10)
    result = DAPO(TrainConfig("dapo", normalize_advantages=False)).advantages(inputs)
    # A fifth of 10 tokens: 10 costs 1, 9 costs 0.5. Group 0: 1, 0. Group 1: -0.5, 1.
    per_response = [0.5, -0.5, -0.75, 0.75]
    expected = [a for a, n in zip(per_response, lens.tolist(), strict=True) for _ in range(n)]
    assert result.advantages.tolist() == expected
    assert result.metrics == {"overlong_penalty": -0.375}
    off = TrainConfig("dapo", overlong_buffer=0)
    assert not DAPO(off).advantages(inputs).advantages[:14].any()


def test_the_upper_clip_is_higher() -> None:
    # Ratios 1.25 and 1.5: the first is inside [0.8, 1.28], and outside GRPO's range.
    logprobs = torch.log(torch.tensor([0.25, 0.3])).requires_grad_()
    old, ones = torch.log(torch.tensor([0.2, 0.2])), torch.ones(2)
    dapo = DAPO(TrainConfig("dapo"))
    out = dapo.loss(LossInputs(logprobs, old, ones, ones / 2))
    assert out.loss.item() == pytest.approx(-(1.25 + 1.28) / 2)
    out.loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([-0.625, 0.0]))
    assert set(out.sums) == set(dapo.sum_names)


def test_every_token_counts_the_same() -> None:
    weights = DAPO(TrainConfig("dapo")).token_weights(torch.tensor([1, 3]), 9)
    assert weights.tolist() == [0.25, 0.25]
