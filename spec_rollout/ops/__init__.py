"""The operations, on packed torch tensors, CPU and CUDA. Each is one module; `reference` holds
their plain definitions."""

from __future__ import annotations

from spec_rollout._native import build_info
from spec_rollout.ops._status import check_status, status_word
from spec_rollout.ops.accept_prefix import accept_prefix
from spec_rollout.ops.assemble import Assembled, assemble
from spec_rollout.ops.sample_tokens import SampleResult, sample_tokens
from spec_rollout.ops.splice_kv import splice_kv
from spec_rollout.ops.token_logprobs import token_logprobs
from spec_rollout.ops.verify_prefix import VerifyResult, verify_prefix

__all__ = [
    "Assembled",
    "SampleResult",
    "VerifyResult",
    "accept_prefix",
    "assemble",
    "build_info",
    "check_status",
    "sample_tokens",
    "splice_kv",
    "status_word",
    "token_logprobs",
    "verify_prefix",
]
