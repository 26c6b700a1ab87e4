"""Arrays on their way to the device, and back."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from spec_rollout import ops


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Without waiting for the copy; on the CPU without one."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def copying(tensor: torch.Tensor) -> Callable[[], np.ndarray]:
    """Begins the copy to the host; what is returned waits for it."""
    if not tensor.is_cuda:
        return tensor.numpy
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def copied() -> np.ndarray:
        done.synchronize()
        return host.numpy()

    return copied


def arriving(logits: torch.Tensor, *results: torch.Tensor) -> Callable[[], list[np.ndarray]]:
    """Begins to copy what ops gave to the host, in one copy with what kernels have reported.

    Args:
        logits: That the ops were given.
        results: With one axis, int32 or float32, on the logits' device; may be none.

    Returns:
        Waits for the copy, and gives the results as arrays. It raises ValueError if a kernel has
        met bad values (`ops.check_status`); on the CPU the ops have raised by themselves.
    """
    word = ops.status_word(logits)
    if word is None:
        return lambda: [result.numpy() for result in results]
    device = word.device
    kinds = [np.float32 if result.is_floating_point() else np.int32 for result in results]
    ends = np.cumsum([result.numel() for result in results], dtype=np.int64)
    copied = copying(torch.cat([*(result.view(torch.int32) for result in results), word]))

    def arrived() -> list[np.ndarray]:
        host = copied()
        if host[-1]:
            ops.check_status(device)
        parts = np.split(host, ends)[:-1]
        return [part.view(kind) for part, kind in zip(parts, kinds, strict=True)]

    return arrived
