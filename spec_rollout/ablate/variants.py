"""Which ways of reuse are compared: names of runs, and what each sets in section `rollout`."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from spec_rollout.config.rollouts import RolloutConfig

PLAIN = "plain"
BASELINES = ("random-reuse", "random-cut")
# What a config says of reuse does not count: every variant says it all.
_OF_REUSE = (
    *("rule", "reuse", "drafting", "log_lenience", "scale", "min_target_prob", "reuse_prob"),
    *("tolerance", "start_log_lenience", "schedule_steps"),
    *("lenience_budget", "lenience_target", "lenience_gain", "lenience_range"),
    *("fresh_share", "max_age", "refresh_epochs"),
)
_DEFAULTS = {f.name: f.default for f in fields(RolloutConfig) if f.name in _OF_REUSE}
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")

Variants = dict[str, dict[str, Any]]


def variants(
    lenience: str | None = None,
    baselines: str | None = None,
    also: Sequence[str] = (),
    base: RolloutConfig | None = None,
) -> Variants:
    """The runs of a grid: what each changes in a config, by "section.key".

    `plain`, which reuses nothing, comes first.

    Args:
        lenience: Values of log_lenience of the published rule, with commas; `inf` reuses whole
            rollouts.
        baselines: Some of `BASELINES`, with commas.
        also: "[NAME:] KEY=VALUE, ..." each: keys of section `rollout`, or with another section
            "section.key". Without a `rule` among them it is lenient, at the log_lenience that is
            published for the algorithm.

    Raises:
        ValueError: naming the option.
    """
    found: Variants = {PLAIN: _changes({"rule": "none", "reuse": False})}

    def add(option: str, name: str, changes: dict[str, Any]) -> None:
        if name in found:
            raise ValueError(f"{option}: expected runs of different names, got {name} twice")
        found[name] = changes

    for text in _items(lenience):
        value = _lenience(text)
        changes = _changes({"rule": "lenient", "log_lenience": value})
        add("--lenience", f"lenient_{value:g}", changes)
    for text in _items(baselines):
        if text not in BASELINES:
            raise ValueError(f"--baselines: expected {' or '.join(BASELINES)}, got {text!r}")
        name = text.replace("-", "_")
        add("--baselines", name, _changes({"rule": name}))
    for text in also:
        name, values = _also(text)
        add("--also", name, _changes({"rule": "lenient", **values}))
    return found


def _changes(values: dict[str, Any]) -> dict[str, Any]:
    own = {key: value for key, value in values.items() if "." not in key}
    reset = {**_DEFAULTS, **own}
    changes = {
        f"rollout.{key}": "none"
        if value is None
        else list(value)
        if isinstance(value, tuple)
        else value
        for key, value in reset.items()
    }
    # A correction says what is done about reused tokens; a lossless rule takes none.
    changes["train.correction"] = "none"
    return {**changes, **{key: value for key, value in values.items() if "." in key}}


def _items(text: str | None) -> list[str]:
    return [] if text is None else [item.strip() for item in text.split(",")]


def _lenience(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise ValueError(f"--lenience: expected numbers with commas, got {text!r}")
    return value


def _also(text: str) -> tuple[str, dict[str, Any]]:
    """Name and keys of "[NAME:] KEY=VALUE, ..."."""
    named = re.fullmatch(r"\s*([^:=]+):(.*)", text, re.DOTALL)
    listed = named[2] if named else text
    values: dict[str, Any] = {}
    for item in re.split(r",(?![^\[]*\])", listed):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not (equals and key and value):
            raise ValueError(f"--also: expected [NAME:] KEY=VALUE, ..., got {text!r}")
        try:
            values[key.removeprefix("rollout.")] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            values[key.removeprefix("rollout.")] = value
    name = named[1].strip() if named else "_".join(f"{k}_{v}" for k, v in values.items())
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"--also: expected a name of letters, digits and . _ + - before the colon, got {name!r}"
        )
    return name, values
