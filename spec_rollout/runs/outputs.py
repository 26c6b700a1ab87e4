"""What a command writes: its options checked before anything is computed, and the writing."""

from __future__ import annotations

import fcntl
import io
import os
import stat
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from spec_rollout.files import descriptor_of, place_of, replacing


def check_outputs(
    outputs: Mapping[str, Path | None],
    *,
    inputs: Mapping[str, Path | None] | None = None,
    updates: Collection[tuple[str, str]] = (),
) -> None:
    """Raises unless every output can be written, to a place of its own.

    Args:
        outputs: Paths by option; None is not written.
        inputs: Files that the command reads, which no output may replace.
        updates: (input, output) that may be one file: it is read whole before it is written.

    Raises:
        ValueError: naming the option or options; nothing is left behind in a folder.
    """
    places: dict[str, Path] = {}
    for option, path in (inputs or {}).items():
        if path is not None and path.is_file():
            places[option] = Path(os.path.realpath(path))
    read = frozenset(places)
    for option, path in outputs.items():
        if path is None:
            continue
        place = _checked(option, path)
        for other, known in places.items():
            if (other, option) not in updates and _same(place, known):
                use = "reads" if other in read else "writes"
                raise ValueError(
                    f"{option}: expected a file of its own, got {path}, which {other} {use}"
                )
        places[option] = place


def _checked(option: str, path: Path) -> Path:
    """Where the path leads, if that can be written."""
    try:
        kind, place = place_of(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{option}: expected a file, got {str(path)!r} ({reason})") from None
    if kind == "folder":
        raise ValueError(f"{option}: expected a file, got a folder, {path}")
    if kind == "stream":
        if not _takes_writes(place):
            raise ValueError(f"{option}: expected what can be written, got {path}")
        return place
    if not place.parent.is_dir():
        raise ValueError(f"{option}: expected a file in an existing folder, got {path}")
    if place.exists() and not os.access(place, os.W_OK):
        raise ValueError(f"{option}: expected a file that may be written, got {path}")
    try:
        with tempfile.TemporaryFile(dir=place.parent):
            pass
    except OSError as error:
        raise ValueError(
            f"{option}: expected a folder that can be written, got {path} ({error.strerror})"
        ) from None
    return place


def _takes_writes(stream: Path) -> bool:
    try:
        number = descriptor_of(stream)
        if number is not None:
            return fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        return os.access(stream, os.W_OK) and not stat.S_ISSOCK(os.stat(stream).st_mode)
    except OSError:
        return False


def _same(one: Path, other: Path) -> bool:
    """Whether two outputs are one; what goes to the null device is nowhere."""
    if str(one) == os.devnull:
        return False
    try:
        return one.samefile(other)
    except OSError:
        return one == other


def is_stream(path: Path) -> bool:
    """Whether the path is no file to be replaced, but a pipe, a terminal or a device."""
    try:
        return place_of(path)[0] == "stream"
    except (OSError, ValueError):
        return False  # nothing; `check_outputs` says why


@contextmanager
def writing(path: Path) -> Iterator[TextIO]:
    """Like `files.replacing`, for text in UTF-8. A lone surrogate, which UTF-8 does not have, is
    written as \\udc80: within JSON that is the same character again."""
    with replacing(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", newline="\n")
        try:
            yield text
            text.flush()
        finally:
            text.detach()


def write_text(path: Path, text: str) -> None:
    """Writes a whole file; see `writing`."""
    with writing(path) as file:
        file.write(text)
