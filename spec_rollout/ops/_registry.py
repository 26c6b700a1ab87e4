"""Registration of ops with torch: schema, CPU and CUDA implementation, fake."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from spec_rollout._native import _C
from spec_rollout.ops._faults import NoDerivativeError

_LIBRARY = torch.library.Library("spec_rollout", "DEF")

_num_modes = torch._C._len_torch_dispatch_stack
_is_profiled = torch.autograd._profiler_enabled
_is_compiling = torch.compiler.is_compiling
_transform = torch._C._functorch.peek_interpreter_stack
_transforms = torch._C._functorch.get_interpreter_stack
_Transform = torch._C._functorch.TransformType


def _is_transformed(name: str) -> bool:
    """Whether a transform of torch.func is active, so that arguments may stand for other tensors,
    which the dispatcher finds.

    Raises:
        NoDerivativeError: if it differentiates. The dispatcher would give a derivative of zero.
    """
    kinds = {transform.key() for transform in _transforms() or ()}
    if kinds & {_Transform.Grad, _Transform.Jvp}:
        raise NoDerivativeError(
            f"torch.func: expected no derivative (grad, jvp) around {name}, which has none, got one"
        )
    return True


def refuse_gradients(name: str, differentiable: Mapping[str, int], args: Sequence[Any]) -> None:
    """Raises NoDerivativeError if a call is asked for results with a gradient, which it would give
    without.

    Args:
        name: Of the op.
        differentiable: As in `register_op`.
        args: Of the call.
    """
    if not torch.is_grad_enabled():
        return
    for argument, place in differentiable.items():
        value = args[place]
        for tensor in value if isinstance(value, list | tuple) else [value]:
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                raise NoDerivativeError(
                    f"{argument}: expected a tensor that requires no gradient, got one that does, "
                    f"and {name} has no derivative; detach() it, or call under torch.no_grad()"
                )


def register_op(
    schema: str,
    *,
    fake: Callable[..., Any],
    direct: Callable[..., Any] | None = None,
    differentiable: Mapping[str, int] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator that registers an implementation for CPU and CUDA and returns what to call.

    A call goes through torch's dispatcher where that has anything to add: while compiling or
    exporting, under a dispatch mode, a transform of torch.func or the profiler, for subclasses of
    Tensor, and for tensors that require a gradient. Anywhere else it would only cost what a whole
    call costs, and the implementation is called at once.

    Calls raise NoDerivativeError where a gradient is asked for (`differentiable`).

    Args:
        schema: `name(arguments) -> results`, in torch's schema language.
        fake: The same signature on tensors without data: output shapes, dtypes and devices.
        direct: What to call where the dispatcher is not needed, if that may do something the
            dispatcher may not see, such as results that share memory.
        differentiable: Public name and place of each argument whose gradient a result would be
            expected to have: no op gives one, and calls that ask for it are refused.
    """
    name = schema.partition("(")[0]
    differentiable = differentiable or {}
    places = sum(1 << place for place in differentiable.values())

    def decorate(implementation: Callable[..., Any]) -> Callable[..., Any]:
        _LIBRARY.define(schema)
        for backend in ("CPU", "CUDA"):
            _LIBRARY.impl(name, implementation, backend)
        torch.library.register_fake(f"spec_rollout::{name}", fake, lib=_LIBRARY)
        # The overload itself: looking it up in the packet at each call costs as much as the call.
        op = getattr(torch.ops.spec_rollout, name).default

        undispatched = direct or implementation

        @functools.wraps(implementation)
        def call(*args: Any) -> Any:
            if (
                _is_compiling()
                or _num_modes()
                or (_transform() is not None and _is_transformed(name))
                or _is_profiled()
                or not _C.all_plain(args, places)
            ):
                refuse_gradients(name, differentiable, args)
                return op(*args)
            return undispatched(*args)

        return call

    return decorate
