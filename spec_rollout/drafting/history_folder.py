"""A folder in which drafters of several processes find each other's rollouts.

| file | holds |
| :-- | :-- |
| `identity.json` | of which model, with which vocabulary |
| `<number>-<writer>.rollouts` | a segment: records of `history_file`, one behind the other |

A segment has one writer, which only appends to it, and any number of readers, which remember how
far they are. So nobody holds a lock or waits for another, no file is mapped, and what a process
leaves behind when it is killed is at most a record that is not whole: readers go up to there. The
oldest segment, whoever wrote it, goes when all are too large together; readers and writers notice.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from spec_rollout.drafting import history_file
from spec_rollout.drafting.history_file import KeptRows
from spec_rollout.files import sync_folder

IDENTITY = "identity.json"
_SEGMENT = re.compile(r"\d{10}-[0-9a-f]{32}\.rollouts")
_SEGMENT_SHARE = 1 / 16  # of all bytes: what goes at once
# A record has some rollouts, or a single long one. A drafter takes in a whole one at a time.
_RECORD_BYTES = 1 << 15
_READ_BYTES = 1 << 24  # more than the longest record
_MOST_LOGPROB = 1e-3  # 0, and what arithmetic adds to it
_ANEW = "remove the folder to begin anew"


@dataclass(frozen=True, slots=True)
class HistoryIdentity:
    """Of what the rollouts of a folder are.

    Attributes:
        model: Its name, for messages: one model may have several.
        architecture: Kind and size of the model, as text.
        vocab_size: Token ids are below it.
        tokenizer: Digest of what the ids mean; empty where nobody knows.
    """

    model: str = field(compare=False)
    architecture: str
    vocab_size: int
    tokenizer: str

    def __str__(self) -> str:
        return (
            f"{self.model} ({self.architecture}, {self.vocab_size} token ids, tokenizer "
            f"{self.tokenizer[:12] or 'not known'})"
        )

    def to_json(self) -> bytes:
        """As `from_json` reads it."""
        return json.dumps({"version": 1, **asdict(self)}, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> HistoryIdentity:
        """Checks and takes apart.

        Raises:
            ValueError: if it is none.
        """
        values = json.loads(data)
        kinds = {"model": str, "architecture": str, "vocab_size": int, "tokenizer": str}
        if (
            not isinstance(values, dict)
            or values.pop("version", None) != 1
            or {name: type(value) for name, value in values.items()} != kinds
        ):
            raise ValueError(f"expected version 1 with {', '.join(kinds)}, got {values!r:.200}")
        return cls(**values)


@dataclass(slots=True)
class _Progress:
    """In a segment of another's: up to where records were taken, and bytes looked at."""

    offset: int = 0
    seen: int = 0
    is_damaged: bool = False  # from `offset` on


