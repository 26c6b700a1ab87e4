"""Stores in the actors of a real Ray cluster: what holds of every store holds of them, and what is
theirs alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_samples import check_integrity, content_of, entry_of, make_rollouts, put, rows_of
from hypothesis import HealthCheck, settings
from hypothesis.stateful import initialize, run_state_machine_as_test
from markov_engine import MarkovEngine
from ray_clusters import MEMORY, TIMEOUT, emptied, wait_for
from test_store import *  # noqa: F403 - with the pools of one actor
from test_store_properties import Model, StoreMachine

from spec_rollout import cli
from spec_rollout.acceptance import Coupled, Lenient
from spec_rollout.cache import RayStore, RolloutCache, StoreError
from spec_rollout.cache.entry import Entry
from spec_rollout.cache.parted import part_of
from spec_rollout.cache.ray_pool import exists, stop_pool
from spec_rollout.cache.writer import Writer
from spec_rollout.rollout import RolloutSession
from spec_rollout.types import SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]

ROOT = Path(__file__).resolve().parents[2]
KEYS = [b"prompt %d" % number for number in range(12)]


def groups_of(keys: list[bytes], tokens: int = 1, samples: int = 2) -> dict[bytes, Any]:
    return {key: {s: entry_of(key, s, [tokens] * 10) for s in range(samples)} for key in keys}


def start_process(code: str, *args: str) -> subprocess.Popen[str]:
    """Another driver of the cluster: RAY_ADDRESS says which."""
    head = "import sys; from cache_samples import *; from spec_rollout.cache import RayStore\n"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "cache"), *sys.path])
    return subprocess.Popen(
        [sys.executable, "-c", head + code, *args],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def said(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out


def in_actor(store: RayStore, part: int, change: Callable[[Any], None]) -> None:
    """Runs a function with the actor's object, in its process."""
    wait_for(store._actors[part].__ray_call__.remote(change))


def kill(store: RayStore, part: int) -> None:
    """kill -9 of an actor's process."""
    os.kill(store.places()[part].pid, signal.SIGKILL)


