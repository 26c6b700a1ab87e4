"""A Ray cluster of two nodes on this machine, which stand for two machines, and pools in it."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Samples, and what holds of every store.
sys.path.insert(0, str(Path(__file__).parents[1] / "cache"))

from ray_clusters import ENVIRONMENT, MEMORY, TIMEOUT, emptied

from spec_rollout.cache import RayStore, Store


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """This process is on its first node. Gone after the module: other tests start their own Ray."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="ray")  # short: Ray's sockets are in it
    node = {"num_cpus": 1, "object_store_memory": MEMORY, "include_log_monitor": False}
    head = {**node, "include_dashboard": False, "no_monitor": True}
    with pytest.MonkeyPatch.context() as patch:
        # Not `temp_dir` of the head: Ray notes the address of a cluster in the usual folder, too,
        # and that need not be there.
        patch.setenv("RAY_TMPDIR", folder)
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        started = Cluster(initialize_head=True, head_node_args=head)
        try:
            started.add_node(**node)
            patch.setenv("RAY_ADDRESS", started.address)  # for other processes
            ray.init(started.address, log_to_driver=False, logging_level="ERROR")
            started.wait_for_nodes()
            yield started
        finally:
            ray.shutdown()
            started.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def pools(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RayStore]:
    """Pools that tests take turns with: of one actor, which promises what every store does, and of
    three."""
    folder = tmp_path_factory.mktemp("pools")
    return {
        "memory": RayStore("tests/memory", timeout=TIMEOUT),
        "disk": RayStore("tests/disk", folder=folder, timeout=TIMEOUT),
        "3 in memory": RayStore("tests/three", num_actors=3, timeout=TIMEOUT),
    }


@pytest.fixture(params=["memory", "disk"])
def store(request: pytest.FixtureRequest, pools: dict[str, RayStore]) -> Store:
    """An empty pool of one actor."""
    return emptied(pools[request.param])


@pytest.fixture
def three(pools: dict[str, RayStore]) -> RayStore:
    """An empty pool of three actors, on both nodes."""
    return emptied(pools["3 in memory"])
