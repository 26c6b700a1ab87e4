"""vLLM's Model Runner V2 on a CPU: vLLM's wheel for CPUs has it, and wants a Triton that compiles for
CPUs. Triton's interpreter does instead, which needs no compiler and takes milliseconds for a kernel.

`prepare` before vLLM is imported, `patch` after. What this cannot show: CUDA graphs, two streams at
a time, memory shared with a device, tensor parallelism, and time.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable
from typing import Any

ENVIRONMENT = {
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # what is patched is patched in this process
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_CI_ENV": "1",  # no warm-up
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_COMPILE_DISABLE": "1",
}


def why_not() -> str | None:
    """Why V2 cannot be run in this process; None if it can."""
    if "vllm" in sys.modules:
        return "vLLM was imported before, for Model Runner V1: run this folder by itself"
    return None


def prepare() -> None:
    """Sets the environment, and shows vLLM a Triton for CPUs."""
    os.environ.update(ENVIRONMENT)
    from triton.backends import backends
    from triton.runtime.interpreter import InterpreterBuilder

    class Driver:
        @staticmethod
        def is_active() -> bool:
            return True

    # vLLM asks for a back end that is active; the interpreter uses none.
    backends.setdefault("cpu", types.SimpleNamespace(driver=Driver, compiler=None))
    # A mask made of a scalar and a block comes as integers, and numpy takes booleans only.
    for name, position in (("create_masked_load", 1), ("create_masked_store", 2)):
        setattr(
            InterpreterBuilder, name, _with_boolean(getattr(InterpreterBuilder, name), position)
        )


def _with_boolean(original: Callable, position: int) -> Callable:
    from triton.runtime.interpreter import TensorHandle

    def access(self: Any, *args: Any) -> Any:
        mask = args[position]
        if mask.data.dtype != bool:
            mask = TensorHandle(mask.data.astype(bool), mask.dtype)
        return original(self, *args[:position], mask, *args[position + 1 :])

    return access


def patch() -> None:
    """What of vLLM the interpreter cannot run, or the platform of CPUs switches off."""
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.sample.ops import topk_topp_sampler

    # The fused filters ask a loop's index for a method; torch's own take their place.
    topk_topp_sampler.HAS_TRITON = False
    original = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        scheduling = vllm_config.scheduler_config
        is_async = scheduling.async_scheduling
        original(cls, vllm_config)
        scheduling.async_scheduling = bool(is_async)  # as asked for; by default vLLM decides: off

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
