"""What crosses between host and device in a step with proposals from history."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from spec_rollout.engines.vllm.worker.transfer import to_device


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


class GivenTokens(NamedTuple):
    """What a step gave, on the host.

    Attributes:
        given: Tokens that each request was given. [num_reqs], int64.
        indices: Tokens of its response so far. [num_reqs], int64.
        own: Tokens of its draft that are proposed next. [num_reqs], int64.
        tokens: Those given. [num_reqs, most], int32.
        logprobs: Of these. [num_reqs, most], float32.
    """

    given: np.ndarray
    indices: np.ndarray
    own: np.ndarray
    tokens: np.ndarray
    logprobs: np.ndarray

    @classmethod
    def unpacked(cls, packed: np.ndarray) -> GivenTokens:
        """From what `packed_tokens` packed."""
        width = (packed.shape[1] - 3) // 2
        given, indices, own = packed[:, :3].astype(np.int64).T
        values = np.ascontiguousarray(packed[:, 3 + width :]).view(np.float32)
        return cls(given, indices, own, packed[:, 3 : 3 + width], values)


def packed_tokens(step: StepState, counts: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    """What a step gave, in one piece (`GivenTokens.unpacked`), still on the device.

    Args:
        step: The step.
        counts: Tokens of drafts that are proposed next. [num_slots], int32.
        logprobs: Of the tokens given. [num_slots, at least most], float32.

    Returns:
        [num_reqs, 3 + 2 * most], int32.
    """
    width = int(step.num_scheduled.max(initial=0)) + 1
    slots = step.device_slots.long()
    totals, num = step.total_lens[slots], step.num_sampled
    columns = (totals - num)[:, None] + torch.arange(width, device=slots.device)
    columns = columns.clamp(0, step.token_ids.shape[1] - 1).long()
    numbers = [num, totals - step.prompt_lens[slots], counts[slots]]
    return torch.cat(
        [
            torch.stack(numbers, dim=1).to(torch.int32),
            step.token_ids[slots[:, None], columns],
            logprobs[slots, :width].view(torch.int32),
        ],
        dim=1,
    )


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


def continued(
    step: StepState, guesses: np.ndarray, proposed: torch.Tensor, counts: torch.Tensor, most: int
) -> torch.Tensor:
    """`proposed` with what guesses say of the next tokens, whose numbers go into `counts`.

    A guess begins before this step's tokens, which the host did not know: it counts where it is
    right about them. Requests that follow a draft of their own are left alone.

    Args:
        step: The step.
        guesses: For each request: the response token that its guess begins with, the guess's
            length, and its tokens, any behind them. [num_reqs, 2 + longest], int32.
        proposed: [num_reqs, width], int64.
        counts: By slot; changed in place. [num_slots], int32.
        most: Most tokens for a request.

    Returns:
        As `proposed`.
    """
    packed = to_device(guesses, proposed.device)
    first, lens, ids = packed[:, 0].long(), packed[:, 1].long(), packed[:, 2:].long()
    slots = step.device_slots.long()
    prompts = step.prompt_lens[slots].long()
    # Tokens that requests were given since.
    since = step.total_lens[slots].long() - prompts - first
    ahead = torch.arange(ids.shape[1], device=proposed.device)
    columns = ((prompts + first)[:, None] + ahead).clamp(max=step.token_ids.shape[1] - 1)
    given = step.token_ids[slots[:, None], columns].long()
    is_right = ((given == ids) | (ahead >= since[:, None])).all(dim=1) & (since >= 0)
    is_free = (counts[slots] == 0) & (step.num_sampled > 0)
    left = torch.where(is_right & is_free, lens - since, 0)
    left = left.clamp(0, min(most, proposed.shape[1]))
    counts[slots] = torch.where(left > 0, left.to(counts.dtype), counts[slots])
    places = torch.arange(proposed.shape[1], device=proposed.device)
    sources = (since.clamp(min=0)[:, None] + places).clamp(max=ids.shape[1] - 1)
    return torch.where(places < left[:, None], ids.gather(1, sources), proposed)
