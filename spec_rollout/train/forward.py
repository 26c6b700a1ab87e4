"""The trainer's forward pass: logits of responses, with gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def response_logits(
    model: PreTrainedModel, input_ids: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Logits at some positions of right-padded rows; the output head runs on these alone.

    Causal attention never looks right, so right padding needs no mask, which keeps the fast
    attention kernels.

    Args:
        model: Hugging Face causal language model.
        input_ids: Padded with any token id. [batch, length], int64.
        positions: Flat positions row * length + column. [num_positions], int64.

    Returns:
        [num_positions, vocab], the model's dtype.
    """
    head = model.get_output_embeddings()

    def select(_module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # On the head's input rather than after the base model: scaling or capping of logits stays
        # in force.
        hidden = args[0]
        return (hidden.reshape(1, -1, hidden.shape[-1]).index_select(1, positions), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        logits = model(input_ids=input_ids, use_cache=False).logits
    finally:
        handle.remove()
    if logits.shape[:2] != (1, positions.numel()):
        raise RuntimeError(
            f"model: expected logits of shape [1, {positions.numel()}, vocab] from "
            f"{type(model).__name__}, "
            f"got {list(logits.shape)}"
        )
    return logits[0]
