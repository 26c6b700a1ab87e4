"""The operations, on packed torch tensors, CPU and CUDA. Each is one module; `reference` holds their plain definitions."""

from __future__ import annotations

from spec_rollout.ops._native import build_info
from spec_rollout.ops._status import check_status
from spec_rollout.ops.accept_prefix import accept_prefix

__all__ = [
    "accept_prefix",
    "build_info",
    "check_status",
]
