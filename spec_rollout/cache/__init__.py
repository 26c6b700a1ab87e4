"""Where the rollouts of earlier epochs wait to be drafts."""

from __future__ import annotations

from spec_rollout.cache.cache import CacheStats, RolloutCache
from spec_rollout.cache.memory import MemoryStore
from spec_rollout.cache.store import Store, StoreSize

__all__ = ["CacheStats", "MemoryStore", "RolloutCache", "Store", "StoreSize"]
