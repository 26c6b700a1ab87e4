"""What lives in vLLM's worker processes.

`worker_extension_cls` names `spec_rollout.engines.vllm.worker.ReuseWorker`, whatever file it is in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spec_rollout.engines.vllm.worker.extension import ReuseWorker

__all__ = ["ReuseWorker"]


def __getattr__(name: str) -> Any:
    if name == "ReuseWorker":
        from spec_rollout.engines.vllm.worker.extension import ReuseWorker

        return ReuseWorker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
