"""Options of a command line made from the fields of a config class: name, type, default and help.

A command that takes some keys of a section names them; nothing about them is said twice.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from spec_rollout.config.sections import ConfigError


def option(name: str) -> str:
    """The option of a field: --num-samples for num_samples."""
    return f"--{name.replace('_', '-')}"


def add_options(
    parser: Any, config_class: type, *names: str, defaults: Mapping[str, Any] | None = None
) -> None:
    """Adds an option for each named field of a config class.

    Args:
        parser: A parser, or a group of its options.
        config_class: A section (`spec_rollout.config.sections`); help is what its docstring says
            about the field.
        names: Fields that are numbers, strings or a choice of them.
        defaults: Where a command's differ from the class's.
    """
    hints = get_type_hints(config_class, localns={"AcceptanceRule": Any})
    known = {f.name: f for f in fields(config_class)}
    texts = attribute_texts(config_class)
    for name in names:
        default = (defaults or {}).get(name, known[name].default)
        arguments: dict[str, Any] = {"default": default, "help": texts[name].replace("%", "%%")}
        kind = _without_none(hints[name])
        if get_origin(kind) is Literal:
            arguments["choices"] = get_args(kind)
        else:
            arguments["type"] = kind
        if default not in (None, MISSING):
            arguments["help"] += " (default: %(default)s)"
        parser.add_argument(option(name), **arguments)


def values(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """What the command line says about these fields."""
    return {name: getattr(args, name) for name in names}


def named(error: ConfigError) -> ValueError:
    """The error of a config that came from options: it names the option instead of the key."""
    key, _, rest = str(error).partition(":")
    return ValueError(f"{option(key.rpartition('.')[2])}:{rest}")


def attribute_texts(config_class: type) -> dict[str, str]:
    """What the section "Attributes" of a class's docstring says about each, in one line."""
    section = (inspect.getdoc(config_class) or "").partition("Attributes:\n")[2]
    texts: dict[str, str] = {}
    for entry in re.split(r"\n    (?=\S)", "\n" + section)[1:]:
        names, _, text = entry.partition(":")
        line = " ".join(text.split()).replace("`", "").rstrip(".")
        texts.update(dict.fromkeys(names.strip().split(", "), line))
    return texts


def _without_none(hint: Any) -> Any:
    inner = [arg for arg in get_args(hint) if arg is not type(None)]
    return inner[0] if len(inner) == 1 and get_origin(hint) is not Literal else hint
