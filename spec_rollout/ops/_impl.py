"""The choice among an op's implementations."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from spec_rollout.checks import shown


def implementation(table: Mapping[str, Callable[..., Any]], impl: str) -> Callable[..., Any]:
    """The entry of `table` named `impl`.

    Raises:
        ValueError: naming the implementations that there are.
    """
    try:
        return table[impl]
    except (KeyError, TypeError):
        raise ValueError(f"impl: expected one of {', '.join(table)}, got {shown(impl)}") from None


def triton_module(name: str) -> ModuleType:
    """`spec_rollout.ops.triton.<name>`, imported at its first use.

    Raises:
        ImportError: if triton is not installed.
    """
    try:
        return importlib.import_module(f"spec_rollout.ops.triton.{name}")
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        raise ImportError(
            f'impl: "triton" needs the triton package, which cannot be imported ({error}); '
            'install it with `pip install triton`, or use impl="native"',
            name="triton",
        ) from error
