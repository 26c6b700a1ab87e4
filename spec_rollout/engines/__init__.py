"""Rollout engines: what they promise (`base`) and the two that keep it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spec_rollout.engines.base import RolloutEngine

if TYPE_CHECKING:
    from spec_rollout.engines.transformers import TransformersEngine

__all__ = ["RolloutEngine", "TransformersEngine"]


def __getattr__(name: str) -> Any:
    # transformers is an extra: it is imported when its engine is asked for, not with the package.
    if name == "TransformersEngine":
        from spec_rollout.engines.transformers import TransformersEngine

        return TransformersEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
