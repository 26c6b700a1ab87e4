"""A store in Ray actors, for the processes of several machines.

The one file of the package that asks Ray for a store; Ray is imported when one is opened.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spec_rollout.cache.disk import DiskStore
from spec_rollout.cache.memory import MemoryStore
from spec_rollout.cache.part import Part
from spec_rollout.cache.parted import Call, PartedStore
from spec_rollout.cache.store import Store, StoreError
from spec_rollout.checks import integer, real, shown
from spec_rollout.extras import install_command

_OLDEST = (2, 40)  # the tests run with 2.60; older ones have not been tried
# Of what actors are asked and answer. They outlive the processes that began them, and may be of
# another version of this package.
_PROTOCOL = 2
_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_ACTOR = re.compile(r"(.+)-(\d+)-of-(\d+)")
_PART_FOLDER = re.compile(r"part-\d+-of-(\d+)")
# A call that its actor was killed in is tried again by the next one, so many times.
_RETRIES = 3
_PATIENCE_SECONDS = 30.0  # for actors to be gone


def ray_module() -> Any:
    """The package ray; StoreError says how to install it, or that it is too old."""
    try:
        import ray
    except ModuleNotFoundError:
        raise StoreError(
            "a store in Ray actors wants the package ray (the extra ray), which is not installed: "
            f"{install_command('ray')}"
        ) from None
    version = tuple(int(number) for number in re.findall(r"\d+", ray.__version__)[:2])
    if version < _OLDEST:
        wanted = ".".join(map(str, _OLDEST))
        raise StoreError(
            f"a store in Ray actors wants ray {wanted} or newer, got {ray.__version__}: "
            f"{install_command('ray')}"
        )
    return ray


@dataclass(frozen=True, slots=True)
class Place:
    """Where a part of a pool is.

    Attributes:
        actor: Name of its actor.
        node: Ray's id of the machine.
        pid: Of its process there.
        folder: Of the disk stores there; None where rollouts are in the actor's memory.
    """

    actor: str
    node: str
    pid: int
    folder: str | None


class RayStore(PartedStore):
    """`Store` in named Ray actors, each with a part of the prompts: for all processes of a cluster.

    The actors are detached: they outlive the process that began them, and hold their rollouts until
    `stop`, so that several jobs share them, at once or one after another. They take no CPUs, and
    are spread over the machines that are there when they begin, in the order of their addresses.

    Without `folder` a part is in the memory of its actor: what it holds is gone when the actor is,
    and a store that is opened then begins that part anew. With it a part is a disk store
    (`DiskStore`, the extra `disk`) on its machine: Ray starts an actor that was killed again, on
    that machine, with all that it had stored, and a call that it was killed in is done again; an
    error is left where the machine is gone.

    A process that does not use Ray yet joins the cluster of `RAY_ADDRESS` or of its machine; none
    is started. Needs the package ray (the extra `ray`), and this package on all machines.

    Args:
        name: "namespace/name" of the pool; Ray's namespace.
        num_actors: None takes as many as there are, or 1. A pool that is there has to have as many.
        folder: On each machine, absolute, and not on a file system that machines share; each actor
            has a folder in it. None takes that of the pool that is there, or memory.
        create: False expects a pool that is there.
        timeout: Seconds to wait for an answer.

    Raises:
        ValueError: naming the argument.
        StoreError: if the pool that is there is another one, a part of it cannot be used, no Ray
            runs, or it is not installed.
    """

    def __init__(
        self,
        name: str,
        *,
        num_actors: int | None = None,
        folder: str | os.PathLike[str] | None = None,
        create: bool = True,
        timeout: float = 120.0,
    ) -> None:
        self._namespace, self._pool = _parsed(name)
        if num_actors is not None and integer("num_actors", num_actors) < 1:
            raise ValueError(f"num_actors: expected at least 1, got {num_actors}")
        folder = None if folder is None else os.fspath(folder)
        if folder is not None and not os.path.isabs(folder):
            raise ValueError(f"folder: expected an absolute path, got {folder!r}")
        if not real("timeout", timeout) > 0:
            raise ValueError(f"timeout: expected a positive number of seconds, got {timeout}")
        self.name = name
        self._timeout = timeout
        self._ray = _connected()
        found = _pools(self._ray, self._namespace).get(self._pool, set())
        super().__init__(self._count(found, num_actors, create))
        self._actors: dict[int, Any] = {}
        for part, count in sorted(found):
            # One that is gone by now is begun again below, or missed by its name.
            with suppress(ValueError):
                self._actors[part] = self._ray.get_actor(
                    _actor_name(self._pool, part, count), namespace=self._namespace
                )
        missing = [part for part in range(self.num_parts) if part not in self._actors]
        if missing and not create:
            raise StoreError(f"{name}: expected {self._actor(missing[0])}, it is gone")
        folders = self._folders(folder)
        for part in missing:
            self._actors[part] = self._begin(part, next(iter(folders), None))
        self._folders(folder)  # another process may have been faster

    def _folders(self, wanted: str | None) -> set[str | None]:
        """Where the parts are kept that are there: one place, or none is known."""
        found = {place.folder for place in self.places()}
        folders = found if wanted is None else {*found, wanted}
        if len(folders) > 1:
            got = " and ".join("memory" if f is None else repr(f) for f in found)
            raise StoreError(
                f"{self.name}: expected a pool that keeps its parts in "
                f"{'one place' if wanted is None else repr(wanted)}, got one that keeps them in "
                f"{got} (stop it to begin anew)"
            )
        return folders

    def _count(self, found: set[tuple[int, int]], num_actors: int | None, create: bool) -> int:
        """Of actors, where some of (part, count) are there."""
        counts = sorted({count for _, count in found})
        if not counts and not create:
            raise StoreError(f"{self.name}: expected a pool of actors, this cluster has none")
        if len(counts) > 1 or (counts and num_actors not in (None, counts[0])):
            raise StoreError(
                f"{self.name}: expected a pool of {num_actors or 'some'} actors, found one of "
                f"{' and one of '.join(map(str, counts))} (stop it to begin anew, or give this one "
                "another name)"
            )
        return counts[0] if counts else num_actors or 1

    def places(self) -> list[Place]:
        """Where each part is, in the order of the parts; asks all of them."""
        answers = self._ask({part: ("about",) for part in self._actors})
        places = []
        for part, about in sorted(answers.items()):
            if about["protocol"] != _PROTOCOL:
                raise StoreError(
                    f"{self._actor(part)}: expected an actor of this version of spec_rollout, got "
                    "one that another has begun (stop the pool with that one)"
                )
            name = _actor_name(self._pool, part, self.num_parts)
            places.append(Place(name, about["node"], about["pid"], about["folder"]))
        return places

    def stop(self) -> None:
        """Ends all actors of the pool, for everybody; what is on disk stays there."""
        stop_pool(self.name)

    def _begin(self, part: int, folder: str | None) -> Any:
        """Begins the actor of a part, unless another process was faster."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = sorted(
            (node["NodeManagerAddress"], node["NodeID"])
            for node in self._ray.nodes()
            if node["Alive"]
        )
        _, node = nodes[part % len(nodes)]
        on_disk = folder is not None
        # A disk store is on its machine: its actor begins again there or not at all. Softly, Ray
        # would also put all parts on one machine while it does not know yet what another has.
        options = {
            "name": _actor_name(self._pool, part, self.num_parts),
            "namespace": self._namespace,
            "lifetime": "detached",
            "get_if_exists": True,
            "num_cpus": 0,
            "max_restarts": -1 if on_disk else 0,
            "max_task_retries": _RETRIES if on_disk else 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
        }
        actor_class = self._ray.remote(_Actor)
        return actor_class.options(**options).remote(part, self.num_parts, folder)

    def _ask(self, calls: Mapping[int, Call]) -> dict[int, Any]:
        self._check_connected()
        asked: dict[int, Any] = {}
        answers: dict[int, Any] = {}
        failed: list[tuple[int, Exception]] = []
        for part, call in calls.items():
            try:
                asked[part] = self._submit(part, call)
            except self._ray.exceptions.RayError as error:  # no room for what is sent
                failed.append((part, error))
        deadline = time.monotonic() + self._timeout
        for part, answer in asked.items():
            try:
                left = max(0.0, deadline - time.monotonic())
                answers[part] = self._ray.get(answer, timeout=left)
            except self._ray.exceptions.RayError as error:
                failed.append((part, error))
        for part, cause in failed:
            raise StoreError(f"{self._actor(part)}: {self._said(cause)}") from cause
        return answers

    def _tell(self, calls: Mapping[int, Call]) -> None:
        with suppress(StoreError, self._ray.exceptions.RayError):
            self._check_connected()
            for part, call in calls.items():
                self._submit(part, call)

    def _submit(self, part: int, call: Call) -> Any:
        method, *args = call
        return getattr(self._actors[part], method).remote(*args)

    def _check_connected(self) -> None:
        if not self._ray.is_initialized():
            raise StoreError(f"{self.name}: expected a process that uses Ray, it was shut down")

    def _actor(self, part: int) -> str:
        """Of messages."""
        name = _actor_name(self._pool, part, self.num_parts)
        return f"Ray actor {name!r} of namespace {self._namespace!r}"

    def _said(self, error: Exception) -> str:
        """What went wrong, and what to do."""
        errors = self._ray.exceptions
        if isinstance(error, errors.RayTaskError):
            return str(error.cause)
        if isinstance(error, errors.GetTimeoutError):
            return (
                f"expected an answer within {self._timeout:g} seconds, got none: its machine is "
                "busy or out of reach (what was asked for may still be done; see timeout)"
            )
        if isinstance(error, errors.ActorUnavailableError):
            return (
                "it was started again or is out of reach for now; what was asked for may have been "
                f"done, and can be asked again ({_first_line(error)})"
            )
        if isinstance(error, errors.RayActorError | errors.ActorUnschedulableError):
            return (
                "it is gone, and the rollouts with it if they were in its memory; a new RayStore "
                f"begins it again, with what it has on disk ({_first_line(error)})"
            )
        return f"Ray could not ask it ({type(error).__name__}: {_first_line(error)})"


