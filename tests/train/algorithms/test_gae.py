"""Generalised advantage estimation against numbers worked out by hand, and a plain recursion."""

from __future__ import annotations

import pytest
import torch

from spec_rollout.train.algorithms.gae import gae, whitened


def test_hand_computed() -> None:
    # One response of 3 tokens, reward 2, values 1, 3, 0.5; gamma 0.5, lambda 0.5.
    #   delta_2 = 2 - 0.5 = 1.5             A_2 = 1.5
    #   delta_1 = 0.5 * 0.5 - 3 = -2.75     A_1 = -2.75 + 0.25 * 1.5 = -2.375
    #   delta_0 = 0.5 * 3 - 1 = 0.5         A_0 = 0.5 + 0.25 * -2.375 = -0.09375
    values = torch.tensor([1.0, 3.0, 0.5])
    result = gae(torch.tensor([2.0]), values, torch.tensor([3]), gamma=0.5, gae_lambda=0.5)
    expected = torch.tensor([-0.09375, -2.375, 1.5])
    torch.testing.assert_close(result.advantages, expected)
    torch.testing.assert_close(result.returns, expected + values)
    assert result.advantages.dtype == result.returns.dtype == torch.float32


def test_without_discounts_the_return_is_the_reward() -> None:
    values, lens = torch.tensor([0.5, -1.0, 2.0, 0.25]), torch.tensor([1, 3])
    result = gae(torch.tensor([1.0, -2.0]), values, lens)
    torch.testing.assert_close(result.returns, torch.tensor([1.0, -2.0, -2.0, -2.0]))
    torch.testing.assert_close(result.advantages, result.returns - values)


def _plain(rewards, values, lens, gamma, gae_lambda):
    """The recursion as it is written down, token by token."""
    advantages, end = [], 0
    for reward, length in zip(rewards.tolist(), lens.tolist(), strict=True):
        start, end = end, end + length
        row, later, next_value = [], 0.0, 0.0
        for t in reversed(range(start, end)):
            delta = (reward if t == end - 1 else 0.0) + gamma * next_value - float(values[t])
            later = delta + gamma * gae_lambda * later
            next_value = float(values[t])
            row.insert(0, later)
        advantages += row
    return torch.tensor(advantages)


@pytest.mark.parametrize("lens", [[4, 1, 0, 7, 7, 2], [1], [0, 0, 3], []])  # empty rows, ties
def test_packed_rows_are_those_of_the_plain_recursion(lens: list[int]) -> None:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.tensor(lens, dtype=torch.int64)
    rewards = torch.randn(len(lens), generator=generator, dtype=torch.float64)
    values = torch.randn(int(lengths.sum()), generator=generator)
    result = gae(rewards, values, lengths, gamma=0.9, gae_lambda=0.8)
    expected = _plain(rewards, values, lengths, 0.9, 0.8)
    torch.testing.assert_close(result.advantages, expected)
    torch.testing.assert_close(result.returns, expected + values)


def test_whitening_is_over_the_given_tokens() -> None:
    # 1, 2, 3: mean 2, sample variance 1.
    advantages = torch.tensor([1.0, 100.0, 2.0, 3.0])
    given = torch.tensor([True, False, True, True])
    torch.testing.assert_close(whitened(advantages, given), torch.tensor([-1.0, 0.0, 0.0, 1.0]))


@pytest.mark.parametrize("advantages", [[], [5.0], [0.1, 0.1, 0.1]])
def test_nothing_to_tell_apart_gives_zeros(advantages: list[float]) -> None:
    values = torch.tensor(advantages)
    assert torch.equal(whitened(values, torch.ones_like(values, dtype=torch.bool)), values * 0)
