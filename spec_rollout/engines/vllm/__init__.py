"""vLLM with verification of cached rollouts inside the engine.

Importing this package does not import vLLM, so that clients can build requests (`extra_args`)
without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spec_rollout.engines.vllm.wire import EXTRA_ARG, ReuseRequest, decode, encode, extra_args

if TYPE_CHECKING:
    from spec_rollout.engines.vllm.client.engine import VLLMEngine, engine_args

__all__ = [
    "EXTRA_ARG",
    "ReuseRequest",
    "VLLMEngine",
    "decode",
    "encode",
    "engine_args",
    "extra_args",
]


def __getattr__(name: str) -> Any:
    if name in ("VLLMEngine", "engine_args"):
        from spec_rollout.engines.vllm.client import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
