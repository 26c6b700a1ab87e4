"""Stores in Ray actors, where there is no Ray; tests/ray_pool has those with one."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from spec_rollout.cache import RayStore, StoreError
from spec_rollout.cache.ray_pool import exists, stop_pool


@pytest.mark.parametrize("use", [RayStore, exists, stop_pool])
def test_without_ray_the_error_says_what_to_install(use, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(StoreError, match=r"the package ray .*extra ray.* pip install .*ray"):
        use("jobs/rollouts")


def test_a_ray_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    old = ModuleType("ray")
    old.__version__ = "2.9.3"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", old)
    with pytest.raises(StoreError, match=r"wants ray 2\.\d\d or newer, got 2\.9\.3"):
        RayStore("jobs/rollouts")


@pytest.mark.parametrize("name", ["", "rollouts", "a/b/c", "/x", "x/", "a b/c", "ä/b", 3, None])
def test_a_name_has_a_namespace(name: object) -> None:
    with pytest.raises(ValueError, match="name: expected namespace/name"):
        RayStore(name)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_actors": 0}, "num_actors: expected at least 1, got 0"),
        ({"num_actors": "2"}, "num_actors: expected an integer"),
        ({"folder": "rollouts"}, "folder: expected an absolute path, got 'rollouts'"),
        ({"timeout": 0}, "timeout: expected a positive number of seconds, got 0"),
        ({"timeout": float("nan")}, "timeout: expected a positive number of seconds, got nan"),
    ],
)
def test_arguments_are_checked_before_ray_is_asked(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RayStore("jobs/rollouts", **arguments)


def test_where_no_ray_runs_the_error_says_how_to_start_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(address: str, **_: object) -> None:
        raise ConnectionError(f"no cluster at {address}\nand more of it")

    ray = ModuleType("ray")
    ray.__version__ = "2.60.0"  # type: ignore[attr-defined]
    ray.is_initialized = lambda: False  # type: ignore[attr-defined]
    ray.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(StoreError, match=r"found none .*ray start --head.*no cluster at auto\)$"):
        RayStore("jobs/rollouts")
