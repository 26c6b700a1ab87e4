"""trainer.pt of a checkpoint: optimizer, value head and random states, held to the model's shapes.

An optimizer takes whatever moments it is given; the fused one then reads past their end.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spec_rollout.train.state import CheckpointError

TENSORS = "trainer.pt"
# Of AdamW, for each parameter.
_MOMENTS = ("exp_avg", "exp_avg_sq")


def save_tensors(
    path: Path,
    optimizer: torch.optim.Optimizer,
    value_head: torch.nn.Module | None,
    rng: Mapping[str, Any],
) -> None:
    """Writes trainer.pt; `rng` is of `rng_state`."""
    tensors: dict[str, Any] = {"optimizer": optimizer.state_dict(), "rng": rng}
    if value_head is not None:
        tensors["value_head"] = value_head.state_dict()
    torch.save(tensors, path)


def restore_tensors(
    path: Path, optimizer: torch.optim.Optimizer, value_head: torch.nn.Module | None
) -> None:
    """Restores what `save_tensors` wrote.

    Settings of the optimizer (learning rate, betas) stay those it has.

    Raises:
        CheckpointError: if the file is damaged or of another model; nothing is changed then, but
            perhaps the value head and the random states.
    """
    device = optimizer.param_groups[0]["params"][0].device
    settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        _check_head("value_head" in content, value_head is not None)
        _check_moments(content["optimizer"], optimizer)
        if value_head is not None:
            value_head.load_state_dict(content["value_head"])
        set_rng_state(content["rng"])
        optimizer.load_state_dict(content["optimizer"])
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        if not isinstance(error, _OtherModel):
            reason = f"{type(error).__name__}: {reason}"
        raise CheckpointError(
            f"{path}: expected optimizer and random states of this model, cannot restore them: "
            f"{reason}"
        ) from error
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)


def moments_of(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """The optimizer's own tensors, one per parameter and moment, with their names."""
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                if key in _MOMENTS:
                    yield f"{key} of {name}", value


class _OtherModel(Exception):
    """What trainer.pt holds does not fit."""


def _check_head(saved: bool, wanted: bool) -> None:
    if saved != wanted:
        have, want = ("one" if given else "none" for given in (saved, wanted))
        raise _OtherModel(
            f"expected {want} of the value heads that train.algorithm needs, got {have}"
        )


def _check_moments(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Raises unless the state is of these parameters, by name, shape and dtype."""
    groups, state = saved["param_groups"], saved["state"]
    names = [group["param_names"] for group in optimizer.param_groups]
    found = [group["param_names"] for group in groups]
    if found != names:
        wanted = {name for group in names for name in group}
        got = {name for group in found for name in group}
        differ = sorted(wanted ^ got)
        some = ", ".join(differ[:3]) + (", ..." if len(differ) > 3 else "")
        raise _OtherModel(
            f"expected moments of {len(wanted)} parameters, got those of {len(got)}"
            + (f" (they differ in {some})" if some else " in another order")
        )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in groups for number in group["params"]]
    flat_names = [name for group in names for name in group]
    if state and sorted(state) != sorted(numbers):
        raise _OtherModel(
            f"expected moments of all {len(numbers)} parameters, got {len(state)} of them"
        )
    for name, number, parameter in zip(flat_names, numbers, parameters, strict=True):
        if state:
            _check_state(name, state[number], parameter)


def _check_state(name: str, state: Mapping[str, Any], parameter: torch.Tensor) -> None:
    if sorted(state) != sorted(("step", *_MOMENTS)):
        raise _OtherModel(f"expected step, {' and '.join(_MOMENTS)} of {name}, got {list(state)}")
    for key in _MOMENTS:
        value = state[key]
        expected = f"{parameter.dtype} of shape {list(parameter.shape)}"
        if not isinstance(value, torch.Tensor):
            raise _OtherModel(f"{key} of {name}: expected {expected}, got {type(value).__name__}")
        if value.shape != parameter.shape or value.dtype != parameter.dtype:
            raise _OtherModel(
                f"{key} of {name}: expected {expected}, got {value.dtype} of shape "
                f"{list(value.shape)}"
            )
    step = state["step"]
    if not (isinstance(step, torch.Tensor) and step.shape == () and step.dtype == torch.float32):
        raise _OtherModel(f"step of {name}: expected a number as a float32 tensor, got {step!r}")


def rng_state() -> dict[str, Any]:
    """Of the process's random generators now."""
    # Rewards may use NumPy's global generator.
    legacy: Any = np.random.get_state(legacy=True)  # noqa: NPY002
    name, keys, position, has_gauss, cached = legacy
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Of the process's random generators, as `rng_state` gave it."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    keys = keys.cpu().numpy().astype(np.uint32)
    np.random.set_state((name, keys, *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
