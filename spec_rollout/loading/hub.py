"""Rows of Hugging Face `datasets`: of the hub, of a folder of `save_to_disk`, of sets by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spec_rollout.extras import install_command
from spec_rollout.loading.records import DataError, Record

PREFIX = "hub:"
# Of SPEC-RL (arXiv 2509.23232), as its repository downloads them.
NAMED = {
    "deepmath-6k": "hub:bensonbsliu/Spec-RL/deepmath/train_sample_6144.parquet",
    "simplerl-8k": "hub:bensonbsliu/Spec-RL/simplerl_math_35/train_8192.parquet",
}
_FORM = "hub:OWNER/NAME[/FILE][:SUBSET][@SPLIT]"


@dataclass(frozen=True, slots=True)
class HubSource:
    """What a text "hub:OWNER/NAME[/FILE][:SUBSET][@SPLIT]" says.

    Attributes:
        name: OWNER/NAME.
        file: One file of the repository; None takes what the data set's card says.
        subset: Name of a configuration; None for the only or default one.
        split: "train" where none is named.
    """

    name: str
    file: str | None
    subset: str | None
    split: str


def parse(text: str) -> HubSource:
    """Reads "hub:OWNER/NAME[/FILE][:SUBSET][@SPLIT]".

    Raises:
        DataError: if it is of another form.
    """
    rest, _, split = text.removeprefix(PREFIX).partition("@")
    rest, _, subset = rest.partition(":")
    parts = rest.split("/")
    if len(parts) < 2 or not all(parts):
        raise DataError(f"data: expected {_FORM}, got {text!r}")
    file = "/".join(parts[2:]) or None
    if file is not None and subset:
        raise DataError(f"data: expected a file or a subset of {parts[0]}/{parts[1]}, got {text!r}")
    return HubSource("/".join(parts[:2]), file, subset or None, split or "train")


def read_hub(text: str, *, called: str | None = None) -> Iterator[tuple[str, Record]]:
    """Rows of a data set of the hub, downloaded once into the cache of `datasets`.

    Args:
        text: See `parse`.
        called: The name by which the user asked for it.

    Raises:
        DataError: if it cannot be had, saying what to do without a network.
    """
    source = parse(text)
    datasets = _datasets(text)
    try:
        rows = datasets.load_dataset(
            source.name, source.subset, data_files=source.file, split=source.split
        )
    except Exception as error:  # whatever the hub, the network or a file does
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        what = f"{source.name!r}" if source.file is None else f"{source.file!r} of {source.name!r}"
        raise DataError(
            f"data: expected to load {called or text!r} from the Hugging Face hub ({what}), got "
            f"{reason[:300]}. Without a network, fetch it where there is one and give the path of "
            "the .parquet or .jsonl file, or of a folder that datasets' save_to_disk wrote"
        ) from error
    yield from _numbered(rows, called or text)


def is_saved(path: Path) -> bool:
    """Whether `datasets` wrote a folder by `save_to_disk`."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def read_saved(path: Path, split: str | None) -> Iterator[tuple[str, Record]]:
    """Rows of a folder that `save_to_disk` wrote.

    Args:
        path: The folder.
        split: Of a folder with several; None takes "train", or the only one.

    Raises:
        DataError: if it cannot be read, or there is no such split.
    """
    datasets = _datasets(str(path))
    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:
        raise DataError(
            f"data: {str(path)!r} is not a folder that datasets can read: {error}"
        ) from None
    if isinstance(saved, Mapping):
        wanted = split or ("train" if "train" in saved or len(saved) != 1 else next(iter(saved)))
        if wanted not in saved:
            raise DataError(
                f"data: expected a split {wanted!r} in {str(path)!r}, got {', '.join(saved)} "
                "(FOLDER@SPLIT names one)"
            )
        saved = saved[wanted]
    elif split is not None:
        raise DataError(f"data: expected no split of {str(path)!r}, which has none, got {split!r}")
    yield from _numbered(saved, str(path) if split is None else f"{path}@{split}")


def _numbered(rows: Any, name: str) -> Iterator[tuple[str, Record]]:
    for number, record in enumerate(rows, start=1):
        yield f"{name}:{number}", dict(record)


def _datasets(what: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"data: reading {what!r} needs datasets ({install_command('datasets')})"
        ) from None
    return datasets