def die_in_mid_put() -> Callable[[Any], None]:
    """For `in_actor`: the next put is the end of the process, when half of its groups are there."""

    def change(actor: Any) -> None:  # sent as it is: no actor can import this file
        store, put_many = actor._held, actor._held.put_many

        def dying(groups: Any, max_bytes: int | None = None) -> int:
            def half() -> Iterator[Any]:
                taken = list(groups)
                yield from taken[: len(taken) // 2]
                os.kill(os.getpid(), signal.SIGKILL)

            return put_many(half(), max_bytes)

        store.put_many = dying

    return change


def test_the_parts_are_on_both_nodes(three: RayStore) -> None:
    groups = groups_of(KEYS)
    assert three.put_many(groups.items()) == 0
    places = three.places()
    assert [place.actor for place in places] == [f"three-{part}-of-3" for part in range(3)]
    assert len({place.node for place in places}) == 2
    assert len({place.pid for place in places}) == 3
    sizes = [wait_for(actor.size.remote())[0] for _, actor in sorted(three._actors.items())]
    assert sizes == [sum(part_of(key, 3) == part for key in KEYS) for part in range(3)]
    assert min(sizes) > 0
    found = three.get_many(KEYS[::-1], [1] * 12)
    assert found == [groups[key][1] for key in KEYS[::-1]]
    assert dict(content_of(three)) == groups
    check_integrity(three)


def test_three_parts_do_what_their_models_do(pools: dict[str, RayStore]) -> None:
    class Machine(StoreMachine):
        @initialize()
        def start(self) -> None:
            self.store = emptied(pools["3 in memory"])
            self.models = [Model() for _ in range(3)]

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=8,
            stateful_step_count=15,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_what_is_larger_than_a_message_comes_through_shared_memory(three: RayStore) -> None:
    """Above 100 kB Ray hands out its shared memory itself, which nobody may write to."""
    entry = entry_of(KEYS[0], 0, range(100_000))
    assert three.put_many([(KEYS[0], {0: entry})]) == 0
    with three.borrow_many(KEYS[:2], [0, 0]) as (found, none):
        assert found == entry
        assert none is None
        assert isinstance(found.token_ids, memoryview)
        assert found.token_ids.readonly
    assert three.get_many(KEYS[:1], [0]) == [entry]


def test_more_than_shared_memory_holds_is_put_and_read_in_pieces(
    three: RayStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spec_rollout.cache import parted

    monkeypatch.setattr(parted, "_PIECE_BYTES", 20_000_000)
    tokens = np.arange(1_000_000)
    num_groups = 1 + MEMORY // 8_000_000
    three.put_many((b"%d" % n, {0: entry_of(b"%d" % n, 0, tokens)}) for n in range(num_groups))
    assert three.size().num_bytes > MEMORY
    assert sorted(key for key, _ in three.iterate()) == sorted(b"%d" % n for n in range(num_groups))


def test_two_processes_share_a_pool_and_it_outlives_them(three: RayStore) -> None:
    put(three, b"first", 0)
    other = start_process(
        "store = RayStore('tests/three', create=False)\n"
        "print(store.get_many([b'first'], [0]) == [entry_of(b'first', 0, [1] * 10)])\n"
        "for step in range(20):\n"
        "    store.put_many([(b'prompt %d' % k, {100 + step: entry_of(b'x', 0, [step + 1])}) "
        "for k in range(12)])\n"
    )
    for step in range(20):
        three.put_many((key, {step: entry_of(b"y", 0, [step + 1])}) for key in KEYS)
    assert said(other) == "True\n"
    check_integrity(three)
    content = dict(content_of(three))
    for key in KEYS:
        mine = {step: entry_of(b"y", 0, [step + 1]) for step in range(20)}
        theirs = {100 + step: entry_of(b"x", 0, [step + 1]) for step in range(20)}
        assert content[key] == {**mine, **theirs}


def test_a_pool_outlives_the_process_that_began_it(cluster: Any) -> None:
    begun = start_process(
        "store = RayStore('tests/detached', num_actors=2)\nput(store, b'prompt 0', 3)\n"
    )
    assert said(begun) == ""
    store = RayStore("tests/detached", timeout=TIMEOUT)
    assert store.num_parts == 2
    assert store.get_many(KEYS[:1], [3]) == [entry_of(KEYS[0], 3, [1] * 10)]
    store.stop()
    assert not exists("tests/detached")
    with pytest.raises(StoreError, match=r"detached-[01]-of-2' of namespace 'tests': it is gone"):
        store.size()


def test_an_actor_killed_in_mid_put_takes_its_memory_along_and_no_other(cluster: Any) -> None:
    store = RayStore("tests/killed", num_actors=2, timeout=TIMEOUT)
    before, after = groups_of(KEYS), groups_of(KEYS, tokens=2)
    store.put_many(before.items())
    in_actor(store, 1, die_in_mid_put())
    cache = RolloutCache(store=store, writer=Writer())
    with pytest.raises(
        StoreError,
        match=r"Ray actor 'killed-1-of-2' of namespace 'tests': it is gone, .* a new RayStore begins",
    ):
        store.put_many(after.items())
    with pytest.raises(StoreError, match="killed-1-of-2"):
        cache.lookup(KEYS, [0] * 12, max_tokens=9)
    with pytest.raises(StoreError, match=r"expected Ray actor 'killed-1-of-2' .*, it is gone"):
        RayStore("tests/killed", create=False, timeout=TIMEOUT)
    again = RayStore("tests/killed", timeout=TIMEOUT)
    held = {key: samples for key, samples in after.items() if part_of(key, 2) == 0}
    assert 0 < len(held) < 12
    assert dict(content_of(again)) == held
    check_integrity(again)
    again.put_many(after.items())
    assert dict(content_of(again)) == after
    again.stop()


def test_an_actor_on_disk_killed_in_mid_put_is_started_again_and_puts(
    cluster: Any, tmp_path: Path
) -> None:
    store = RayStore("tests/durable", num_actors=2, folder=tmp_path / "pool", timeout=TIMEOUT)
    before, after = groups_of(KEYS), groups_of(KEYS, tokens=2, samples=1)
    store.put_many(before.items())
    places = store.places()
    in_actor(store, 1, die_in_mid_put())
    assert store.put_many(after.items()) == 0
    whole = {key: {**before[key], **after[key]} for key in KEYS}
    assert dict(content_of(store)) == whole
    check_integrity(store)
    now = store.places()
    assert now[0] == places[0]
    assert (now[1].node, now[1].folder) == (places[1].node, str(tmp_path / "pool"))
    assert now[1].pid != places[1].pid
    kill(store, 0)  # between two calls
    assert store.get_many(KEYS, [0] * 12) == [after[key][0] for key in KEYS]
    order = [key for key, _ in store.iterate()]
    store.stop()
    assert not exists("tests/durable")
    again = RayStore("tests/durable", num_actors=2, folder=tmp_path / "pool", timeout=TIMEOUT)
    assert [key for key, _ in again.iterate()] == order
    assert dict(content_of(again)) == whole
    again.stop()
    with pytest.raises(
        StoreError, match=r"durable-0-of-3.* a pool of 3 actors, found 'part-0-of-2'"
    ):
        RayStore("tests/durable", num_actors=3, folder=tmp_path / "pool", timeout=TIMEOUT)
    assert stop_pool("tests/durable") == 3


def test_an_actor_that_was_started_again_has_lost_what_was_under_way(
    cluster: Any, tmp_path: Path
) -> None:
    store = RayStore("tests/lost", folder=tmp_path, timeout=TIMEOUT)
    before = groups_of(KEYS)
    store.put_many(before.items())

    def dying() -> Iterator[Any]:
        yield from groups_of(KEYS[:3], tokens=9).items()

    ask = store._ask

    def kill_before_commit(calls: Any) -> Any:
        if any(call[0] == "commit" for call in calls.values()):
            kill(RayStore("tests/lost", timeout=TIMEOUT), 0)
        return ask(calls)

    store._ask = kill_before_commit  # type: ignore[method-assign]
    with pytest.raises(StoreError, match="expected 3 groups to replace what is held, got 0"):
        store.replace_all(dying())
    assert dict(content_of(store)) == before
    store.stop()


def test_the_end_of_a_machine_is_an_error_that_names_the_actor(
    cluster: Any, tmp_path: Path
) -> None:
    node = cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
    store = RayStore("tests/machines", num_actors=3, folder=tmp_path, timeout=TIMEOUT)
    places = store.places()
    assert len({place.node for place in places}) == 3
    (lost,) = [part for part, place in enumerate(places) if place.node == node.node_id]
    store.put_many(groups_of(KEYS).items())
    cluster.remove_node(node)
    with suppress(ProcessLookupError):  # it ends when it notices
        os.kill(places[lost].pid, signal.SIGKILL)
    with pytest.raises(StoreError, match=rf"Ray actor 'machines-{lost}-of-3'"):
        store.size()
    there = [key for key in KEYS if part_of(key, 3) != lost]
    assert store.get_many(there, [0] * len(there)) == [groups_of(there)[key][0] for key in there]
    stop_pool("tests/machines")


def test_a_pool_that_is_there_has_to_be_the_one_that_is_wanted(
    three: RayStore, pools: dict[str, RayStore], tmp_path: Path
) -> None:
    with pytest.raises(
        StoreError, match="tests/three: expected a pool of 2 actors, found one of 3"
    ):
        RayStore("tests/three", num_actors=2)
    with pytest.raises(StoreError, match=r"tests/three: .* in '/elsewhere', got .* in memory"):
        RayStore("tests/three", folder="/elsewhere")
    with pytest.raises(StoreError, match=r"tests/disk: .* in '/elsewhere', got .* in '/.*pools"):
        RayStore("tests/disk", folder="/elsewhere")
    with pytest.raises(StoreError, match="tests/none: expected a pool of actors, this cluster has"):
        RayStore("tests/none", create=False)
    assert RayStore("tests/three").num_parts == 3  # another namespace, another pool
    assert not exists("other/three")
    put(three, KEYS[0], 0)
    assert RayStore("tests/three", num_actors=3, create=False).size() == three.size()


def test_a_folder_that_cannot_be_had_is_named_with_the_actor(cluster: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"'barred-0-of-1' of namespace 'tests': .*file"):
        RayStore("tests/barred", folder=tmp_path / "file", timeout=TIMEOUT)
    assert stop_pool("tests/barred") == 1


def test_an_actor_of_another_version_is_refused(
    three: RayStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spec_rollout.cache import ray_pool

    monkeypatch.setattr(ray_pool, "_PROTOCOL", 9)
    with pytest.raises(StoreError, match=r"three-0-of-3.* expected an actor of this version"):
        RayStore("tests/three", timeout=TIMEOUT)


def test_an_actor_that_does_not_answer_in_time_is_named(three: RayStore) -> None:
    pid = three.places()[1].pid
    impatient = RayStore("tests/three", timeout=TIMEOUT)
    impatient._timeout = 0.5
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(StoreError, match=r"three-1-of-3.* an answer within 0\.5 seconds"):
            impatient.get_many([key for key in KEYS if part_of(key, 3) == 1], [0, 0, 0])
    finally:
        os.kill(pid, signal.SIGCONT)
    assert three.size() == (0, 0, 0)


def policy(seed: int, drift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 5, generator=generator)
    return logits + drift * torch.randn(5, 5, generator=generator)


@pytest.mark.parametrize("rule", [Lenient(0.5), Coupled()], ids=repr)
def test_rollouts_are_those_of_a_store_in_memory(three: RayStore, rule: Any) -> None:
    caches = [
        RolloutCache(3 * 8000),
        RolloutCache(3 * 8000, store=three),
        RolloutCache(3 * 8000, store=three, writer=Writer()),
    ]
    results = []
    for cache in caches:
        emptied(three)
        engine = MarkovEngine(policy(1))
        session = RolloutSession(engine, rule, cache=cache, seed=5)
        rollouts = []
        for step in range(4):
            engine.update_weights([("logits", policy(1, drift=0.2 * step))])
            sampling = SamplingParams(max_tokens=12, stop_token_ids=(4,))
            rolled = session.rollout([[0], [1], [2], [3]], 3, sampling, step=step, epoch=step)
            rollouts.append(
                (rolled.response_ids.tolist(), rolled.logprobs.tolist(), rolled.stats.num_drafts)
            )
        results.append(rollouts)
        assert cache.stats.evictions == cache.stats.corrupt == 0
    assert results[1] == results[0]
    assert results[2] == results[0]
    assert results[0][-1][2] == 12


def test_a_bound_below_what_is_stored_evicts_in_each_part(three: RayStore) -> None:
    bound = 3 * 2500
    cache = RolloutCache(bound, store=three)
    cache.store(KEYS * 2, [0] * 12 + [1] * 12, make_rollouts([[1] * 10] * 24))
    assert cache.stats.evictions > 0
    assert cache.stats.num_groups == 12 - cache.stats.evictions
    assert all(wait_for(actor.size.remote())[2] <= 2500 for actor in three._actors.values())
    drafts = cache.lookup(KEYS, [0] * 12, max_tokens=99)
    held = [key for key, _ in three.iterate()]
    assert [bool(row) for row in rows_of(drafts)] == [key in held for key in KEYS]


def test_the_command_looks_after_a_pool(
    three: RayStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    three.put_many(groups_of(KEYS).items())
    file = str(tmp_path / "cache.bin")
    assert cli.main(["cache", "info", "ray:tests/three"]) == 0
    out = capsys.readouterr().out
    assert "rollouts   24\n" in out
    assert out.count(", in memory\n") == 3
    assert cli.main(["cache", "verify", "ray:tests/three"]) == 0
    assert cli.main(["cache", "export", "ray:tests/three", file]) == 0
    plain = RolloutCache()
    plain.load(file)
    assert dict(content_of(plain._store)) == groups_of(KEYS)
    assert cli.main(["cache", "import", file, "ray:tests/imported"]) == 0
    capsys.readouterr()
    assert cli.main(["cache", "import", file, "ray:tests/imported"]) == 2
    assert "got one of 24 rollouts" in capsys.readouterr().err
    assert cli.main(["cache", "stop", "ray:tests/imported"]) == 0
    assert capsys.readouterr().out == "1 actors ended\n"
    assert cli.main(["cache", "info", "ray:tests/imported"]) == 2
    assert cli.main(["cache", "compact", "ray:tests/three"]) == 2
    assert cli.main(["cache", "stop", str(tmp_path)]) == 2
    assert "expected ray:NAMESPACE/NAME" in capsys.readouterr().err


def test_entries_that_are_wrong_are_dropped_by_the_cache(three: RayStore) -> None:
    wrong = entry_of(KEYS[0], 0, [1, 2])._replace(checksum=12345)
    three.put_many([(KEYS[0], {0: wrong, 1: entry_of(KEYS[0], 1, [3])})])
    cache = RolloutCache(store=three)
    assert rows_of(cache.lookup(KEYS[:1] * 2, [0, 1], max_tokens=9)) == [[], [3]]
    assert cache.stats.corrupt == 1
    held: dict[int, Entry] = dict(three.iterate().__next__()[1])
    assert list(held) == [1]
