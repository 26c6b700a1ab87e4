"""New weights, written into the model's own tensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def copy_weights(model: torch.nn.Module, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copies tensors into the parameters and buffers of the same names.

    Names are those of `model.state_dict()`; not all need be given. A tensor that is the parameter
    itself (a trainer sharing the model) is not copied. Other dtypes and devices are converted.

    Raises:
        ValueError: naming the first tensor with an unknown or repeated name or another shape;
            nothing is written then.
    """
    targets = model.state_dict(keep_vars=True)
    updates: dict[str, torch.Tensor] = {}
    for name, tensor in named_tensors:
        target = targets.get(name)
        if not isinstance(target, torch.Tensor):
            raise ValueError(
                f"named_tensors: expected names of the model's state dict, got {name!r}"
            )
        if name in updates:
            raise ValueError(f"named_tensors: expected each name once, got {name!r} again")
        if tensor.shape != target.shape:
            raise ValueError(
                f"named_tensors: expected {name!r} of shape {list(target.shape)}, got "
                f"{list(tensor.shape)}"
            )
        updates[name] = tensor
    with torch.no_grad():
        for name, tensor in updates.items():
            target = targets[name]
            if not _is_same(tensor, target):
                target.copy_(tensor)


def _is_same(tensor: torch.Tensor, target: torch.Tensor) -> bool:
    return (
        tensor.data_ptr() == target.data_ptr()
        and tensor.dtype == target.dtype
        and tensor.stride() == target.stride()
        and tensor.device == target.device
    )
