"""What lies between a decoder layer's matrix products, in one kernel call each.

RMS norm, gated SiLU and rotary embedding are eight, two and ten operations of torch, and on a CPU
they take a third of the time of a verification forward. Here each is one pass over its input
(csrc/cpu/forward/layer_parts.cpp). Which parts of a model are these three is told by what they
compute, not by their names alone: a candidate is tried on random input first, and one that gives
anything else is left alone.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from spec_rollout._native import _C, num_threads
from spec_rollout.engines.transformers.row_counts import has_plain_weights

# In every modeling file of transformers that has rotary embeddings.
_ROTARY = "apply_rotary_pos_emb"
# Relative; in bfloat16 one rounding may fall to the other side.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}

Forward = Callable[..., Any]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension. [..., dim], float32 or bfloat16
    on CPU, `weight` of the same dtype."""
    out = torch.empty(x.shape, dtype=x.dtype)
    dim = x.shape[-1]
    rows = x.contiguous().view(-1, dim)
    _C.rms_norm(rows, weight, eps, out.view(-1, dim), num_threads())
    return out


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up. [..., dim], both float32 or both bfloat16 on CPU."""
    out = torch.empty(gate.shape, dtype=gate.dtype)
    flat = [tensor.contiguous().view(1, -1) for tensor in (gate, up)]
    _C.silu_mul(*flat, out.view(1, -1), num_threads())
    return out


def rotate_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of queries or keys, the same bits as transformers' own.

    Args:
        x: [rows, heads, tokens, head_dim], float32 or bfloat16 on CPU.
        cos, sin: [rows, tokens, head_dim], the same dtype.

    Returns:
        [rows, heads, tokens, head_dim]; underneath, a token's heads lie together.
    """
    rows, heads, tokens, head_dim = x.shape
    out = torch.empty(rows, tokens, heads, head_dim, dtype=x.dtype)
    x = x if x.stride(-1) == 1 else x.contiguous()
    _C.rotate_halves(x, cos.contiguous(), sin.contiguous(), out, num_threads())
    return out.transpose(1, 2)


class LayerParts:
    """The parts of one model that `installed` replaces.

    Args:
        model: On CPU, float32 or bfloat16.

    Attributes:
        num_modules: Norms and MLPs replaced.
        num_rotary: Modeling files whose rotary embedding is replaced.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._forwards: list[tuple[torch.nn.Module, Forward]] = []
        files: dict[str, ModuleType] = {}
        for module in model.modules():
            make = _make_norm if _is_norm(module) else _make_mlp if _is_gated_mlp(module) else None
            if make is not None and _is_untouched(module) and _agrees(module, make):
                self._forwards.append((module, make(module)))
            file = sys.modules.get(type(module).__module__)
            if file is not None and callable(getattr(file, _ROTARY, None)):
                files[file.__name__] = file
        self._rotary = [
            (file, _make_rotary(original))
            for file in files.values()
            if _rotates_halves(original := getattr(file, _ROTARY))
        ]

    @property
    def num_modules(self) -> int:
        return len(self._forwards)

    @property
    def num_rotary(self) -> int:
        return len(self._rotary)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Inference goes through the kernels; all is as it was afterwards."""
        originals = [(file, getattr(file, _ROTARY)) for file, _ in self._rotary]
        forwards = [pair for pair in self._forwards if _is_untouched(pair[0])]
        try:
            for module, forward in forwards:
                vars(module)["forward"] = forward
            for file, rotary in self._rotary:
                setattr(file, _ROTARY, rotary)
            yield
        finally:
            for module, _ in forwards:
                del vars(module)["forward"]
            for file, original in originals:
                setattr(file, _ROTARY, original)


def _is_untouched(module: torch.nn.Module) -> bool:
    """Whether nobody else has replaced its forward."""
    return "forward" not in vars(module)


def _is_norm(module: Any) -> bool:
    names = [name for name, _ in module.named_parameters()]
    return (
        type(module).__name__.endswith("RMSNorm")
        and names == ["weight"]
        and module.weight.dim() == 1
        and isinstance(getattr(module, "variance_epsilon", None), float)
    )


def _make_norm(module: Any) -> Forward:
    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.dtype != module.weight.dtype:  # as with norms kept in float32
            return type(module).forward(module, hidden_states)
        return rms_norm(hidden_states, module.weight, module.variance_epsilon)

    return forward


def _is_gated_mlp(module: Any) -> bool:
    children = dict(module.named_children())
    linears = ("gate_proj", "up_proj", "down_proj")
    return (
        set(children) - {"act_fn"} == set(linears)
        and all(isinstance(children[name], torch.nn.Linear) for name in linears)
        and all(has_plain_weights(children[name]) for name in linears)
        and module.gate_proj.out_features == module.up_proj.out_features
    )


def _make_mlp(module: Any) -> Forward:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return module.down_proj(silu_mul(module.gate_proj(x), module.up_proj(x)))

    return forward


def _agrees(module: torch.nn.Module, make: Callable[[torch.nn.Module], Forward]) -> bool:
    """Whether the replacement computes what the module does, with random weights too."""
    generator = torch.Generator().manual_seed(0)
    probe: Any = copy.deepcopy(module).eval()
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.normal_(generator=generator)
        size = probe.gate_proj.in_features if _is_gated_mlp(probe) else probe.weight.numel()
        x = torch.randn(3, 1, size, generator=generator, dtype=torch.float32)
        x = x.to(next(probe.parameters()).dtype)
        expected, actual = probe(x), make(probe)(x)
    return _close(actual, expected)


def _make_rotary(original: Forward) -> Forward:
    def rotary(
        q: torch.Tensor,
        k: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *args: Any,
        **kw: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Other models of the same file may be at work at the same time.
        plain = not args and not kw and not torch.is_grad_enabled()
        shape = (q.shape[0], q.shape[2], q.shape[3])
        if plain and cos.shape == sin.shape == shape and _is_plain(q, k, cos, sin):
            return rotate_halves(q, cos, sin), rotate_halves(k, cos, sin)
        return original(q, k, cos, sin, *args, **kw)

    return rotary


def _is_plain(*tensors: torch.Tensor) -> bool:
    dtype = tensors[0].dtype
    return dtype in _TOLERANCE and all(t.dtype == dtype and t.device.type == "cpu" for t in tensors)


def _rotates_halves(original: Forward) -> bool:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    q, k, cos, sin = random(2, 4, 3, 8), random(2, 2, 3, 8), random(2, 3, 8), random(2, 3, 8)
    with torch.inference_mode():
        try:
            expected = original(q, k, cos, sin)
        except (IndexError, RuntimeError, TypeError, ValueError):  # one with other arguments
            return False
        actual = _make_rotary(original)(q, k, cos, sin)
    return (
        isinstance(expected, tuple)
        and len(expected) == 2
        and all(_close(a, e) for a, e in zip(actual, expected, strict=True))
    )


def _close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    tolerance = _TOLERANCE[expected.dtype]
    return actual.shape == expected.shape and torch.allclose(
        actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
    )
