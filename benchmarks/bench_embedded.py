"""Embedded databases under the store on disk: a step of rollouts written, and looked up.

    python benchmarks/bench_embedded.py

1,024 records (the rollouts of a prompt: 8 of 1,400 tokens on average, ids and log-probs: some
90 KB) are put in one transaction that is flushed to the device, over those of the step before; then
all are read in another order, and every byte of them once (a checksum). LMDB (read in place),
SQLite with a write-ahead log (Python's own), RocksDB (`pip install rocksdict`; left out if it is
not there). What is read is compared with what was written before it is timed. `disk_bytes` is what
is there at the end, room that will be used again included.
"""

from __future__ import annotations

import sqlite3
import sys
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from _common import Results, copy_bandwidth, measure, parser

Records = Sequence[tuple[bytes, bytes]]


class Database(Protocol):
    def put(self, records: Records) -> None: ...
    def checksums(self, keys: Sequence[bytes]) -> list[int]: ...
    def close(self) -> None: ...


class LMDB:
    def __init__(self, folder: Path) -> None:
        import lmdb

        self._env = lmdb.open(str(folder), map_size=1 << 40)

    def put(self, records: Records) -> None:
        with self._env.begin(write=True) as txn:
            for key, value in records:
                txn.put(key, value)

    def checksums(self, keys: Sequence[bytes]) -> list[int]:
        with self._env.begin(buffers=True) as txn:
            return [zlib.crc32(txn.get(key)) for key in keys]

    def close(self) -> None:
        self._env.close()


class SQLite:
    def __init__(self, folder: Path) -> None:
        self._db = sqlite3.connect(folder / "db", isolation_level=None)
        self._db.execute("PRAGMA page_size = 65536")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA mmap_size = 1099511627776")
        self._db.execute("CREATE TABLE records (key BLOB PRIMARY KEY, value BLOB)")

    def put(self, records: Records) -> None:
        self._db.execute("BEGIN")
        self._db.executemany("INSERT OR REPLACE INTO records VALUES (?, ?)", records)
        self._db.execute("COMMIT")

    def checksums(self, keys: Sequence[bytes]) -> list[int]:
        query = "SELECT value FROM records WHERE key = ?"
        return [zlib.crc32(self._db.execute(query, (key,)).fetchone()[0]) for key in keys]

    def close(self) -> None:
        self._db.close()


class RocksDB:
    def __init__(self, folder: Path) -> None:
        import rocksdict

        self._module = rocksdict
        self._db = rocksdict.Rdict(str(folder / "db"), rocksdict.Options(raw_mode=True))
        self._synced = rocksdict.WriteOptions()
        self._synced.sync = True

    def put(self, records: Records) -> None:
        batch = self._module.WriteBatch(raw_mode=True)
        for key, value in records:
            batch.put(key, value)
        self._db.write(batch, self._synced)

    def checksums(self, keys: Sequence[bytes]) -> list[int]:
        return [zlib.crc32(self._db[key]) for key in keys]

    def close(self) -> None:
        self._db.close()


def _databases() -> dict[str, Any]:
    found: dict[str, Any] = {"LMDB": LMDB, "SQLite": SQLite}
    try:
        import rocksdict  # noqa: F401
    except ImportError:
        print("rocksdict is not installed; RocksDB is left out")
    else:
        found["RocksDB"] = RocksDB
    return found


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--folder", type=Path, help="of the files; a temporary one if left out")
    args = options.parse_args()
    num_records, repeats = (16, 1) if args.quick else (1024, 9)
    rng = np.random.default_rng(0)
    steps = [
        [(number.to_bytes(16, "big"), rng.bytes(int(size))) for number, size in enumerate(sizes)]
        for sizes in rng.gamma(4, 22_400, (2, num_records)).clip(1000)
    ]
    bandwidth = (lambda: copy_bandwidth(1 << 24)) if args.quick else copy_bandwidth
    results = Results("embedded", args.out, bandwidth)
    timings: dict[str, dict[str, Any]] = {"store": {}, "lookup": {}}
    sizes_on_disk = {}
    for name, make in _databases().items():
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            database: Database = make(Path(folder))
            turn = 0

            def put(database: Database = database) -> None:
                nonlocal turn
                turn += 1
                database.put(steps[turn % 2])

            timings["store"][name] = measure(put, repeats=repeats)
            records = [steps[turn % 2][i] for i in rng.permutation(num_records)]
            keys = [key for key, _ in records]
            if database.checksums(keys) != [zlib.crc32(value) for _, value in records]:
                sys.exit(f"{name}: what was read is not what was written")
            timings["lookup"][name] = measure(
                lambda database=database, keys=keys: database.checksums(keys), repeats=repeats
            )
            database.close()
            files = [path for path in Path(folder).rglob("*") if path.is_file()]
            sizes_on_disk[name] = sum(path.stat().st_size for path in files)
    num_bytes = sum(len(value) for _, value in steps[0])
    for op, by_name in timings.items():
        ours = by_name.pop("LMDB")
        results.add(
            f"{op} (LMDB)",
            shape={"records": num_records, "bytes": num_bytes},
            timing=ours,
            peers=by_name,
            **({"disk_bytes": sizes_on_disk} if op == "store" else {}),
        )
    results.write()


if __name__ == "__main__":
    main()
