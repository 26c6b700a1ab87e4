"""Kinds of arguments: what is no number, no tensor, no object of ours is refused by name.

All raise ValueError, in one line: the argument, what was expected, what came.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

_INT64 = range(-(2**63), 2**63)
_Kind = TypeVar("_Kind")


def integer(name: str, value: Any) -> int:
    """`value` as an int, if it is one (of any library; a truth value is none) and int64 holds it.

    Raises:
        ValueError: naming the argument.
    """
    number = whole(name, value)
    if number not in _INT64:
        raise ValueError(f"{name}: expected an integer of 64 bits, got {shown(value)}")
    return number


def whole(name: str, value: Any) -> int:
    """`integer`, of any size."""
    try:
        if isinstance(value, bool | torch.SymBool):
            raise TypeError
        return operator.index(value)
    except Exception:
        raise ValueError(f"{name}: expected an integer, got {shown(value)}") from None


def real(name: str, value: Any) -> float:
    """`value` as a float, if it is a number (of any library; a truth value is none).

    Raises:
        ValueError: naming the argument.
    """
    if isinstance(value, bool) or not isinstance(value, float | int | numbers.Real):
        raise ValueError(f"{name}: expected a number, got {shown(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected a number within float64, got {shown(value)}") from None


def of_kind(name: str, value: Any, kind: type[_Kind], expected: str) -> _Kind:
    """`value`, if it is a `kind`; `expected` says that in words.

    Raises:
        ValueError: naming the argument.
    """
    if not isinstance(value, kind):
        raise ValueError(f"{name}: expected {expected}, got {shown(value)}")
    return value


def as_array(name: str, values: Any) -> np.ndarray:
    """`values` as NumPy takes them.

    Raises:
        ValueError: naming the argument, of what NumPy cannot take.
    """
    try:
        return np.asarray(values)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{name}: expected numbers, got {shown(values)} ({reason})") from None


def sample_indices(values: Any, count: int, of: str) -> np.ndarray:
    """Sample indices, one for each of what they are of. [count], int64.

    Raises:
        ValueError: naming `sample_ids`; also of one that is negative or takes more than 63 bits.
    """
    ids = as_array("sample_ids", values)
    if ids.shape != (count,) or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(
            f"sample_ids: expected {count} integers, one per {of}, "
            f"got {ids.dtype} of shape {list(ids.shape)}"
        )
    if ids.size and (ids.min() < 0 or ids.max() >= 2**63):
        raise ValueError(f"sample_ids: expected 0 <= value < 2**63, got {ids.min()} to {ids.max()}")
    return ids.astype(np.int64)


def items(name: str, values: Iterable[_Kind]) -> Sequence[_Kind]:
    """`values` as a sequence; a text is none.

    Raises:
        ValueError: naming the argument.
    """
    if isinstance(values, list | tuple):
        return values
    try:
        if isinstance(values, str | bytes):
            raise TypeError
        return list(values)
    except Exception:
        raise ValueError(f"{name}: expected a sequence, got {shown(values)}") from None


def tensors(**values: Any) -> None:
    """Each value is a dense tensor with values.

    Raises:
        ValueError: naming the argument.
    """
    for name, value in values.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{name}: expected a torch.Tensor, got {shown(value)}")
        if value.layout is not torch.strided or value.is_nested or value.is_meta:
            kind = "meta" if value.is_meta else "nested" if value.is_nested else value.layout
            raise ValueError(f"{name}: expected a dense tensor with values, got a {kind} one")


def cpu_tensors(**values: Any) -> None:
    """`tensors`, on the CPU.

    Raises:
        ValueError: naming the argument.
    """
    tensors(**values)
    for name, value in values.items():
        if value.device.type != "cpu":
            raise ValueError(f"{name}: expected a tensor on the CPU, got one on {value.device}")


def shown(value: object) -> str:
    """What came, in a few words: the value if it is short and its text says what it is."""
    kind = type(value).__name__
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, int) and abs(value) >= 10**40:
        return f"an int of {value.bit_length()} bits"
    if value is None or type(value) in (bool, int, float, str, bytes):
        text = repr(value)
        return text if len(text) <= 60 else f"{kind} {text[:50]}..."
    return kind
