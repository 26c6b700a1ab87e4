"""What the launchers of the Triton kernels share."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import triton

from spec_rollout._native import device_guard
from spec_rollout.ops._status import status_word


@dataclass(frozen=True, slots=True)
class LaunchShape:
    """Compile-time sizes of a kernel over logits.

    Attributes:
        block: Logits that a program holds at a time.
        vec: Logits in 16 bytes.
        num_warps: Warps per program.
    """

    block: int
    vec: int
    num_warps: int


def launch_shape(logits: torch.Tensor, elements_per_thread: int) -> LaunchShape:
    """Sizes for rows of `logits` [rows, vocab]: blocks no larger than a row needs.

    `elements_per_thread` is a power of two, at least 8: with 16-byte loads it says how many of them
    are in flight.
    """
    vec = 16 // logits.element_size()
    num_warps = 4 if logits.shape[1] <= 8192 else 8
    largest = 32 * num_warps * elements_per_thread
    block = min(largest, max(triton.next_power_of_2(logits.shape[1]), 32 * vec))
    return LaunchShape(block, vec, num_warps)


def float32(value: float) -> float:
    """Rounded to float32: the interpreter would keep a Python float's 53 bits."""
    return float(np.float32(value))


def inverse(temperature: float) -> float:
    """float32(1 / temperature) as the kernels compute it per row; 1 for greedy."""
    return float(np.float32(1.0) / np.float32(temperature)) if temperature > 0 else 1.0


@contextlib.contextmanager
def on_device(tensor: torch.Tensor, kernel: object) -> Iterator[None]:
    """Makes the tensor's GPU current; on CPU, makes sure that the kernel is interpreted.

    Raises:
        RuntimeError: for CPU tensors without Triton's interpreter.
    """
    if not tensor.is_cuda and isinstance(kernel, triton.JITFunction):
        raise RuntimeError(
            "impl: triton was compiled for a GPU, got tensors on the CPU; there Triton's kernels "
            "run only in its "
            "interpreter (TRITON_INTERPRET=1 in the environment before triton is imported)"
        )
    if tensor.is_cuda:
        with device_guard(tensor):
            yield
        return
    # Where logits are NaN, the interpreter's numpy warns about what the status word is about to
    # report.
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def status_word_of(tensor: torch.Tensor) -> torch.Tensor:
    """The device's status word; interpreted kernels report through one, too."""
    word = status_word(tensor, on_cpu=True)
    assert word is not None
    return word
