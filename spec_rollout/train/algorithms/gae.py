"""Generalised advantage estimation (Schulman et al., 2016, arXiv 1506.02438), over packed rows."""

from __future__ import annotations

from typing import NamedTuple

import torch

_VARIANCE_EPS = 1e-8


class Estimate(NamedTuple):
    """Per response token. [num_tokens], float32 each."""

    advantages: torch.Tensor
    returns: torch.Tensor


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    lens: torch.Tensor,
    *,
    gamma: float = 1.0,
    gae_lambda: float = 1.0,
) -> Estimate:
    """Advantages and returns of responses whose reward comes with their last token.

        A_t = sum_k (gamma * gae_lambda)^k * delta_(t+k)
        delta_t = r_t + gamma * V_(t+1) - V_t,   V after the last token is 0
        return_t = A_t + V_t

    A response that reached the most tokens ends there like any other.

    Args:
        rewards: One per response. [batch], floating point.
        values: Of the value head before each token. [num_tokens], float32.
        lens: Of the responses. [batch], int64; sum(lens) = num_tokens.
        gamma: Discount per token.
        gae_lambda: Discount of the errors.
    """
    # The longest response first: at the k-th token from the end the first rows are those that have
    # one. So a step of the recursion is one operation over rows, and nothing is padded.
    order = torch.sort(lens, descending=True, stable=True).indices
    last = (lens.cumsum(0) - 1)[order]
    sorted_lens = lens[order]
    values = values.double()
    advantages = torch.zeros_like(values)
    next_advantage = torch.zeros(lens.numel(), dtype=torch.float64)
    next_value = torch.zeros_like(next_advantage)
    reward = rewards.double()[order]
    longest = int(sorted_lens[0]) if lens.numel() else 0
    # Rows that have a k-th token from the end.
    counts = torch.searchsorted(-sorted_lens, -torch.arange(longest), right=False).tolist()
    for k, count in enumerate(counts):
        index = last[:count] - k
        delta = gamma * next_value[:count] - values[index]
        if k == 0:
            delta = delta + reward[:count]
        advantage = delta + gamma * gae_lambda * next_advantage[:count]
        advantages[index] = advantage
        next_advantage, next_value = advantage, values[index]
    return Estimate(advantages.float(), (advantages + values).float())


def whitened(advantages: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """Shifted and scaled to mean 0 and (unbiased) variance 1 over the tokens that are `given`.

    Others become 0. Fewer than two tokens, or equal ones, become 0, too.

    Args:
        advantages: [num_tokens], float32.
        given: [num_tokens], bool.
    """
    chosen = advantages[given].double()
    result = torch.zeros_like(advantages)
    if chosen.numel() > 1 and bool((chosen != chosen[0]).any()):
        result[given] = (
            (chosen - chosen.mean()) * torch.rsqrt(chosen.var(correction=1) + _VARIANCE_EPS)
        ).float()
    return result
