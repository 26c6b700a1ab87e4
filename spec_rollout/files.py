"""Files that appear complete or not at all, whatever stands at their place already.

A link is followed and stays a link. What is no regular file (a pipe, a terminal, a device, what
/dev/stdout stands for) is written to, never replaced.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal, cast

PathLike = str | os.PathLike[str]
_PATIENCE_SECONDS = 10.0
_OPEN_FILE = re.compile(r"/proc/[^/]+/(task/[^/]+/)?fd")


def place_of(path: PathLike) -> tuple[Literal["file", "folder", "stream"], Path]:
    """What writing to `path` means, and where the links lead.

    "file": a regular file, or nothing yet, to be replaced whole. "folder": cannot be written.
    "stream": written to as it is; anything else that exists, and every name of an open file of the
    process (/dev/stdout, /dev/fd/3), also if that is a regular file.

    Raises:
        OSError: for a link that leads round in a circle, a name too long, a folder not readable.
    """
    place = Path(os.path.abspath(path))
    for _ in range(40):  # as many as Linux follows
        place = Path(os.path.realpath(place.parent)) / place.name
        if _OPEN_FILE.fullmatch(str(place.parent)):
            return "stream", place
        if not place.is_symlink():
            break
        place = place.parent / os.readlink(place)
    try:
        mode = os.stat(place).st_mode
    except FileNotFoundError:
        return "file", place
    if stat.S_ISDIR(mode):
        return "folder", place
    return ("file" if stat.S_ISREG(mode) else "stream"), place


def descriptor_of(place: Path) -> int | None:
    """The number of an open file of this process, if that is where a stream leads."""
    own = str(place.parent) == f"/proc/{os.getpid()}/fd" and place.name.isdecimal()
    return int(place.name) if own else None


@contextmanager
def replacing(path: PathLike, *, seekable: bool = False) -> Iterator[BinaryIO]:
    """A file to write to; what is written is at `path` when the block ends, and on the disk.

    If the block raises, or the machine stops, the older file stays as it was. A stream gets what is
    written at once.

    Args:
        path: A link is followed. An older file keeps its permissions.
        seekable: The block seeks. A stream then gets all of it at the end.

    Raises:
        OSError: if it cannot be written; before the block if it is a folder or in none.
    """
    kind, place = place_of(path)
    if kind == "folder":
        raise IsADirectoryError(errno.EISDIR, "expected a file, got a folder", os.fspath(path))
    if kind == "stream":
        with _stream(place, seekable) as out:
            yield out
        return
    # Of a name of its own, so that two writers do not write to one file; the last one's stays.
    part = place.with_name(f".{place.name[:100]}.{uuid.uuid4().hex}.tmp")
    try:
        with open(part, "xb") as file:
            if place.exists():
                os.chmod(part, stat.S_IMODE(place.stat().st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, place)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_folder(place.parent)


def sync_folder(path: PathLike) -> None:
    """Makes the names in a folder survive a power cut."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _open_stream(place: Path) -> int:
    """Opened for writing. A pipe without a reader would be waited for without end and without a
    word; here for some seconds, as the reader may be starting."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            number = os.open(place, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            if time.monotonic() > deadline:
                text = "expected a pipe that is read, got one without a reader"
                raise OSError(errno.ENXIO, text, os.fspath(place)) from None
            time.sleep(0.02)
        else:
            os.set_blocking(number, True)
            return number


@contextmanager
def _stream(place: Path, seekable: bool) -> Iterator[BinaryIO]:
    number = descriptor_of(place)
    # Appending: an open file that is regular has its content already.
    opened = _open_stream(place) if number is None else os.dup(number)
    with open(opened, "wb") as stream:
        if not seekable:
            yield stream
            return
        with tempfile.TemporaryFile() as whole:
            yield cast(BinaryIO, whole)
            whole.seek(0)
            shutil.copyfileobj(whole, stream)
