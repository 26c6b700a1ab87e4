"""Defects of vLLM's CPU wheels.

- `dispatch_cpu_unquantized_gemm` frees the weights after packing them: they cannot be updated.
- `expand_batch_to_tokens` writes into a copy: vLLM's own rejection sampler then reads
  uninitialised memory.
- Experts are packed after the first load, and not after a reload.
- The CPU worker disables `torch.set_num_threads` in its process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch

from spec_rollout.engines.vllm.compat.versions import replace

_PACK = "_spec_rollout_pack"
_PENDING = "_spec_rollout_pack_pending"
_keep_weights = False
_packed: WeakSet[torch.nn.Module] = WeakSet()  # since `note_packing`


def keep_cpu_weights() -> None:
    """Models loaded from now on keep the unpacked weights, too (twice the memory, CPU only)."""
    global _keep_weights
    _keep_weights = True


def note_packing() -> None:
    """From now on it is noted which layers are packed."""
    _packed.clear()


def pack_again(model: torch.nn.Module) -> None:
    """Makes new packed copies of a model's weights; those of before do not see updates.

    Layers packed since `note_packing` are left out, and convolutions, whose only copy is packed.
    """
    for module in model.modules():
        pack = getattr(module, _PACK, None)
        if (
            pack is not None
            and module not in _packed
            and not hasattr(module, "_cpu_unpacked_conv_weight")
        ):
            pack()


def pack_before_next_forward(model: torch.nn.Module) -> None:
    """As `pack_again`, once all weights of an update are there, however many calls bring them."""
    if getattr(model, _PENDING, None) is not None:
        return
    note_packing()

    def pack(*_: Any) -> None:
        handle = getattr(model, _PENDING, None)
        if handle is not None:
            handle.remove()
            object.__setattr__(model, _PENDING, None)
            pack_again(model)

    object.__setattr__(model, _PENDING, model.register_forward_pre_hook(pack))


@contextmanager
def threads_kept() -> Iterator[None]:
    """An engine set up in the block leaves `torch.set_num_threads` as it is.

    vLLM's CPU worker replaces it for the rest of the process, for the sake of threads it has bound
    to cores. It binds none in the caller's process.
    """
    original = torch.set_num_threads
    try:
        yield
    finally:
        torch.set_num_threads = original


def fix() -> None:
    """Mends the first three defects in this process."""
    from vllm.model_executor.layers import utils
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method
    from vllm.v1.sample import rejection_sampler

    name = "dispatch_cpu_unquantized_gemm"
    replace(utils, name, _weights_kept)
    for module in ("linear", "vocab_parallel_embedding"):  # where it was imported by name
        loaded = sys.modules.get(f"vllm.model_executor.layers.{module}")
        if loaded is not None and hasattr(loaded, name):
            setattr(loaded, name, getattr(utils, name))
    replace(rejection_sampler, "expand_batch_to_tokens", _expanded)
    replace(unquantized_fused_moe_method.UnquantizedFusedMoEMethod, "_setup_kernel", _packed_again)


def _weights_kept(original: Callable) -> Callable:
    def dispatch_cpu_unquantized_gemm(layer: Any, remove_weight: bool) -> None:
        if not _keep_weights:
            original(layer, remove_weight)
            return
        original(layer, remove_weight=False)
        # Not a submodule, hence past nn.Module.__setattr__.
        object.__setattr__(layer, _PACK, lambda: original(layer, remove_weight=False))
        _packed.add(layer)

    return dispatch_cpu_unquantized_gemm


def _packed_again(original: Callable) -> Callable:
    def _setup_kernel(self: Any, layer: Any, *args: Any, **kwargs: Any) -> None:
        is_reload = self.moe_kernel is not None
        original(self, layer, *args, **kwargs)
        pack = getattr(self.moe_kernel.fused_experts, "process_weights_after_loading", None)
        if is_reload and pack is not None:
            pack(layer)

    return _setup_kernel


def _expanded(original: Callable) -> Callable:
    def expand_batch_to_tokens(
        x: torch.Tensor,
        cu_num_tokens: torch.Tensor,
        num_tokens: int,
        replace_from: int = 0,
        replace_to: int = 0,
    ) -> torch.Tensor:
        counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
        out = x.repeat_interleave(counts.long(), output_size=num_tokens)
        return torch.where(out == replace_from, replace_to, out).to(x.dtype)

    return expand_batch_to_tokens
