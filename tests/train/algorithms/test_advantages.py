"""Group advantages against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from spec_rollout.train.algorithms.advantages import group_advantages, per_token

NAN = math.nan


def test_hand_computed():
    # Group 0: mean 0.25, squared deviations 0.5625 + 3 * 0.0625 = 0.75, sample deviation sqrt(0.75
    # / 3) = 0.5. Group 1: mean 4, deviations -3, -1, 1, 3, sample deviation sqrt(20 / 3).
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 3.0, 5.0, 7.0]])
    result = group_advantages(rewards, eps=0.0)
    std = math.sqrt(20 / 3)
    expected = torch.tensor([[1.5, -0.5, -0.5, -0.5], [-3 / std, -1 / std, 1 / std, 3 / std]])
    torch.testing.assert_close(result, expected)
    assert result.dtype == torch.float32


def test_without_normalization_only_the_mean_goes():
    result = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), normalize=False)
    torch.testing.assert_close(result, torch.tensor([[0.75, -0.25, -0.25, -0.25]]))


def test_eps_is_added_to_the_deviation():
    result = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), eps=0.5)
    torch.testing.assert_close(result, torch.tensor([[0.75, -0.25, -0.25, -0.25]]))


@pytest.mark.parametrize(
    "value", [0.0, 1.0, 0.1, 1e6 / 3]
)  # 0.1 and 1e6/3: the mean of equal values rounds
def test_equal_rewards_give_exact_zeros(value):
    rewards = torch.stack(
        [torch.full((7,), value, dtype=torch.float64), torch.arange(7.0).double()]
    )
    result = group_advantages(rewards)
    assert torch.equal(result[0], torch.zeros(7))
    assert bool((result[1] != 0).any())


@pytest.mark.parametrize("scale", [1e150, 1e300, 1.7e308, -1.7e308])
def test_large_rewards_have_the_advantages_of_small_ones(scale):
    shape = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, -1.0, 0.5, NAN], [0.0, 0.0, 1.0, 0.5]])
    rewards = torch.cat([shape.double() * scale, shape.double()])
    result = group_advantages(rewards, eps=0.0)
    expected = result[3:] * (1.0 if scale > 0 else -1.0)
    torch.testing.assert_close(result[:3], expected)
    equal = group_advantages(torch.full((1, 4), scale, dtype=torch.float64))
    assert torch.equal(equal, torch.zeros(1, 4))


def test_without_normalization_what_float32_cannot_hold_is_refused_by_group():
    rewards = torch.tensor([[1.0, 0.0], [1e300, 0.0]], dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"rewards: expected .* float32 holds, got 5e\+299 in group 1"
    ):
        group_advantages(rewards, normalize=False)
    large = group_advantages(torch.tensor([[1e38, 0.0]], dtype=torch.float64), normalize=False)
    torch.testing.assert_close(large, torch.tensor([[5e37, -5e37]]))


def test_skipped_responses_do_not_count():
    rewards = torch.tensor([[1.0, NAN, 0.0], [NAN, 5.0, NAN], [NAN, NAN, NAN]])
    result = group_advantages(rewards, eps=0.0)
    half = math.sqrt(0.5)  # of two rewards 1 and 0: mean 0.5, sample deviation sqrt(0.5)
    expected = torch.tensor([[0.5 / half, 0.0, -0.5 / half], [0.0] * 3, [0.0] * 3])
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize(
    "rewards",
    [torch.zeros(3), torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[math.inf, 0.0]])],
)
def test_bad_rewards(rewards):
    with pytest.raises(ValueError, match="rewards: expected"):
        group_advantages(rewards)


def test_each_token_has_the_value_of_its_row():
    values = per_token(torch.tensor([1.5, 0.0, -2.0]), torch.tensor([2, 0, 3]))
    assert values.tolist() == [1.5, 1.5, -2.0, -2.0, -2.0]
