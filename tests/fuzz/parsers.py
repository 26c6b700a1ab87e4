"""Every parser as a function of bytes: `make fuzz` and test_parsers.py feed them.

A target returns for anything that it parses or refuses with the error that its parser promises.
What it parsed is written out again and read back. Anything else that is raised is a finding. Where
a checksum would stop all but one input in four billion, it is put right, or not compared.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from spec_rollout.acceptance import Coupled, Lenient
from spec_rollout.cache import file as cache_file
from spec_rollout.cache.disk_records import (
    Counters,
    DamagedRecord,
    Group,
    entry_of,
    opened,
    row_of,
    sealed,
)
from spec_rollout.cache.entry import UNREADABLE, make_entry
from spec_rollout.config.sections import ConfigError
from spec_rollout.config.toml import dump_config, load_config
from spec_rollout.drafting import Drafter, history_file
from spec_rollout.engines.vllm.options import EngineOptions
from spec_rollout.engines.vllm.wire import ReuseRequest, SampleName, encode, parse
from spec_rollout.keys import prompt_key
from spec_rollout.runs.load import number, read_jsonl
from spec_rollout.train.manifest import MANIFEST, check_complete
from spec_rollout.train.run_store import REFERENCE, read_reference
from spec_rollout.train.state import STATE, CheckpointError, TrainState, load_state
from spec_rollout.types import FinishReason


@contextmanager
def as_file(data: bytes) -> Iterator[str]:
    """The path of a file in memory."""
    number = os.memfd_create("parsed")
    try:
        os.write(number, data)
        yield f"/proc/self/fd/{number}"
    finally:
        os.close(number)


def as_text(data: bytes) -> str:
    """Any text, halves of surrogate pairs included, as JSON may have them."""
    try:
        return data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def wire(data: bytes) -> None:
    """What a request carries: bytes, base64, or JSON."""
    for message in (data, as_text(data)):
        try:
            request = parse(message)
        except ValueError:
            continue
        if isinstance(request, SampleName):
            prompt_key([1], f"salt/{request.prompt_id}")  # as the worker does with it
            continue
        again = parse(encode(request))
        assert isinstance(again, ReuseRequest)
        assert (again.key, again.first_position, again.collect_id) == (
            request.key,
            request.first_position,
            request.collect_id,
        )
        assert encode(again) == encode(request)


def history(data: bytes) -> None:
    """What a drafter remembers, as bytes; also with the right checksum and size."""
    head = struct.Struct("<8sIIQQQ")
    messages = [data]
    if len(data) >= head.size:
        magic, version, _, _, rows, tokens = head.unpack_from(data)
        body = data[head.size :]
        fields = (magic, version, zlib.crc32(body), len(body), rows, tokens)
        messages.append(head.pack(*fields) + body)
    for message in messages:
        try:
            rows = history_file.unpacked(message)
        except ValueError:
            continue
        assert np.array_equal(
            history_file.unpacked(history_file.packed(rows)).token_ids, rows.token_ids
        )
        drafter = Drafter(max_bytes=1 << 20, max_table_bytes=1 << 19)
        with suppress(ValueError):
            drafter.import_bytes(message)
            drafter.import_bytes(drafter.export_bytes())


class _Unchecked(cache_file._Reader):
    def _check_crc(self, computed: int, stored: bytes, start: int | None = None) -> None:
        pass


def cached(data: bytes) -> None:
    """A cache's file; also with checksums believed."""
    with as_file(data) as path:
        with suppress(ValueError), open(path, "rb") as stream:
            _Unchecked(path, stream).contents()
        try:
            found = cache_file.read(path)
        except ValueError:
            return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        cache_file.write(Path(folder) / "again", found.groups.items(), found.pass_index)
        assert cache_file.read(Path(folder) / "again") == found


def records(data: bytes) -> None:
    """Records of a disk store, and rows that lead anywhere in a segment."""
    with suppress(DamagedRecord):
        opened(data)
    for record in (data, sealed(data)):
        with suppress(DamagedRecord):
            assert Counters.from_bytes(record).to_bytes() == record
        try:
            group = Group.from_bytes(record)
        except DamagedRecord:
            continue
        for row in group.rows.values():
            entry = entry_of(row, memoryview(data), borrowed=False)
            assert entry == UNREADABLE or sum(map(len, entry.arrays)) <= len(data)