def exists(name: str) -> bool:
    """Whether there is an actor of this pool. Raises as `RayStore`."""
    namespace, pool = _parsed(name)
    return bool(_pools(_connected(), namespace).get(pool))


def stop_pool(name: str) -> int:
    """Ends all actors of a pool, also of one that cannot be opened.

    Returns:
        How many there were.

    Raises:
        StoreError: if some are left after half a minute.
    """
    namespace, pool = _parsed(name)
    ray = _connected()
    found = _pools(ray, namespace).get(pool, set())
    actors = {}
    for part, count in found:
        actor_name = _actor_name(pool, part, count)
        with suppress(ValueError):  # gone by now
            actors[actor_name] = ray.get_actor(actor_name, namespace=namespace)
    closed = [actor.close.remote() for actor in actors.values()]
    for answer in closed:  # which notes the order of use on disk
        with suppress(ray.exceptions.RayError):
            ray.get(answer, timeout=_PATIENCE_SECONDS)
    for actor in actors.values():
        ray.kill(actor, no_restart=True)
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while left := _pools(ray, namespace).get(pool):
        if time.monotonic() > deadline:
            raise StoreError(f"{name}: expected its actors to end, {len(left)} have not")
        time.sleep(0.05)
    return len(found)


class _Actor(Part):
    """What runs in an actor. A store is opened by the first call, so that its error is an answer.

    Args:
        part, count: Which part, of how many.
        folder: See `RayStore`.
    """

    def __init__(self, part: int, count: int, folder: str | None) -> None:
        super().__init__(lambda: _opened(part, count, folder))
        self._folder = folder

    def about(self) -> dict[str, Any]:
        """See `Place`."""
        self.size()
        return {
            "protocol": _PROTOCOL,
            "node": ray_module().get_runtime_context().get_node_id(),
            "pid": os.getpid(),
            "folder": self._folder,
        }

    def close(self) -> None:
        """Before it is ended."""
        store = self._held
        if isinstance(store, DiskStore):
            store.close()


