"""Sampling parameters of the ops over logits: one number for all rows, or one value per row."""

from __future__ import annotations

import math

import torch

from spec_rollout.checks import integer, real


def split_temperature(
    value: float | torch.Tensor,
) -> tuple[torch.Tensor | None, float]:
    """(per-row tensor or None, number for all rows)."""
    if isinstance(value, torch.Tensor):
        return value, 1.0
    number = value if type(value) is float else real("temperature", value)
    if not 0.0 <= number < math.inf:
        raise ValueError(f"temperature: expected 0 <= value < inf, got {value}")
    return None, number


def split_top_k(value: int | torch.Tensor) -> tuple[torch.Tensor | None, int]:
    """(per-row tensor or None, number for all rows)."""
    if isinstance(value, torch.Tensor):
        return value, 0
    number = integer("top_k", value)
    if number < 0:
        raise ValueError(f"top_k: expected 0 (off) or more, got {value}")
    return None, number


def split_top_p(value: float | torch.Tensor) -> tuple[torch.Tensor | None, float]:
    """(per-row tensor or None, number for all rows)."""
    if isinstance(value, torch.Tensor):
        return value, 1.0
    number = real("top_p", value)
    if not 0.0 < number <= 1.0:
        raise ValueError(f"top_p: expected 0 < value <= 1, got {value}")
    return None, number


def split_sampling(
    temperature: float | torch.Tensor, top_k: int | torch.Tensor, top_p: float | torch.Tensor
) -> tuple[torch.Tensor | None, float, torch.Tensor | None, int, torch.Tensor | None, float]:
    """The three of a row, split: numbers in their ranges, which are most, in one step."""
    if (
        type(temperature) is float
        and type(top_k) is int
        and type(top_p) is float
        and 0.0 <= temperature < math.inf
        and top_k >= 0
        and 0.0 < top_p <= 1.0
    ):
        return None, temperature, None, top_k, None, top_p
    return *split_temperature(temperature), *split_top_k(top_k), *split_top_p(top_p)
