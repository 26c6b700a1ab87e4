"""Verifiable rewards: plain callables, their names and their weighted sum."""

from __future__ import annotations

from spec_rollout.rewards.rewards import Judgement, RewardError, Rewards
from spec_rollout.rewards.run_context import Progress
from spec_rollout.rewards.signature import Sample

__all__ = ["Judgement", "Progress", "RewardError", "Rewards", "Sample"]
