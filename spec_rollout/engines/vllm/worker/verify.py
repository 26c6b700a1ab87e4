"""The call of `verify_prefix` that a step makes; its arguments and results live on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from spec_rollout import ops
from spec_rollout.acceptance import AcceptanceRule
from spec_rollout.engines.vllm.worker.groups import Group
from spec_rollout.engines.vllm.worker.transfer import arriving, to_device


def verify_group(
    rule: AcceptanceRule,
    group: Group,
    logits: torch.Tensor,
    sampling: tuple[Any, Any, Any],
    draft_ids: np.ndarray,
    draft_logprobs: np.ndarray | None,
) -> Callable[[], list[np.ndarray]]:
    """`verify_prefix` on the rows of a group.

    Returns:
        Waits for it, and gives its three outputs (`transfer.arriving`).
    """
    device = logits.device
    packed = to_device(group.numbers(), device)
    n = group.requests.size
    result = ops.verify_prefix(
        logits,
        to_device(draft_ids, device),
        packed[0],
        rule=rule,
        keys=packed[2, :n],
        positions=packed[3, :n],
        draft_logprobs=None if draft_logprobs is None else to_device(draft_logprobs, device),
        cu_logits_lens=packed[1],
        temperature=sampling[0],
        top_k=sampling[1],
        top_p=sampling[2],
    )
    return arriving(logits, *result)
