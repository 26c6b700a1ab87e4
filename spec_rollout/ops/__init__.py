"""The operations, on packed torch tensors, CPU and CUDA. Each is one module; `reference` holds their plain definitions."""

from __future__ import annotations

from spec_rollout.ops._native import build_info
from spec_rollout.ops._status import check_status
from spec_rollout.ops.accept_prefix import accept_prefix
from spec_rollout.ops.assemble import Assembled, assemble
from spec_rollout.ops.splice_kv import splice_kv

__all__ = [
    "Assembled",
    "accept_prefix",
    "assemble",
    "build_info",
    "check_status",
    "splice_kv",
]