def _opened(part: int, count: int, folder: str | None) -> Store:
    if folder is None:
        return MemoryStore()
    parent = Path(folder)
    for other in sorted(parent.glob("part-*-of-*")):
        found = _PART_FOLDER.fullmatch(other.name)
        if found is not None and int(found[1]) != count:
            raise StoreError(
                f"{folder}: expected parts of a pool of {count} actors, found {other.name!r} "
                f"(begin it with {found[1]} actors, or remove that folder to begin without drafts)"
            )
    return DiskStore(parent / f"part-{part}-of-{count}")


def _parsed(name: str) -> tuple[str, str]:
    """Namespace and name of a pool."""
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise ValueError(
            "name: expected namespace/name, of letters, digits, dots, dashes and underscores, got "
            f"{shown(name)}"
        )
    namespace, pool = name.split("/")
    return namespace, pool


def _connected() -> Any:
    """Ray, of a process that is part of a cluster."""
    ray = ray_module()
    if not ray.is_initialized():
        try:
            ray.init("auto", log_to_driver=False, logging_level=logging.WARNING)
        except ConnectionError as error:
            raise StoreError(
                "expected a Ray cluster, found none on this machine and none by RAY_ADDRESS: start "
                f"one (ray start --head), or call ray.init first ({_first_line(error)})"
            ) from error
    return ray


def _pools(ray: Any, namespace: str) -> dict[str, set[tuple[int, int]]]:
    """(part, number of parts) of every actor that is there, by pool."""
    pools: dict[str, set[tuple[int, int]]] = {}
    for actor in ray.util.list_named_actors(all_namespaces=True):
        found = _ACTOR.fullmatch(actor["name"])
        if actor["namespace"] == namespace and found is not None:
            pools.setdefault(found[1], set()).add((int(found[2]), int(found[3])))
    return pools


def _actor_name(pool: str, part: int, count: int) -> str:
    return f"{pool}-{part}-of-{count}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