class HistoryFolder:
    """What others wrote into a folder, and what this process writes. For one thread at a time.

    Args:
        path: Made where there is none, for this user alone.
        identity: Of the rollouts that are written, and wanted.
        max_bytes: Of all segments together; the oldest go when there are more.

    Attributes:
        num_damaged: Records that were left out: not as they were written, or no rollouts of this
            vocabulary. What follows a damaged header in a segment counts as one.

    Raises:
        ValueError: if it holds another model's rollouts, or something else; naming the path.
        OSError: if it cannot be made or read, or nobody can tell whose rollouts it holds.
    """

    def __init__(
        self, path: str | os.PathLike[str], identity: HistoryIdentity, max_bytes: int
    ) -> None:
        self.path = Path(path)
        self.num_damaged = 0
        self._identity = identity
        self._max_bytes = max_bytes
        self._writer = uuid.uuid4().hex
        self._file: int | None = None  # of the last segment
        self._num_bytes = 0  # written to it
        self._progress: dict[str, _Progress] = {}
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path}: expected a folder or nothing, got a file")
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._identify()

    def append(self, rows: KeptRows) -> int:
        """Writes rollouts for others to read.

        Returns:
            How many: one that would take more than half of the folder is left out.

        Raises:
            OSError: if they cannot be written. Some may have been, whole.
        """
        num_rows = 0
        for record in _records(rows):
            data = history_file.packed(record)
            if len(data) <= self._max_bytes // 2:
                self._append(data)
                num_rows += record.tags.size
        return num_rows

    def read(self) -> list[KeptRows]:
        """What others have written since the last call, the oldest segment first.

        There may be more than is read at once: as long as something comes, more may be there.

        Raises:
            OSError: if the folder cannot be read.
        """
        found: list[KeptRows] = []
        sizes = self._segments()
        self._progress = {name: self._progress.get(name, _Progress()) for name in sizes}
        room = _READ_BYTES
        for name, progress in self._progress.items():
            # What is not whole yet is looked at again when there is more of it.
            if self._writer in name or progress.is_damaged or sizes[name] <= progress.seen:
                continue
            try:
                with open(self.path / name, "rb") as file:
                    file.seek(progress.offset)
                    data = file.read(_READ_BYTES)
            except FileNotFoundError:  # too old by now
                continue
            self._take(data, progress, found)
            room -= len(data)
            if room <= 0:
                break
        return found

    def skip_oldest(self, max_bytes: int) -> None:
        """Leaves the oldest segments unread, so that at most so many bytes of the others are.

        What is appended to one of them later is read.

        Raises:
            OSError: if the folder cannot be read.
        """
        for name, size in reversed(self._segments().items()):
            max_bytes -= size
            if max_bytes < 0:
                with contextlib.suppress(FileNotFoundError):  # too old by now
                    self._progress[name] = _Progress(_whole_bytes(self.path / name, size), size)

    def close(self) -> None:
        """No more is written by this process; what was stays."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _take(self, data: bytes, progress: _Progress, found: list[KeptRows]) -> None:
        """The whole records at the beginning of `data`, which starts at `progress.offset`."""
        start = 0
        while len(data) - start >= history_file.HEADER_BYTES:
            size = history_file.num_bytes(data, start)
            if size is None or size > _READ_BYTES:
                self.num_damaged += 1
                progress.is_damaged = True
                break
            if start + size > len(data):
                break
            try:
                rows = history_file.unpacked(data[start : start + size])
                self._check(rows)
                found.append(rows)
            except ValueError:
                self.num_damaged += 1
            start += size
        progress.seen = progress.offset + len(data)
        progress.offset += start

    def _check(self, rows: KeptRows) -> None:
        if rows.token_ids.size and rows.token_ids.max() >= self._identity.vocab_size:
            raise ValueError("token_ids")
        if (rows.logprobs > _MOST_LOGPROB).any():  # NaN: not known
            raise ValueError("logprobs")

    def _segments(self) -> dict[str, int]:
        """Bytes by name, the oldest first."""
        with os.scandir(self.path) as entries:
            named = [entry for entry in entries if _SEGMENT.fullmatch(entry.name)]
        sizes = {}
        for entry in sorted(named, key=lambda entry: entry.name):
            with contextlib.suppress(FileNotFoundError):
                sizes[entry.name] = entry.stat().st_size
        return sizes

    def _append(self, data: bytes) -> None:
        self._make_room(len(data))
        file = self._last_segment(len(data))
        try:
            written = 0
            while written < len(data):
                written += os.write(file, data[written:])
        except OSError:
            # Readers stop at what is not whole, so the segment ends here.
            with contextlib.suppress(OSError):
                os.ftruncate(file, self._num_bytes)
            self.close()
            raise
        self._num_bytes += len(data)

    def _make_room(self, num_bytes: int) -> None:
        sizes = self._segments()
        total = sum(sizes.values())
        for name, size in sizes.items():
            if total + num_bytes <= self._max_bytes:
                break
            (self.path / name).unlink(missing_ok=True)
            total -= size

    def _last_segment(self, num_bytes: int) -> int:
        """Where to append so many bytes."""
        if self._file is not None:
            state = os.fstat(self._file)
            is_full = self._num_bytes + num_bytes > self._max_bytes * _SEGMENT_SHARE
            if is_full or state.st_nlink == 0 or state.st_size != self._num_bytes:
                self.close()
        if self._file is None:
            number = max((int(name[:10]) for name in self._segments()), default=-1) + 1
            path = self.path / f"{number:010}-{self._writer}.rollouts"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
            self._file = os.open(path, flags, 0o600)
            self._num_bytes = 0
        return self._file

    def _identify(self) -> None:
        """Leaves the identity there, or compares it with the one that is."""
        place = self.path / IDENTITY
        if not place.exists():
            others = [name for name in sorted(os.listdir(self.path)) if not name.startswith(".")]
            strangers = [name for name in others if not _SEGMENT.fullmatch(name)]
            if others and not place.exists():  # nor meanwhile
                if strangers:
                    raise ValueError(
                        f"{self.path}: expected shared rollouts or an empty folder, found "
                        f"{strangers[0]!r}"
                    )
                raise OSError(f"{place}: expected the identity of rollouts, it is gone; {_ANEW}")
            part = self.path / f".{IDENTITY}.{self._writer}"
            try:
                with open(part, "xb") as file:
                    file.write(self._identity.to_json())
                    file.flush()
                    os.fsync(file.fileno())  # or a power cut leaves the name of an empty file
                with contextlib.suppress(FileExistsError):  # somebody was faster
                    os.link(part, place)
            finally:
                part.unlink(missing_ok=True)
            sync_folder(self.path)  # before there are rollouts that nobody knows
        try:
            found = HistoryIdentity.from_json(place.read_bytes())
        except (ValueError, RecursionError) as error:
            text = f"{place}: expected the identity of rollouts: {error}; {_ANEW}"
            raise OSError(text) from None
        if found != self._identity:
            raise ValueError(
                f"{self.path}: expected rollouts of {self._identity}, it holds those of {found}; "
                "each model wants a folder of its own"
            )


def _whole_bytes(path: Path, size: int) -> int:
    """Of the first `size` bytes of a segment, those of records that are whole: its writer may be in
    the midst of one."""
    whole = 0
    with open(path, "rb", buffering=0) as file:
        while True:
            file.seek(whole)
            length = history_file.num_bytes(file.read(history_file.HEADER_BYTES), 0)
            if length is None or whole + length > size:
                return whole
            whole += length


def _records(rows: KeptRows) -> Iterator[KeptRows]:
    """In pieces of at most `_RECORD_BYTES`, or of one rollout."""
    ends = rows.cu_lens[1:]
    first, num_rows = 0, rows.tags.size
    while first < num_rows:
        begin = rows.cu_lens[first]
        most = begin + _RECORD_BYTES // 8
        last = max(first + 1, int(np.searchsorted(ends, most, side="right")))
        tokens = slice(begin, rows.cu_lens[last])
        yield KeptRows(
            rows.keys[first:last],
            rows.tags[first:last],
            rows.cu_lens[first : last + 1] - begin,
            rows.token_ids[tokens],
            rows.logprobs[tokens],
        )
        first = last
