"""New weights, written into the model's own tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from spec_rollout.engines.weight_names import is_adapter, merged_name, plain_name


def copy_weights(model: torch.nn.Module, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copies tensors into the parameters and buffers of the same names.

    Names are those of `model.state_dict()`, or of the same model wrapped (torch.compile,
    DataParallel, peft); not all need be given. A tensor that is the parameter itself (a trainer
    sharing the model) is not copied. Other dtypes and devices are converted. A model with peft's
    layers takes the names of its adapter; one without takes peft's names of merged weights.

    Raises:
        ValueError: naming the first tensor with an unknown or repeated name or another shape, or
            an adapter's where there is none (or none's where there is one); nothing is written
            then.
    """
    targets = model.state_dict(keep_vars=True)
    updates: dict[str, torch.Tensor] = {}
    for given, tensor in named_tensors:
        name = _target_name(given, targets)
        target = targets[name]
        if name in updates:
            raise ValueError(f"named_tensors: expected each name once, got {given!r} again")
        if tensor.shape != target.shape:
            raise ValueError(
                f"named_tensors: expected {given!r} of shape {list(target.shape)}, got "
                f"{list(tensor.shape)}"
            )
        updates[name] = tensor
    with torch.no_grad():
        for name, tensor in updates.items():
            target = targets[name]
            if not _is_same(tensor, target):
                target.copy_(tensor)


def _target_name(given: str, targets: Mapping[str, Any]) -> str:
    """The model's own name of a weight."""
    name = plain_name(given)
    for candidate in (given, name, merged_name(name)):
        if isinstance(targets.get(candidate), torch.Tensor):
            return candidate
    if is_adapter(name):
        raise ValueError(
            "named_tensors: expected merged weights, as the engine's model has no such adapter, "
            f"got {given!r} (with peft: merge_adapter(), then all names without lora_)"
        )
    stem, _, leaf = name.rpartition(".")
    if isinstance(targets.get(f"{stem}.base_layer.{leaf}"), torch.Tensor):
        raise ValueError(
            "named_tensors: expected the names of a model with an adapter, as the engine's has "
            f"one (the base weight is {stem}.base_layer.{leaf!s}), got {given!r}"
        )
    raise ValueError(f"named_tensors: expected names of the model's state dict, got {given!r}")


def _is_same(tensor: torch.Tensor, target: torch.Tensor) -> bool:
    return (
        tensor.data_ptr() == target.data_ptr()
        and tensor.dtype == target.dtype
        and tensor.stride() == target.stride()
        and tensor.device == target.device
    )