def config(data: bytes) -> None:
    """A run's config: a file, and lines as `--set` takes them."""
    found = []
    with suppress(ConfigError), as_file(data) as path:
        found.append(load_config(path))
    with suppress(ConfigError):
        found.append(load_config(None, [*_REQUIRED, *as_text(data).splitlines()]))
    for parsed in found:
        with as_file(dump_config(parsed).encode()) as path:
            assert load_config(path) == parsed


def engine_options(data: bytes) -> None:
    """The variable SPEC_ROLLOUT."""
    with suppress(ValueError):
        options = EngineOptions.from_text(as_text(data))
        json.dumps(options.as_dict(), allow_nan=False)


def checkpoint(data: bytes) -> None:
    """Each of the small files that say what a checkpoint is."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as root:
        folder = Path(root) / "step-00000003"
        folder.mkdir()
        for name, parser in (
            (STATE, load_state),
            (REFERENCE, read_reference),
            (MANIFEST, check_complete),
        ):
            (folder / name).write_bytes(data)
            with suppress(CheckpointError):
                parsed = parser(folder)
                if isinstance(parsed, TrainState):
                    (folder / STATE).write_text(parsed.to_json())
                    assert load_state(folder) == parsed
            (folder / name).unlink(missing_ok=True)


def run_rows(data: bytes) -> None:
    """Rows that a run left: never an error, whatever is there."""
    with as_file(data) as path:
        problems: list[str] = []
        for row in read_jsonl(Path(path), problems):
            for value in row.values():
                number(value)
        json.dumps(problems)


TARGETS: Mapping[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (*(wire, history, cached, records, config, engine_options, checkpoint, run_rows),)
}

_REQUIRED = ("model.path=m", "data.path=d.jsonl", "log.run_dir=r")


def seeds() -> dict[str, list[bytes]]:
    """Inputs that each target parses."""
    key, ids = b"prompt", np.arange(5, dtype=np.int32)
    array = ids.tobytes()
    entry, other = (
        make_entry(
            *(of_key, 3),
            token_ids=array,
            logprobs=array,
            trainer_logprobs=None,
            finish_reason=int(FinishReason.STOP),
            policy_version=2,
        )
        for of_key in (key, b"other")
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache"
        cache_file.write(path, [(key, {3: entry}), (b"other", {3: other})], 4)
        two_groups = path.read_bytes()
        cache_file.write(path, [(key, {3: entry})], None)
        one_group = path.read_bytes()
    rows = history_file.KeptRows(
        np.arange(4, dtype=np.int64).reshape(2, 2),
        np.array([7, -1]),
        np.array([0, 2, 5]),
        ids,
        -ids.astype(np.float32),
    )
    state = TrainState(3, "data", order={"data.shuffle": True}, lenience={"log_lenience": 0.5})
    return {
        "wire": [
            encode(ReuseRequest(7, Lenient(0.5, 2.0, 0.01), ids, -ids.astype(np.float32), 3, 1)),
            encode(ReuseRequest(-1, Coupled())),
            b'{"sample": 3, "epoch": 1, "prompt_id": "p", "seed": 4}',
            b'{"sample": 0, "prompt_id": 12}',
        ],
        "history": [history_file.packed(rows)],
        "cached": [one_group, two_groups],
        "records": [
            opened(Group(key, 7, [row_of(3, entry, 5, 0)]).to_bytes()).tobytes(),
            opened(Counters(1, 2, 3, 4, 5, 6, 7).to_bytes()).tobytes(),
        ],
        "config": [
            b'[model]\npath = "m"\n[data]\npath = "d.jsonl"\n[log]\nrun_dir = "r"\n'
            b'[rollout]\nrule = "lenient"\nlog_lenience = 0.5\n[train]\nlr = 1e-6\nepochs = 3\n',
            b"rollout.rule=coupled\ntrain.lr=1\ntrain.epochs=2\nrollout.drafting=true",
        ],
        "engine_options": [
            b"drafting",
            b'{"mode": "coupled", "identity": "arrival", "seed": 3, "log_seconds": 0}',
        ],
        "checkpoint": [
            state.to_json().encode(),
            json.dumps({"store": "0" * 32, "mark": 3}).encode(),
            f"{'0' * 64}  trainer.pt\n{'1' * 64}  state.json\n{'2' * 64}  cache.bin\n".encode(),
        ],
        "run_rows": [b'{"step": 1, "reward": 0.5}\n{"step": 2, "reward": NaN}\n{"cut": '],
    }
