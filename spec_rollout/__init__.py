"""Speculative reuse of rollouts in on-policy reinforcement learning of language models.

Everything named in `__all__` is imported when it is first asked for: `import spec_rollout` loads
nothing, not even torch. Sub-packages are reached the same way (`spec_rollout.engines.vllm`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spec_rollout import engines, ops
    from spec_rollout.acceptance import (
        AcceptanceRule,
        Coupled,
        Lenient,
        NoReuse,
        OneHot,
        RandomCut,
        RandomReuse,
        Schedule,
    )
    from spec_rollout.cache import RolloutCache
    from spec_rollout.engines.base import RolloutEngine
    from spec_rollout.engines.transformers import TransformersEngine
    from spec_rollout.engines.vllm import ReuseRequest, VLLMEngine, engine_args, extra_args
    from spec_rollout.keys import noise_keys, prompt_key
    from spec_rollout.rollout import RolloutSession
    from spec_rollout.rounding import Rounding
    from spec_rollout.types import (
        Drafts,
        FinishReason,
        History,
        RolloutRequests,
        Rollouts,
        RolloutStats,
        SamplingParams,
    )

    __version__: str

__all__ = [
    "AcceptanceRule",
    "Coupled",
    "Drafts",
    "FinishReason",
    "History",
    "Lenient",
    "NoReuse",
    "OneHot",
    "RandomCut",
    "RandomReuse",
    "ReuseRequest",
    "RolloutCache",
    "RolloutEngine",
    "RolloutRequests",
    "RolloutSession",
    "RolloutStats",
    "Rollouts",
    "Rounding",
    "SamplingParams",
    "Schedule",
    "TransformersEngine",
    "VLLMEngine",
    "__version__",
    "engine_args",
    "engines",
    "extra_args",
    "noise_keys",
    "ops",
    "prompt_key",
]

_MODULES = {
    "acceptance": (
        "AcceptanceRule",
        "Coupled",
        "Lenient",
        "NoReuse",
        "OneHot",
        "RandomCut",
        "RandomReuse",
        "Schedule",
    ),
    "cache": ("RolloutCache",),
    "engines": ("RolloutEngine", "TransformersEngine"),
    "engines.vllm": ("ReuseRequest", "VLLMEngine", "engine_args", "extra_args"),
    "keys": ("noise_keys", "prompt_key"),
    "rollout": ("RolloutSession",),
    "rounding": ("Rounding",),
    "types": (
        "Drafts",
        "FinishReason",
        "History",
        "RolloutRequests",
        "RolloutStats",
        "Rollouts",
        "SamplingParams",
    ),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
_SUBMODULES = ("acceptance", "cache", "engines", "keys", "ops", "rollout", "types")


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        try:
            value: Any = metadata.version("spec-rollout")
        except metadata.PackageNotFoundError:
            value = "0+unknown"  # a source tree that was never installed
    elif name in _MODULE_OF:
        try:
            value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        except ModuleNotFoundError as error:
            from spec_rollout.extras import TRAIN, install_command

            missing = (error.name or "").partition(".")[0]
            if missing not in TRAIN:
                raise
            raise ImportError(
                f"spec_rollout.{name}: expected {missing} to be installed, found no module of that "
                f"name; {install_command(missing)}",
                name=missing,
            ) from None
    elif name in _SUBMODULES:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
