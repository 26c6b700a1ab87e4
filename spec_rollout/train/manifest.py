"""Checksums of all files of a checkpoint, as the command sha256sum writes and checks them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from spec_rollout.train.state import STATE, CheckpointError

MANIFEST = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")
# Beside the model's own.
_ALWAYS = ("trainer.pt", STATE)
# The rollouts, or where they are.
_ROLLOUTS = ("cache.bin", "rollouts.json")


def write_manifest(folder: Path) -> None:
    """Writes SHA256SUMS over all files under a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [
        f"{digest}  {path.relative_to(folder).as_posix()}\n"
        for path, digest in zip(paths, _digests(paths), strict=True)
    ]
    (folder / MANIFEST).write_text("".join(lines), encoding="utf-8")


def check_complete(folder: Path) -> None:
    """Raises CheckpointError unless all files of a checkpoint are there; reads none but the list
    of them."""
    for name in _checksums(folder):
        if not (folder / name).is_file():
            raise CheckpointError(f"checkpoint {str(folder)!r}: expected {name} in it, found none")


def check_content(folder: Path) -> None:
    """Raises CheckpointError for the first file of a checkpoint that is not as it was written."""
    checksums = _checksums(folder)
    paths = [folder / name for name in checksums]
    try:
        digests = _digests(paths)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename}: expected to read it, cannot: {error.strerror}"
        ) from None
    for path, expected, found in zip(paths, checksums.values(), digests, strict=True):
        if found != expected:
            raise CheckpointError(
                f"{path}: expected the SHA-256 checksum {expected[:16]}... of {MANIFEST}, got "
                f"{found[:16]}...: it is not as it was written"
            )


def _checksums(folder: Path) -> dict[str, str]:
    """The checksum of each file, by its path in the folder."""
    path = folder / MANIFEST
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except FileNotFoundError:
        raise CheckpointError(
            f"checkpoint {str(folder)!r}: expected {MANIFEST} in it, found none (it was half "
            "written or removed, or is of format 2)"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected checksums, cannot read them: {error!r}") from None
    checksums = {}
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        if match is None or ".." in Path(match[2]).parts or Path(match[2]).is_absolute():
            raise CheckpointError(
                f"{path}:{number}: expected a checksum and a file's name, got {line!r:.100}"
            )
        checksums[match[2]] = match[1]
    either = next((name for name in _ROLLOUTS if name in checksums), _ROLLOUTS[0])
    for name in (*_ALWAYS, either):
        if name not in checksums:
            raise CheckpointError(f"{path}: expected the checksum of {name}, found none")
    return checksums


def _digests(paths: Sequence[Path]) -> list[str]:
    """The checksum of each file, some at a time."""
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(_digest, paths))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
