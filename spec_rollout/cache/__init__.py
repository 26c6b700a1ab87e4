"""Where the rollouts of earlier epochs wait to be drafts."""

from __future__ import annotations

from spec_rollout.cache.cache import CacheStats, RolloutCache

__all__ = ["CacheStats", "RolloutCache"]
