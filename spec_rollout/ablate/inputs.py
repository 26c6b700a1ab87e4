"""What the runs of a grid read, known by its content: rows of data, folders of models."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from spec_rollout.config.sections import RunConfig
from spec_rollout.loading.data import read_records
from spec_rollout.loading.records import canonical

ROWS, MODEL = "rows", "model"
Inputs = dict[str, dict[str, str]]

# Of a model's folder: configs, weights, tokenizer.
_OF_A_MODEL = (".bin", ".jinja", ".json", ".model", ".safetensors", ".txt")
# Of a large file so many bytes at so many places: training changes weights everywhere.
_BLOCK, _MOST_BLOCKS = 1 << 16, 32


def inputs_of(configs: Iterable[RunConfig]) -> Inputs:
    """Fingerprints by `ROWS` and `MODEL`, and by what the configs call them.

    Folders that are not there are left out.

    Raises:
        DataError: if rows cannot be read.
    """
    found: Inputs = {ROWS: {}, MODEL: {}}
    for config in configs:
        for path, most in (
            (config.data.path, config.data.max_rows),
            (config.eval.path, config.eval.num_heldout_prompts),
        ):
            if path is None:
                continue
            name = path if most is None else f"{path} (the first {most})"
            if name not in found[ROWS]:
                found[ROWS][name] = rows_fingerprint(path, most)
        for path in (config.model.path, config.model.reference):
            if path is not None and path not in found[MODEL] and Path(path).is_dir():
                found[MODEL][path] = model_fingerprint(Path(path))
    return found


def rows_fingerprint(path: str, max_rows: int | None = None) -> str:
    """Of rows as `read_records` gives them: all columns, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for _, record in read_records(path, max_rows):
        content = canonical(record)
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def model_fingerprint(folder: Path) -> str:
    """Of the files that a model is loaded from: their names, sizes, and bytes, of large ones those
    at some places."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.iterdir()):
        if path.suffix not in _OF_A_MODEL or not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for start in _starts(size):
                file.seek(start)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def _starts(size: int) -> Iterable[int]:
    if size <= _BLOCK * _MOST_BLOCKS:
        return range(0, size, _BLOCK)
    return ((size - _BLOCK) * i // (_MOST_BLOCKS - 1) for i in range(_MOST_BLOCKS))
