"""What a run is made of, held against each other before anything is written."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

import torch

from spec_rollout.config.sections import ConfigError, RunConfig, TrainConfig
from spec_rollout.loading.policy import Policy
from spec_rollout.train.algorithms.base import Algorithm
from spec_rollout.train.finite import nonfinite
from spec_rollout.train.forward import check_padded_rows
from spec_rollout.train.memory import TrainingForward
from spec_rollout.train.state import CheckpointError, TrainState


def check_group_size(config: RunConfig, algorithm: Algorithm) -> None:
    """Raises ConfigError if the algorithm would learn nothing from so few responses."""
    least = algorithm.needs.group_size
    if config.rollout.num_samples < least:
        raise ConfigError(
            f"rollout.num_samples: expected at least {least} with train.algorithm = "
            f"{config.train.algorithm!r} (it compares the responses of a prompt with each other; "
            f"fewer have no advantage), got {config.rollout.num_samples}"
        )


def check_attention(config: RunConfig) -> None:
    """Raises ConfigError if the attention cannot compute in the type that training does."""
    attention, train = config.model.attention, config.train
    in_float32 = config.model.dtype == "float32" and train.compute_dtype is None
    if attention.startswith("flash_attention") and in_float32:
        raise ConfigError(
            "model.attention: expected another one with model.dtype = 'float32' and without "
            "train.compute_dtype = 'bfloat16' (flash attention computes in 16 bits only), got "
            f'"{attention}"'
        )


def order_settings(config: RunConfig) -> dict[str, int | bool]:
    """What says which rows a step sees, beside the data."""
    return {
        "train.seed": config.train.seed,
        "train.prompts_per_step": config.train.prompts_per_step,
        "data.shuffle": config.data.shuffle,
    }


def check_order(settings: Mapping[str, int | bool], state: TrainState) -> None:
    """Raises CheckpointError if the steps so far saw their rows in another order."""
    for key, value in settings.items():
        before = state.order.get(key)
        if value != before:
            raise CheckpointError(
                f"{key}: expected {before!r}, as in the run so far (in another order it would skip "
                f"some rows of an epoch and repeat others), got {value!r}"
            )


def check_base(base: str, state: TrainState, config: RunConfig) -> tuple[str, ...]:
    """Raises CheckpointError if the adapter was trained beside other weights than those loaded.

    Args:
        base: `adapter.fingerprint` of the weights.
        state: Of the checkpoint with the adapter.

    Returns:
        Notes for the user.
    """
    path = config.model.path
    if not state.base_fingerprint:
        return (
            "model.path: the checkpoint does not say which weights its adapter was trained beside; "
            f"those of {path!r} are taken",
        )
    if state.base_fingerprint != base:
        raise CheckpointError(
            "model.path: expected the weights that the checkpoint's adapter was trained beside, in "
            f"the same model.dtype (fingerprint {state.base_fingerprint}), got others in {path!r} "
            f"({base})"
        )
    return ()


def check_reference_weights(
    weights: str, state: TrainState, path: str, key: str
) -> tuple[str, ...]:
    """Raises CheckpointError if the run's KL was to other weights so far than those loaded.

    Args:
        weights: `adapter.fingerprint` of the reference.
        state: Of the checkpoint.
        path, key: Where the reference was loaded from, and the key that says so.

    Returns:
        Notes for the user.
    """
    if not state.reference_fingerprint:
        return (
            f"{key}: the checkpoint does not say which weights are the reference of the KL; those "
            f"of {path!r} are taken",
        )
    if state.reference_fingerprint != weights:
        raise CheckpointError(
            f"{key}: expected the weights that are the reference of the run's KL, in the same "
            f"model.dtype (fingerprint {state.reference_fingerprint}), got others in {path!r} "
            f"({weights})"
        )
    return ()


def check_finite(model: torch.nn.Module, path: str, key: str) -> None:
    """Raises ConfigError if a model was stored with weights that are no numbers."""
    problem = nonfinite(model.named_parameters())
    if problem is not None:
        raise ConfigError(f"{key}: expected finite weights, got {problem} of {path!r}")


def check_saving(model: Any, path: str) -> None:
    """Raises ConfigError if transformers would refuse to write the model's generation config, and
    so every checkpoint."""
    if not model.can_generate():
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.generation_config.save_pretrained(folder)
        except ValueError as error:
            raise ConfigError(
                "model.path: expected a generation_config.json that transformers writes again (no "
                f"checkpoint could be written), got one in {path!r} that it refuses: "
                f"{' '.join(str(error).split())}"
            ) from error


def check_forward(policy: Policy, config: TrainConfig) -> None:
    """Raises ConfigError if rows that are padded to each other depend on each other, computed as
    training does."""
    forward_mode = TrainingForward(config)
    try:
        with torch.no_grad(), forward_mode.of(policy.model):
            check_padded_rows(policy.model, policy.max_length, is_16_bit=forward_mode.is_16_bit)
    except ValueError as error:
        raise ConfigError(f"model.path: {str(error).removeprefix('model: ')}") from error


def check_reference(reference: Any, policy: Policy, key: str) -> None:
    """Raises ConfigError if the KL would compare probabilities of different tokens."""
    size = reference.get_output_embeddings().weight.shape[0]
    if size != policy.vocab_size:
        raise ConfigError(
            f"{key}: expected a reference with the policy's vocabulary of {policy.vocab_size} "
            f"tokens, got one of {size}"
        )
