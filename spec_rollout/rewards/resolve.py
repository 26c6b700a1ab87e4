"""The function behind a name in a config."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spec_rollout.config.sections import ConfigError
from spec_rollout.rewards.builtin import BUILTIN, RewardFunction


def resolve(name: str, folder: str | os.PathLike[str] | None = None) -> RewardFunction:
    """The function behind a built-in name or "package.module:function".

    Args:
        name: The name.
        folder: Where modules are looked for before the usual places.

    Raises:
        ConfigError: if there is none, or the module in `folder` has a name that is taken.
    """
    if name in BUILTIN:
        return BUILTIN[name]
    module_name, colon, attribute = name.partition(":")
    if not (colon and module_name and attribute):
        raise ConfigError(
            f"reward.functions: expected 'package.module:function' or one of {', '.join(BUILTIN)}, "
            f"got {name!r}"
        )
    function: Any
    try:
        with _importable(folder):
            function = importlib.import_module(module_name)
        _check_origin(module_name, function, folder)
        for part in attribute.split("."):
            function = getattr(function, part)
    except (KeyboardInterrupt, ConfigError):
        raise
    except BaseException as error:  # a module may do anything, exit included
        reason = str(error) if isinstance(error, ImportError | AttributeError) else repr(error)
        where = f" (also looked for in {str(folder)!r})" if _not_found(error, module_name) else ""
        raise ConfigError(
            f"reward.functions: cannot load {name!r}: {reason}{where if folder else ''}"
        ) from error
    if not callable(function):
        raise ConfigError(
            f"reward.functions: expected a callable, got {type(function).__name__} at {name!r}"
        )
    if inspect.isasyncgenfunction(function):
        raise ConfigError(
            f"reward.functions: expected a function that returns, got the async generator {name!r}"
        )
    return function


@contextmanager
def _importable(folder: str | os.PathLike[str] | None) -> Iterator[None]:
    """While modules are imported, those of the folder come first; later ones, last.

    The functions may import more when they are called, and processes that they start need the
    modules, too.
    """
    if folder is None:
        yield
        return
    path = os.path.abspath(folder)
    sys.path.insert(0, path)
    importlib.invalidate_caches()  # the file may be newer than the last look into its folder
    try:
        yield
        if sys.path.count(path) < 2:
            sys.path.append(path)
    finally:
        sys.path.remove(path)  # the first one


def _check_origin(module_name: str, module: Any, folder: str | os.PathLike[str] | None) -> None:
    """The folder's module must not be another one that was imported before."""
    if folder is None:
        return
    top = module_name.partition(".")[0]
    beside = [p for p in (Path(folder) / f"{top}.py", Path(folder) / top / "__init__.py")]
    here = [path for path in beside if path.is_file()]
    found = getattr(sys.modules.get(top), "__file__", None)
    if here and (found is None or not any(os.path.samefile(found, path) for path in here)):
        raise ConfigError(
            f"reward.functions: expected a module name that is not taken, got {top!r}: "
            f"{str(here[0])!r} has the name of {found or 'a module of Python'}"
        )


def _not_found(error: BaseException, module_name: str) -> bool:
    return isinstance(error, ModuleNotFoundError) and error.name == module_name.partition(".")[0]
