"""What differs between the configurations of the runs on a page."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from spec_rollout.report.texts import cut, plain
from spec_rollout.runs.load import Run

# Where a run lives is no part of what it does; it differs always.
_PLACES = frozenset({"log.run_dir"})
_ABSENT = "\N{EN DASH}"


def config_of(run: Run) -> dict[str, str] | None:
    """Values of the resolved configuration by dotted key, as text; None without one.

    Raises:
        ValueError: if it is not TOML.
    """
    if run.config is None:
        return None
    return {key: cut(_text(value), 300) for key, value in _flat(tomllib.loads(run.config))}


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value) or "none"
    return "(empty)" if value == "" else plain(value)


def difference_rows(runs: Sequence[Run], problems: list[str]) -> list[list[str]]:
    """One row per key whose values are not all equal: the key, then its value per run; a dash where
    a run does not have it. A run without a readable configuration has dashes only and is compared
    with none.

    Args:
        problems: Takes what could not be read.
    """
    configs: list[dict[str, str] | None] = []
    for run in runs:
        try:
            configs.append(config_of(run))
        except (ValueError, RecursionError) as error:
            problems.append(f"{run.name}: config.toml: not readable ({error}); not compared")
            configs.append(None)
    known = [config for config in configs if config is not None]
    keys = dict.fromkeys(key for config in known for key in config)
    return [
        [key, *(_ABSENT if config is None else config.get(key, _ABSENT) for config in configs)]
        for key in keys
        if key not in _PLACES and len({config.get(key) for config in known}) > 1
    ]
