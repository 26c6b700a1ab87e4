"""Verifiable rewards: plain callables, their names and their weighted sum."""

from __future__ import annotations

from spec_rollout.rewards.rewards import RewardError, Rewards

__all__ = ["RewardError", "Rewards"]
