"""Configs from TOML and `section.key=value` overrides, and back."""

from __future__ import annotations

import difflib
import os
import tomllib
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from spec_rollout.config.sections import ConfigError, RunConfig


def load_config(
    path: str | os.PathLike[str] | None = None, overrides: Iterable[str] = ()
) -> RunConfig:
    """Reads a TOML file and applies overrides.

    Args:
        path: TOML file; None starts from the defaults (the overrides must then give the required
            keys).
        overrides: "section.key=value" each; the value is read as TOML, a bare word as a string.
            `none` unsets what may be unset (as "none" does in a file).

    Raises:
        ConfigError: naming the key, what was expected and what was given; the nearest known key if
            it is unknown.
    """
    table: dict[str, Any] = {}
    if path is not None:
        try:
            table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(
                f"config: expected a TOML file, found nothing at {str(path)!r}"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"config: expected a TOML file, got {str(path)!r}: {error}") from None
        except (ValueError, RecursionError) as error:  # numbers without end are a ValueError
            raise ConfigError(f"config: {str(path)!r} is not valid TOML: {error}") from None
    for override in overrides:
        _apply_override(table, override)
    return from_dict(table)


def from_dict(table: Mapping[str, Any]) -> RunConfig:
    """Builds a config from nested tables, checking every key and type."""
    return _build(RunConfig, table, "")


def with_overrides(config: RunConfig, overrides: Iterable[str]) -> RunConfig:
    """A config with some values replaced, as `load_config` does."""
    table = to_dict(config)
    for override in overrides:
        _apply_override(table, override)
    return from_dict(table)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Nested plain tables, resolved.

    TOML has no `None`: it is left out, or "none" where it is not the default.
    """
    tables: dict[str, Any] = {}
    for section in fields(config):
        component = getattr(config, section.name)
        table = tables[section.name] = {}
        for f in fields(component):
            value = getattr(component, f.name)
            if value is not None:
                table[f.name] = list(value) if isinstance(value, tuple) else value
            elif f.default is not None:
                table[f.name] = "none"
    return tables


def dump_config(config: RunConfig) -> str:
    """The resolved config as TOML; `load_config` reads it back equal."""
    import tomli_w

    return tomli_w.dumps(to_dict(config))


def _apply_override(table: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        raise ConfigError(f"--set: expected section.key=value, got {override!r}")
    group = table.setdefault(section, {})
    if not isinstance(group, dict):
        raise ConfigError(f"{section}: expected a section, got {group!r}")
    text = text.strip()
    try:
        group[key] = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        group[key] = text


def _build(cls: type, table: Mapping[str, Any], prefix: str) -> Any:
    if not isinstance(table, Mapping):
        raise ConfigError(f"{prefix.rstrip('.')}: expected a section, got {table!r}")
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}
    for key in table:
        if key not in known:
            raise ConfigError(_unknown(prefix, key, known))
    values: dict[str, Any] = {}
    for name, f in known.items():
        required = f.default is MISSING and f.default_factory is MISSING
        if name in table:
            values[name] = _convert(hints[name], table[name], prefix + name)
        elif required:
            if not is_dataclass(hints[name]):
                raise ConfigError(
                    f"{prefix}{name}: expected {_describe(hints[name])}, it is required but missing"
                )
            values[name] = _build(hints[name], {}, f"{prefix}{name}.")
    return cls(**values)


def _unknown(prefix: str, key: str, known: Mapping[str, Any]) -> str:
    kind = "key" if prefix else "section"
    message = f"{prefix}{key}: unknown {kind}"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if near:
        return f"{message}; did you mean {prefix}{near[0]}?"
    # A key of another section, perhaps.
    for f in fields(RunConfig):
        section = get_type_hints(RunConfig)[f.name]
        if prefix and key in {inner.name for inner in fields(section)}:
            return f"{message}; did you mean {f.name}.{key}?"
    return f"{message}; known: {', '.join(known)}"


def _allows_none(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)


def _convert(hint: Any, value: Any, name: str) -> Any:
    if isinstance(hint, type) and is_dataclass(hint):
        return _build(hint, value, f"{name}.")
    if _allows_none(hint):
        inner = next(arg for arg in get_args(hint) if arg is not type(None))
        return None if value in (None, "none") else _convert(inner, value, name)
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):  # a number, or a word
        number, word = get_args(hint)
        return _convert(word if isinstance(value, str) else number, value, name)
    if origin is Literal:
        choices = get_args(hint)
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1)
            hint_text = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"{name}: expected one of {', '.join(choices)}, got {value!r}{hint_text}"
            )
        return value
    if origin is tuple:
        args = get_args(hint)
        if not isinstance(value, (list, tuple)) or (
            args[-1] is not Ellipsis and len(value) != len(args)
        ):
            raise ConfigError(f"{name}: expected {_describe(hint)}, got {value!r}")
        inner_hints = [args[0]] * len(value) if args[-1] is Ellipsis else args
        pairs = enumerate(zip(inner_hints, value, strict=True))
        return tuple(_convert(h, v, f"{name}[{i}]") for i, (h, v) in pairs)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"{name}: expected a number, got one beyond 1e308") from None
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise ConfigError(
            f"{name}: expected {_describe(hint)}, got {type(value).__name__} {value!r}"
        )
    if hint is float and value != value:
        raise ConfigError(f"{name}: expected a number, got NaN")
    return value


def _describe(hint: Any) -> str:
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    if hint in names:
        return names[hint]
    if _allows_none(hint):
        return _describe(next(arg for arg in get_args(hint) if arg is not type(None)))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(_describe, get_args(hint)))
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    if get_origin(hint) is tuple:
        args = get_args(hint)
        count = "a list" if args[-1] is Ellipsis else f"a list of {len(args)}"
        return f"{count} ({_describe(args[0])} each)"
    return str(hint)
