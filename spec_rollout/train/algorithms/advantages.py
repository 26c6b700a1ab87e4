"""Advantages of grouped responses (GRPO: Shao et al., 2024, arXiv 2402.03300)."""

from __future__ import annotations

import torch


def group_advantages(
    rewards: torch.Tensor, *, normalize: bool = True, eps: float = 1e-4
) -> torch.Tensor:
    """Reward minus the group's mean, over its standard deviation plus `eps`.

    Responses with reward NaN (skipped ones) get advantage 0 and do not count in mean and deviation.
    A group with fewer than two rewards, or with all rewards equal, gets zeros.

    Args:
        rewards: One row per prompt. [num_groups, group_size], floating point; NaN where skipped.
        normalize: Divide by the standard deviation (of the sample: n - 1).
        eps: Added to the standard deviation.

    Returns:
        [num_groups, group_size], float32.

    Raises:
        ValueError: if `rewards` is not a matrix of floats or holds an infinity, or float32 cannot
            hold an advantage (without `normalize`), naming the group.
    """
    if rewards.dim() != 2 or not rewards.is_floating_point():
        raise ValueError(
            f"rewards: expected floats of shape [num_groups, group_size], got {rewards.dtype} "
            f"{list(rewards.shape)}"
        )
    if bool(torch.isinf(rewards).any()):
        raise ValueError("rewards: expected finite numbers (or NaN to skip), got an infinity")
    rewards = rewards.double()
    given = ~torch.isnan(rewards)
    counts = given.sum(1, keepdim=True)
    values = torch.where(given, rewards, torch.zeros_like(rewards))
    # By a power of two, which changes no digit: sums of large rewards, and their squares, would be
    # infinite.
    exponents = torch.frexp(values.abs().amax(1, keepdim=True)).exponent
    exponents = torch.where(exponents > 500, exponents, torch.zeros_like(exponents))
    values = torch.ldexp(values, -exponents)
    eps_there = torch.ldexp(torch.full_like(values[:, :1], eps), -exponents)
    centered = torch.where(
        given, values - values.sum(1, keepdim=True) / counts.clamp(min=1), values
    )
    highest = torch.where(given, rewards, -torch.inf).amax(1, keepdim=True)
    lowest = torch.where(given, rewards, torch.inf).amin(1, keepdim=True)
    flat = (counts < 2) | (highest == lowest)
    # Equal rewards are told by comparison: their mean may be off by rounding, and eps would not
    # hide that.
    advantages = torch.where(flat, torch.zeros_like(centered), centered)
    if normalize:
        std = (centered.square().sum(1, keepdim=True) / (counts - 1).clamp(min=1)).sqrt()
        advantages = advantages / torch.where(flat, torch.ones_like(std), std + eps_there)
    else:
        advantages = torch.ldexp(advantages, exponents)
    result = advantages.float()
    if not bool(torch.isfinite(result).all()):
        group = int((~torch.isfinite(result)).any(1).nonzero()[0])
        raise ValueError(
            "rewards: expected differences from the group's mean that float32 holds, got "
            f"{float(advantages[group].abs().max()):.3g} in group {group}"
        )
    return result


def per_token(values: torch.Tensor, lens: torch.Tensor) -> torch.Tensor:
    """The value of each row for each of its tokens: [batch], [batch] int64 -> [sum(lens)]."""
    return torch.repeat_interleave(values, lens)
