"""verl on a machine without an accelerator: VERL_USE_EXTERNAL_MODULES=verl_cpu, VERL_PLATFORM=cpu.

verl wants a platform for its devices. This one calls the processor a device of Ray's resource
"GPU" (`ray.init(num_gpus=1)` makes one up) and has no memory to hand to other processes.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

_BYTES = 8 << 30


def _device_module() -> types.ModuleType:
    """What torch.cuda is for CUDA."""
    module = types.ModuleType("verl_cpu_device")
    for name in dir(torch.cpu):
        if not name.startswith("__"):
            setattr(module, name, getattr(torch.cpu, name))
    nothing = ("empty_cache", "reset_peak_memory_stats", "ipc_collect", "manual_seed", "set_device")
    for name in (*nothing, "manual_seed_all"):
        setattr(module, name, lambda *args, **kwargs: None)
    for name in ("memory_allocated", "memory_reserved"):
        setattr(module, name, lambda *args, **kwargs: 0)
        setattr(module, f"max_{name}", lambda *args, **kwargs: 0)
    values = {
        "mem_get_info": lambda *args: (_BYTES, _BYTES),
        "device_count": lambda: 1,
        "current_device": lambda: "cpu",
        "get_device_name": lambda *args: "cpu",
        "get_rng_state": torch.get_rng_state,
        "set_rng_state": torch.set_rng_state,
        "is_available": lambda: True,
        "get_device_properties": lambda *args: types.SimpleNamespace(
            name="cpu", total_memory=_BYTES
        ),
    }
    for name, value in values.items():
        setattr(module, name, value)
    return module


_DEVICE = _device_module()


@PlatformRegistry.register(platform="cpu")
class CPUPlatform(PlatformBase):
    """See the module."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _DEVICE

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return True

    def current_device(self) -> str:
        return "cpu"

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        pass

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextlib.contextmanager
    def nvtx_range(self, message: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        pass

    def profiler_stop(self) -> None:
        pass

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None


_init_process_group = torch.distributed.init_process_group


def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
    """torch's, which takes no backend named twice: verl joins the CPU's and the device's."""
    if backend == "cpu:gloo,cpu:gloo":
        backend = "gloo"
    return _init_process_group(backend, *args, **kwargs)


torch.distributed.init_process_group = init_process_group

if "vllm.v1.worker.worker_base" in sys.modules:
    # A worker of vLLM's CPU build frees weights after packing them, and could take no new ones.
    # Engines with our proposer keep theirs; stock ones, of the runs to compare with, do it here.
    from vllm.model_executor.layers import utils

    _dispatch = utils.dispatch_cpu_unquantized_gemm

    def dispatch_cpu_unquantized_gemm(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = dispatch_cpu_unquantized_gemm
    for _name in ("linear", "vocab_parallel_embedding"):  # where it was imported by name
        _module = sys.modules.get(f"vllm.model_executor.layers.{_name}")
        if _module is not None and hasattr(_module, "dispatch_cpu_unquantized_gemm"):
            _module.dispatch_cpu_unquantized_gemm = dispatch_cpu_unquantized_gemm
