"""What every op needs on its way into the compiled core: the extension, the device guard, the
threads."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch

from spec_rollout.extras import checkout_advice

try:
    import spec_rollout._C as _C
except ImportError as error:  # pragma: no cover - exercised by the doctor's tests in a subprocess
    raise ImportError(
        "spec_rollout's compiled extension cannot be imported "
        f"({error}); {checkout_advice() or 'install the package with `pip install .`'} "
        "(`spec-rollout doctor` says what is missing)"
    ) from error

_NULL_CONTEXT: AbstractContextManager[None] = contextlib.nullcontext()


def device_guard(tensor: torch.Tensor) -> AbstractContextManager[None]:
    """Makes the tensor's GPU the current one for a launch; nothing on CPU, or where it is the
    current one."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _NULL_CONTEXT
    return torch.cuda.device(tensor.device)


def num_threads() -> int:
    """CPU threads an op may use: torch's setting, so that one knob governs both."""
    return torch.get_num_threads()


def build_info() -> dict[str, object]:
    """What the extension was built with: version, compiler, instruction-set levels, CUDA version
    and architectures."""
    return _C.build_info()


__all__ = ["_C", "build_info", "device_guard", "num_threads"]
