"""Which argument made a call fail.

The ops do not look at their arguments' kinds before they start: that would cost as much as a call.
What fails is asked here, afterwards and before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from spec_rollout.acceptance import AcceptanceRule
from spec_rollout.checks import integer, real, shown

_LONGEST = 2**48  # tokens in a row; no memory has that many addresses
# By the vocabulary of the library: one-dimensional, int32 or int64.
_INTEGER_VECTORS = frozenset({
    "token_ids", "draft_ids", "keys", "positions", "cu_draft_lens", "cu_logits_lens", "draft_lens",
    "prompt_ids", "cu_prompt_lens", "prefix_ids", "cu_prefix_lens", "accepted_lens",
    "continuation_ids", "cu_continuation_lens",
    "src_rows", "src_starts", "dst_rows", "dst_starts", "lens",
})  # fmt: skip


class NoDerivativeError(ValueError):
    """The call, and no argument of it, is where it cannot be."""


def refuse(error: Exception, op: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Raises ValueError if an argument of the call is to blame for the error; returns otherwise,
    and then the error is to be raised as it is.

    Args:
        error: What the call ended in.
        op: The public op; its annotations say what is expected.
        arguments: Of the call, by name.
    """
    if isinstance(error, NoDerivativeError):
        return
    given = {name: arguments[name] for name in op.__annotations__ if name in arguments}
    named = str(error).partition(":")[0].split(", ") if isinstance(error, ValueError) else []
    for name, value in given.items():
        # Said already, and better than from here; of a tensor only if it is wrong by itself.
        if name in named and ("Tensor" not in op.__annotations__[name] or _fault(name, value, op)):
            return
    for name, value in given.items():
        fault = _fault(name, value, op)
        if fault is not None:
            raise ValueError(f"{name}: expected {fault}") from error
    if isinstance(error, ValueError):
        return
    for name, value in given.items():
        for tensor in _tensors(value):
            if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
                raise ValueError(
                    f"{name}: expected a torch.Tensor, got {type(tensor).__name__}, a subclass "
                    f"that fails with {type(error).__name__}: {error}"
                ) from error


def _tensors(value: object) -> Iterator[torch.Tensor]:
    for item in value if isinstance(value, list | tuple) else [value]:
        if isinstance(item, torch.Tensor):
            yield item


def _fault(name: str, value: Any, op: Callable[..., Any]) -> str | None:
    """ "what was expected, got what came" of an argument that is wrong by itself, or None."""
    annotation = op.__annotations__[name]
    if value is None and "None" in annotation:
        return None
    if annotation == "AcceptanceRule":
        if not isinstance(value, AcceptanceRule):
            return f"an acceptance rule such as Lenient(0.0), got {shown(value)}"
    elif annotation.startswith("Sequence[torch.Tensor]"):
        return _sequence_fault(value)
    elif annotation.startswith("torch.Tensor"):
        return _tensor_fault(value, name in _INTEGER_VECTORS)
    elif annotation.startswith(("int", "float")):
        if isinstance(value, torch.Tensor) and "torch.Tensor" in annotation:
            return _tensor_fault(value, False)
        return _number_fault(name, value, annotation)
    elif annotation.startswith(("Literal", "Layout")):
        if not isinstance(value, str):
            return f"one of the names in its documentation, got {shown(value)}"
    elif annotation.startswith("Assembled"):
        return _result_fault(value)
    return None


def _number_fault(name: str, value: Any, annotation: str) -> str | None:
    try:
        if annotation.startswith("float"):
            real(name, value)
        elif name.endswith("_len") and integer(name, value) >= _LONGEST:
            return f"a length below 2**48, got {shown(value)}"
        else:
            integer(name, value)
    except ValueError as error:
        return str(error).removeprefix(f"{name}: expected ")
    return None


def _tensor_fault(value: Any, integers: bool) -> str | None:
    if not isinstance(value, torch.Tensor):
        return f"a torch.Tensor, got {shown(value)}"
    kind = type(value).__name__
    try:
        # A subclass may answer for itself as it likes.
        with torch._C.DisableTorchFunctionSubclass():
            layout, device, dtype, ndim = value.layout, value.device, value.dtype, value.ndim
            if value.is_nested:
                return "one tensor, got a nested one"
            if layout is not torch.strided:
                return f"a dense tensor (torch.strided), got layout {layout}"
            if device.type not in ("cpu", "cuda"):
                return f"a CPU or CUDA tensor, got device {device}"
            if integers and dtype not in (torch.int32, torch.int64):
                return f"int32 or int64, got {str(dtype).removeprefix('torch.')}"
            if integers and ndim != 1:
                return f"one dimension, got {ndim}"
            value.data_ptr()
    except Exception as error:
        return f"a tensor with memory of its own, got {kind} ({_first_line(error)})"
    return None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:100]


def _sequence_fault(value: Any) -> str | None:
    if isinstance(value, torch.Tensor) and (fault := _tensor_fault(value, False)):
        return f"a sequence of tensors, got not {fault}"
    try:
        items = list(value)
    except Exception:
        return f"a sequence of tensors, got {shown(value)}"
    for index, item in enumerate(items):
        fault = _tensor_fault(item, False)
        if fault is not None:
            return f"a sequence of tensors, got at index {index} not {fault}"
    return None


def _result_fault(value: Any) -> str | None:
    names = getattr(type(value), "_fields", ())
    if not isinstance(value, tuple) or "input_ids" not in names:
        return f"a result of an earlier call (Assembled), got {shown(value)}"
    for name, tensor in zip(names, value, strict=True):
        fault = None if tensor is None else _tensor_fault(tensor, False)
        if fault is not None:
            return f"{name} to be {fault}"
    return None
