"""Which vLLM will do, and what is said where it will not."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable
from typing import Any

from spec_rollout.extras import install_command

OLDEST = (0, 26)  # the `_sample` hook and `custom_class` have the form used here
OLDEST_V2 = (0, 32)  # `ngram_gpu` on Model Runner V2, and its speculator
NEWEST_TESTED = (0, 33)


def require_vllm(purpose: str) -> Any:
    """The module vllm.

    Args:
        purpose: What needs it; named in the error.

    Raises:
        ImportError: if vLLM is not installed, saying how to install it.
    """
    try:
        import vllm
    except ModuleNotFoundError as error:
        if error.name != "vllm":  # it is there, and something that it needs is not
            raise
        raise ImportError(
            f"vllm: expected to be installed for {purpose}, found no module of that name; "
            f"{install_command('vllm')} (without a GPU see docs/vllm.md)",
            name="vllm",
        ) from None
    return vllm


def check_version(version: str) -> None:
    """Refuses versions known not to work, warns of versions never tried.

    Raises:
        ImportError: if vLLM is older than the hooks this package needs.
    """
    found = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    oldest, newest = (".".join(map(str, v)) for v in (OLDEST, NEWEST_TESTED))
    if found < OLDEST:
        raise ImportError(
            f"vllm {version} is too old for spec_rollout's engine, which needs {oldest} or newer"
        )
    if found > NEWEST_TESTED:
        warnings.warn(
            f"vllm {version} is newer than what spec_rollout's engine was tested with "
            f"({oldest} to {newest}); it replaces internals of vLLM that may have changed",
            stacklevel=3,
        )


def check_v2(version: str) -> None:
    """Refuses Model Runner V2 of versions on which the plugin does not run with it.

    Raises:
        ImportError: if vLLM is older than that.
    """
    if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < OLDEST_V2:
        oldest = ".".join(map(str, OLDEST_V2))
        raise ImportError(
            f"vllm {version} is too old for spec_rollout on Model Runner V2, which needs {oldest} "
            "or newer; on V1 (VLLM_USE_V2_MODEL_RUNNER=0, model_runner='v1') it runs"
        )


def replace(owner: Any, name: str, make: Callable[[Callable], Callable]) -> None:
    """Replaces `owner.name` by `make(original)`.

    Raises:
        ImportError: if there is no such thing to replace.
    """
    original = getattr(owner, name, None)
    if original is None:
        import vllm

        raise ImportError(
            f"vllm {vllm.__version__} has no {getattr(owner, '__name__', owner)}.{name}, "
            "which spec_rollout's engine replaces; use a version from "
            f"{'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST_TESTED))}"
        )
    setattr(owner, name, functools.wraps(original)(make(original)))
