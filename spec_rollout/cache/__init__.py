"""Where the rollouts of earlier epochs wait to be drafts."""

from __future__ import annotations

from spec_rollout.cache.cache import CacheStats, RolloutCache
from spec_rollout.cache.disk import DiskStore
from spec_rollout.cache.memory import MemoryStore
from spec_rollout.cache.ray_pool import RayStore
from spec_rollout.cache.store import Store, StoreError, StoreSize

__all__ = [
    "CacheStats",
    "DiskStore",
    "MemoryStore",
    "RayStore",
    "RolloutCache",
    "Store",
    "StoreError",
    "StoreSize",
]
