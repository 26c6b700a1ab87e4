"""Of the clusters that these tests start, and of the pools in them."""

from __future__ import annotations

from typing import Any

from spec_rollout.cache import RayStore

# Of a node; what is sent is far smaller. Ray's least is 75 MB.
MEMORY = 100_000_000
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_worker_niceness": "0",
}
TIMEOUT = 300.0  # of a busy machine


def emptied(store: RayStore) -> RayStore:
    """The same without any content."""
    store.replace_all([])
    return store


def wait_for(answer: Any) -> Any:
    """What an actor answers that is asked by itself."""
    import ray

    return ray.get(answer)
