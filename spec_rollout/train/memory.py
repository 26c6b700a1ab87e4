"""What a training forward computes in, and what it keeps for the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

from spec_rollout.config.sections import ConfigError, TrainConfig
from spec_rollout.engines.transformers.row_check import random_rows
from spec_rollout.train.forward import response_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Far above what another order of sums makes of logits in 16 bits, far below what dropout does.
_MOST_DIFFERENCE = 0.05


class TrainingForward:
    """Context managers for forward passes of the trainer.

    Args:
        config: Its `compute_dtype` and `gradient_checkpointing`.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._dtype = None if config.compute_dtype is None else torch.bfloat16
        self._recompute = config.gradient_checkpointing

    @property
    def is_16_bit(self) -> bool:
        """Whether products are in 16 bits, whatever the weights are."""
        return self._dtype is not None

    @contextmanager
    def of(self, model: PreTrainedModel) -> Iterator[None]:
        """For a forward pass of a model; its backward pass may come later."""
        device = next(model.parameters()).device.type
        with torch.autocast(device, self._dtype, enabled=self._dtype is not None):
            if self._recompute and torch.is_grad_enabled():
                with _recomputing(model):
                    yield
            else:
                yield


def check_recomputing(model: PreTrainedModel, config: TrainConfig) -> None:
    """Refuses a model of which layers cannot be recomputed, or would not be the same again.

    Args:
        model: Hugging Face causal language model.
        config: What training computes in.

    Raises:
        ConfigError: naming the setting.
    """
    expected = "train.gradient_checkpointing: expected false for"
    if not _layers(model):
        raise ConfigError(
            f"{expected} {type(model).__name__}, of which transformers can recompute no layer, got "
            "true"
        )
    embeddings: Any = model.get_input_embeddings()
    device = embeddings.weight.device
    row = random_rows(embeddings.weight.shape[0], [16], device)[0][None]
    positions = torch.arange(16, device=device)
    # Without gradients nothing is recomputed but where this says so.
    with torch.no_grad(), TrainingForward(config).of(model):
        plain = response_logits(model, row, positions)
        with _recomputing(model):
            other = response_logits(model, row, positions)
    gap = float((plain - other).abs().max() / plain.abs().max().clamp(min=1e-6))
    if not gap <= _MOST_DIFFERENCE:
        raise ConfigError(
            f"{expected} {type(model).__name__}, whose layers draw dropout of their own with it "
            f"(logits differ by {gap:.0%}), got true"
        )


def _layers(model: PreTrainedModel) -> list[Any]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]


@contextmanager
def _recomputing(model: PreTrainedModel) -> Iterator[None]:
    """Layers keep their inputs only. They take themselves to be in training meanwhile, which is
    what transformers asks for; what is in them (dropout) stays in evaluation mode."""
    layers = _layers(model)
    for layer in layers:
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
        layer.gradient_checkpointing = layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = layer.training = False
