"""The store on disk: what outlives the process, what processes share, what is refused."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cache_samples import (
    check_integrity,
    check_segments,
    content_of,
    damage_group,
    entry_of,
    make_rollouts,
    put,
    rows_of,
)

from spec_rollout.cache import DiskStore, RolloutCache, StoreError, disk_env
from spec_rollout.cache.disk_records import Counters, index_key, number
from spec_rollout.cache.entry import UNREADABLE

A, B, C = b"prompt-a", b"prompt-b", b"prompt-c"
ROOT = Path(__file__).resolve().parents[2]


def in_another_process(code: str, folder: Path) -> str:
    """What a process of its own prints; `store` is the one in `folder`."""
    head = (
        "import sys; from cache_samples import *; from spec_rollout.cache import DiskStore\n"
        "A, B, C = b'prompt-a', b'prompt-b', b'prompt-c'\n"
        "store = DiskStore(sys.argv[1])\n"
    )
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", head + code, str(folder)],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def in_a_forked_child(work: Callable[[], bool]) -> bool:
    """What it returns there; False if it fails."""
    child = os.fork()
    if child == 0:
        done = False
        try:
            signal.alarm(60)
            done = work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0 if done else 1)
    return os.waitpid(child, 0)[1] == 0


def test_content_and_order_outlive_the_store(tmp_path: Path) -> None:
    with DiskStore(tmp_path / "store") as store:
        for key in (A, B, C):
            put(store, key, 0, 1)
        store.get_many([A], [0])  # noted when it is closed
        before, identity = content_of(store), store.identity
        store.get_many([B], [0])
    with DiskStore(tmp_path / "store", create=False) as store:
        assert [key for key, _ in content_of(store)] == [C, A, B]
        assert sorted(content_of(store)) == sorted(before)
        assert store.identity == identity
        check_integrity(store)


@pytest.mark.slow
def test_processes_see_each_others_rollouts(tmp_path: Path) -> None:
    with DiskStore(tmp_path / "store") as store:
        put(store, A, 0)
        said = in_another_process(
            "put(store, B, 3); print(store.get_many([A], [0]) == [entry_of(A, 0, [1] * 10)])\n"
            "store.close()",
            tmp_path / "store",
        )
        assert said == "True\n"
        assert store.get_many([B], [3]) == [entry_of(B, 3, [1] * 10)]
        assert [key for key, _ in store.iterate()] == [A, B]
        check_integrity(store)


def test_one_folder_opened_twice_is_one_store(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "store")
    with DiskStore(tmp_path / "store") as one, DiskStore(tmp_path / "link") as other:
        put(one, A, 0)
        assert other.size() == one.size()
        one.close()
        assert other.size().num_groups == 1
        with pytest.raises(ValueError, match="store: expected an open DiskStore"):
            one.size()


def test_a_forked_child_closes_what_it_inherited_and_keeps_its_own(tmp_path: Path) -> None:
    path = tmp_path / "store"

    def in_child() -> bool:
        shutil.rmtree(path)  # LMDB does not open a file twice
        own = DiskStore(path)
        inherited.close()
        put(own, B, 0)
        return [key for key, _ in DiskStore(path).iterate()] == [B] and disk_env.is_open(path)

    with DiskStore(path) as inherited:
        put(inherited, A, 0)
        put(inherited, B, 0)
        inherited.get_many([A], [0])
        before = inherited._shared.env.info()["last_txnid"]
        assert in_a_forked_child(in_child)
        # The child wrote nothing with what is its parent's.
        assert inherited._shared.env.info()["last_txnid"] == before
        assert [key for key, _ in inherited.iterate()] == [B, A]


def test_a_folder_that_does_not_write_to_the_device_is_not_opened_as_if_it_did(
    tmp_path: Path,
) -> None:
    message = r"store: .* writes to the device \(sync=True\), it is open .* \(sync=False\)"
    with DiskStore(tmp_path / "store", sync=False) as store:
        with pytest.raises(StoreError, match=message):
            DiskStore(tmp_path / "store")
        put(store, A, 0)
    with DiskStore(tmp_path / "store") as store, DiskStore(tmp_path / "store", sync=False) as other:
        assert other.size() == store.size()
        assert store.size().num_groups == 1


def test_borrowed_entries_are_views_of_the_file(tmp_path: Path) -> None:
    with DiskStore(tmp_path / "store") as store:
        put(store, A, 0)
        with store.borrow_many([A, B], [0, 0]) as (entry, none):
            assert entry is not None
            assert isinstance(entry.token_ids, memoryview)
            assert entry.token_ids.readonly
            assert entry == entry_of(A, 0, [1] * 10)
            assert none is None


def test_a_lookup_copies_what_it_borrowed(tmp_path: Path) -> None:
    with DiskStore(tmp_path / "store") as store:
        cache = RolloutCache(store=store)
        cache.store([A, A, B], [0, 1, 0], make_rollouts([[1, 2], [3], [4, 5, 6]]))
        drafts = cache.lookup([B, A, C], [0, 1, 0], max_tokens=2)
        cache.store([A, A, B], [0, 1, 0], make_rollouts([[9, 9], [9], [9, 9, 9]]))
        assert rows_of(drafts) == [[4, 5], [3], []]
        assert drafts.finished.tolist() == [False, True, False]


def test_samples_put_one_by_one_are_written_together_in_time(tmp_path: Path) -> None:
    with DiskStore(tmp_path / "store", sync=False) as store:
        for sample in range(100):
            put(store, A, sample, num_tokens=sample + 1)
        with store._shared.reading() as txn:
            assert txn.stat(store._shared.segments)["entries"] <= 17
        expected = {s: entry_of(A, s, [1] * (s + 1)) for s in range(100)}
        assert content_of(store) == [(A, expected)]
        check_integrity(store)


def test_room_of_replaced_rollouts_is_used_again(tmp_path: Path) -> None:
    with DiskStore(tmp_path / "store", sync=False) as store:
        sizes = []
        for tokens in range(12):
            groups = [
                (bytes([g]) * 8, {s: entry_of(A, s, [tokens] * 900) for s in range(8)})
                for g in range(30)
            ]
            store.put_many(groups)
            sizes.append(store.file_bytes())
        assert sizes[-1] == sizes[4]
        assert sizes[-1] < 4 * store.size().num_bytes


@pytest.mark.parametrize("then", ["look up", "put", "evict", "replace"])
def test_a_damaged_record_is_a_miss_and_makes_room(tmp_path: Path, then: str) -> None:
    with DiskStore(tmp_path / "store", sync=False) as store:
        put(store, A, 0, 1)
        put(store, B, 0)
        damage_group(store, A)
        assert store.get_many([A, B], [0, 0]) == [UNREADABLE, entry_of(B, 0, [1] * 10)]
        if then == "look up":
            cache = RolloutCache(store=store)
            assert rows_of(cache.lookup([A, A, B], [0, 1, 0], max_tokens=99)) == [[], [], [1] * 10]
            assert cache.stats.corrupt == 1
        elif then == "put":
            put(store, A, 5)
            assert store.get_many([A, A], [0, 5]) == [None, entry_of(A, 5, [1] * 10)]
        elif then == "evict":
            assert store.evict(0) == 2
        else:
            store.replace_all([(B, {0: entry_of(B, 0, [1] * 10)})])
        check_integrity(store)
        check_segments(store)  # its room, too


def test_a_damaged_place_in_the_order_of_use_is_not_believed(tmp_path: Path) -> None:
    """It says what has to be known of a group whose record is damaged, and has no checksum."""
    with DiskStore(tmp_path / "store") as store:
        for key in (A, B, C):
            put(store, key, 0)
        shared, size = store._shared, store.size()
        with shared.writing() as txn:
            for use, value in list(txn.cursor(shared.order)):
                place = b"\xff" * 12 + bytes(value[12:])  # of more bytes and samples than there are
                # The first leads to a group that is not there.
                place = place[:-1] + b"?" if bytes(value[12:]) == index_key(A) else place
                txn.put(bytes(use), place, db=shared.order)
        put(store, B, 0)
        assert store.size() == size
        assert store.evict(size.num_bytes // 2) == 3
        assert [key for key, _ in store.iterate()] == []
        assert store.size().num_groups == 1  # A, which is out of the order of use
        put(store, A, 0)
        check_integrity(store)


def test_sums_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with DiskStore(tmp_path / "store") as store:
        put(store, A, 0)
        put(store, B, 0)
        shared = store._shared
        with shared.writing() as txn:
            txn.put(b"counters", Counters(next_use=2, next_segment=2).to_bytes(), db=shared.meta)
        with pytest.raises(StoreError, match="expected sums of what is there"):
            store.evict(-1)
        store.put_many([(B, {1: entry_of(B, 1, [1])})])


@pytest.mark.slow
@pytest.mark.parametrize("pages", [1, 3])
def test_a_rollout_cut_short_at_the_files_end_is_a_miss(tmp_path: Path, pages: int) -> None:
    """Its first page is there: reading on would end the process, for the file is mapped."""
    folder = tmp_path / "store"
    with DiskStore(folder) as store:
        for _ in range(6):  # which leaves room for all pages but those of the next rollout
            put(store, A, 0)
        put(store, B, 0, num_tokens=4000)
    data = folder / disk_env.DATA
    os.truncate(data, data.stat().st_size - pages * 4096)
    said = in_another_process(
        "from spec_rollout.cache import RolloutCache\n"
        "drafts = RolloutCache(store=store).lookup([A, B], [0, 0], max_tokens=9)\n"
        "print(drafts.lens.tolist())\n"
        "put(store, B, 0); print(store.get_many([B], [0]) == [entry_of(B, 0, [1] * 10)])",
        folder,
    )
    assert said == "[9, 0]\nTrue\n"


def test_a_segment_that_is_gone_is_a_miss(tmp_path: Path) -> None:
    with DiskStore(tmp_path / "store", sync=False) as store:
        put(store, A, 0)
        with store._shared.writing() as txn:
            txn.delete(number(0), db=store._shared.segments)
        cache = RolloutCache(store=store)
        assert cache.lookup([A], [0], max_tokens=9).lens.tolist() == [0]
        assert cache.stats.corrupt == 1
        assert store.size() == (0, 0, 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_text("x"), "expected a folder or nothing, got a file"),
        (lambda path: (path.mkdir(), (path / "thesis.tex").touch()), "empty folder, found 'thesis.tex'"),
        (lambda path: (path.mkdir(), (path / "data.mdb").write_bytes(b"x" * 9000)), "damaged"),
    ],
)  # fmt: skip
def test_what_is_no_store_is_left_alone(tmp_path: Path, make, message: str) -> None:
    path = tmp_path / "store"
    make(path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != "in-use"}
    with pytest.raises(StoreError, match=message):
        DiskStore(path)
    assert {p: p.read_bytes() for p in before} == before
    with pytest.raises(StoreError, match=r"expected a disk store, found no data\.mdb"):
        DiskStore(tmp_path / "absent", create=False)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (b"9", r"expected b'spec-rollout disk store 2', got b'.* 9'"),
        (b"1", r"checksums of CRC-32C, got .* \(CRC-32\): export it with that one"),
    ],
)
def test_a_store_of_another_version_is_refused(
    tmp_path: Path, version: bytes, message: str
) -> None:
    with DiskStore(tmp_path / "store") as store, store._shared.writing() as txn:
        txn.put(b"schema", b"spec-rollout disk store " + version, db=store._shared.meta)
    with pytest.raises(StoreError, match=message):
        DiskStore(tmp_path / "store")


def test_without_lmdb_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(StoreError, match=r"the package lmdb.* pip install .*lmdb"):
        DiskStore(tmp_path / "store")


def test_compaction_keeps_everything_but_free_room(tmp_path: Path) -> None:
    with DiskStore(tmp_path / "store", sync=False) as store:
        for key in (A, B, C):
            put(store, key, *range(8), num_tokens=3000)
        mark = store.mark()
        store.evict(10**5)
        before = content_of(store)
        with pytest.raises(StoreError, match="no process has open, it is in use"):
            disk_env.compact(tmp_path / "store")
    start, end = disk_env.compact(tmp_path / "store")
    assert end <= start
    with DiskStore(tmp_path / "store") as store:
        assert content_of(store) == before
        store.roll_back(mark)
        assert len(content_of(store)) == 3
        store.keep_marks([])
        store.evict(0)
    assert disk_env.compact(tmp_path / "store")[1] < end / 10


def test_a_store_in_the_hands_of_who_checks_it_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    DiskStore(tmp_path / "store").close()
    lock = disk_env.FolderLock(tmp_path / "store", must_be_alone=True)
    monkeypatch.setattr(disk_env, "_PATIENCE_SECONDS", 0.1)
    with pytest.raises(StoreError, match="another process checks or compacts it"):
        DiskStore(tmp_path / "store")
    lock.release()
    DiskStore(tmp_path / "store").close()


def test_many_keys_at_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with DiskStore(tmp_path / "store", sync=False) as store:
        keys = [rng.bytes(16) for _ in range(500)]
        store.put_many((key, {s: entry_of(key, s, [s + 1]) for s in range(4)}) for key in keys)
        picked = [keys[i] for i in rng.permutation(500)]
        assert store.get_many(picked, [3] * 500) == [entry_of(k, 3, [4]) for k in picked]
        assert [key for key, _ in store.iterate()] == picked
        check_integrity(store)
