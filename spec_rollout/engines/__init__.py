"""Rollout engines: what they promise (`base`) and the two that keep it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from spec_rollout.engines.base import RolloutEngine

if TYPE_CHECKING:
    from spec_rollout.engines import transformers, vllm
    from spec_rollout.engines.transformers import TransformersEngine
    from spec_rollout.engines.vllm import VLLMEngine

__all__ = ["RolloutEngine", "TransformersEngine", "VLLMEngine", "transformers", "vllm"]

_MODULE_OF = {"TransformersEngine": "transformers", "VLLMEngine": "vllm"}


def __getattr__(name: str) -> Any:
    # Their libraries are extras, imported with the engine that needs them and not with the package.
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    if name in _MODULE_OF.values():
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
