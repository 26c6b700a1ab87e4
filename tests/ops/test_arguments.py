"""Lists where tensors are expected: one error that names the argument, and nothing done."""

from __future__ import annotations

import pytest
import torch

from spec_rollout import ops
from spec_rollout.acceptance import Coupled, Lenient

_IDS, _CU = torch.zeros(1, dtype=torch.int64), torch.tensor([0, 1])
_LOGITS, _LOGPROBS = torch.zeros(2, 8), torch.zeros(1)
_RANGES = dict.fromkeys(("src_rows", "src_starts", "dst_rows", "dst_starts", "lens"), _IDS)
CALLS = {
    "token_logprobs": {"logits": _LOGITS[:1], "token_ids": _IDS},
    "sample_tokens": {"logits": _LOGITS[:1], "keys": _IDS, "positions": _IDS},
    "accept_prefix": {
        "draft_logprobs": _LOGPROBS, "target_logprobs": _LOGPROBS, "rule": Lenient(0.0),
        "keys": _IDS, "cu_draft_lens": _CU,
    },
    "verify_prefix": {
        "logits": _LOGITS, "draft_ids": _IDS, "cu_draft_lens": _CU, "rule": Coupled(), "keys": _IDS,
    },
    "splice_kv": {"src": [torch.zeros(1, 1, 4, 8)], "dst": [torch.zeros(1, 1, 4, 8)], **_RANGES},
    "assemble": {
        "prompt_ids": _IDS, "cu_prompt_lens": _CU, "prefix_ids": _IDS, "cu_prefix_lens": _CU,
        "accepted_lens": _IDS,
    },
    "assemble, limits": {
        "prompt_ids": _IDS, "cu_prompt_lens": _CU, "prefix_ids": _IDS, "cu_prefix_lens": _CU,
        "accepted_lens": _IDS, "layout": "split", "max_prompt_len": 2, "max_response_len": 2,
    },
}  # fmt: skip
CASES = [
    (call, name)
    for call, arguments in CALLS.items()
    for name, value in arguments.items()
    if isinstance(value, torch.Tensor)
]


@pytest.mark.parametrize(("call", "name"), CASES)
def test_a_list_for_a_tensor_is_named(call, name) -> None:
    op = getattr(ops, call.partition(",")[0])
    op(**CALLS[call])
    with pytest.raises(ValueError, match=f"^{name}: expected a torch.Tensor, got list"):
        op(**{**CALLS[call], name: [0]})
