"""The trainer's forward pass: logits of responses, with gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from spec_rollout.engines.transformers.lengths import windows
from spec_rollout.engines.transformers.row_check import (
    RowGap,
    compare,
    plain_logits,
    random_rows,
    row_lens,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def response_logits(
    model: PreTrainedModel, input_ids: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """`response_outputs` without the hidden states."""
    return response_outputs(model, input_ids, positions)[0]


def response_outputs(
    model: PreTrainedModel, input_ids: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits at some positions of right-padded rows; the output head runs on these alone.

    Causal attention never looks right, so right padding needs no mask, which keeps the fast
    attention kernels.

    Args:
        model: Hugging Face causal language model.
        input_ids: Padded with any token id. [batch, length], int64.
        positions: Flat positions row * length + column. [num_positions], int64.

    Returns:
        Logits [num_positions, vocab], and the hidden states that the output head was given
        [num_positions, hidden_size]; the model's dtype.
    """
    chosen: list[torch.Tensor] = []
    head = model.get_output_embeddings()

    def select(_module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # On the head's input rather than after the base model: scaling or capping of logits stays
        # in force.
        hidden = args[0]
        chosen.append(hidden.reshape(1, -1, hidden.shape[-1]).index_select(1, positions))
        return (chosen[0], *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        logits = model(input_ids=input_ids, use_cache=False).logits
    finally:
        handle.remove()
    if logits.shape[:2] != (1, positions.numel()):
        raise RuntimeError(
            f"model: expected logits of shape [1, {positions.numel()}, vocab] from "
            f"{type(model).__name__}, got {list(logits.shape)}"
        )
    return logits[0], chosen[0][0]


def padded_gap(model: PreTrainedModel, longest: int | None, *, is_16_bit: bool = False) -> RowGap:
    """How far `response_logits` of padded rows are from a plain forward of each row alone.

    Args:
        model: Hugging Face causal language model.
        longest: Most tokens of a row; None is no limit.
        is_16_bit: Products are in such a type, whatever the weights are (autocast).
    """
    embeddings: Any = model.get_input_embeddings()
    device = embeddings.weight.device
    lens = row_lens(windows(model.config.get_text_config(decoder=True)), longest)
    rows = random_rows(embeddings.weight.shape[0], lens, device)
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    starts = [row * padded.shape[1] for row in range(len(rows))]
    positions = torch.cat(
        [torch.arange(start, start + n) for start, n in zip(starts, lens, strict=True)]
    )
    with torch.no_grad():
        logits = response_logits(model, padded, positions.to(device))
    alone = [plain_logits(model, row) for row in rows]
    return compare(logits.split(lens), alone, rows, is_16_bit=is_16_bit)


def check_padded_rows(
    model: PreTrainedModel, longest: int | None, *, is_16_bit: bool = False
) -> None:
    """Refuses a model whose rows depend on what they are padded to.

    Arguments as in `padded_gap`.

    Raises:
        ValueError: saying by how much.
    """
    gap = padded_gap(model, longest, is_16_bit=is_16_bit)
    if not gap.is_rounding:
        raise ValueError(
            "model: expected a forward in which no row depends on the others, "
            f"{type(model).__name__} gives {gap} when rows are padded for training"
        )
