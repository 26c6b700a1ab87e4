"""What crosses between host and device in a step with proposals from history."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from spec_rollout.engines.vllm.worker.verify import to_device


@dataclass(frozen=True, slots=True)
class StepState:
    """What a step gave, and to whom.

    Attributes:
        slots, device_slots: Of each request. [num_reqs], int64 (numpy), and int32 on the device.
        num_scheduled: Draft tokens that were computed for each. [num_reqs], int64 (numpy).
        num_tokens, num_logits: Tokens that the model computed, and rows of logits.
        num_sampled: Tokens that each was given. [num_reqs], int32.
        total_lens, prompt_lens: Tokens of prompt and response, and of the prompt. [num_slots],
            int32.
        token_ids: All of them. [num_slots, max_model_len], int32.
    """

    slots: np.ndarray
    device_slots: torch.Tensor
    num_scheduled: np.ndarray
    num_tokens: int
    num_logits: int
    num_sampled: torch.Tensor
    total_lens: torch.Tensor
    prompt_lens: torch.Tensor
    token_ids: torch.Tensor


def given_tokens(
    step: StepState, counts: torch.Tensor, logprobs: torch.Tensor
) -> tuple[np.ndarray, ...]:
    """What a step gave, on the host, which waits for it: one transfer.

    Args:
        step: The step.
        counts: Tokens of drafts that are proposed next. [num_slots], int32.
        logprobs: Of the tokens given. [num_slots, at least most], float32.

    Returns:
        Tokens that each request was given; tokens of its response; tokens of its draft that are
        proposed next [num_reqs], int64; the tokens given [num_reqs, most], int32; their
        log-probs [num_reqs, most], float32.
    """
    width = int(step.num_scheduled.max(initial=0)) + 1
    slots = step.device_slots.long()
    totals, num = step.total_lens[slots], step.num_sampled
    columns = (totals - num)[:, None] + torch.arange(width, device=slots.device)
    columns = columns.clamp(0, step.token_ids.shape[1] - 1).long()
    numbers = [num, totals - step.prompt_lens[slots], counts[slots]]
    packed = torch.cat(
        [
            torch.stack(numbers, dim=1).to(torch.int32),
            step.token_ids[slots[:, None], columns],
            logprobs[slots, :width].view(torch.int32),
        ],
        dim=1,
    )
    host = packed.cpu().numpy()
    given, indices, own = host[:, :3].astype(np.int64).T
    values = np.ascontiguousarray(host[:, 3 + width :]).view(np.float32)
    return given, indices, own, host[:, 3 : 3 + width], values


def filled(
    step: StepState,
    drafts: list[list[int]],
    proposed: torch.Tensor,
    counts: torch.Tensor,
) -> torch.Tensor:
    """`proposed` with `drafts` where there are any, whose numbers go into `counts`."""
    if not any(drafts):
        return proposed
    width = proposed.shape[1]
    host = np.zeros((len(drafts), width + 1), np.int32)
    for row, draft in zip(host, drafts, strict=True):
        row[0] = len(draft)
        row[1 : 1 + len(draft)] = draft
    packed = to_device(host, proposed.device)
    lens, ids = packed[:, :1], packed[:, 1:].long()
    slots = step.device_slots.long()
    counts[slots] = torch.where(lens[:, 0] > 0, lens[:, 0], counts[slots])
    columns = torch.arange(width, device=proposed.device)
    return torch.where(columns < lens, ids, proposed)
