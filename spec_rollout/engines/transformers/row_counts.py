"""How few rows the matrix products of a forward may have.

Torch's float32 products on a CPU (MKL) add up each output element in one order for any number of
rows from `MIN_ROWS` on, and in another for one to three rows, which go through matrix-vector
kernels. In between it depends on the number of rows, threads and the machine: on the one where it
was tried, four and eight rows keep the order of many with one and two threads, five with one thread
alone. So what few rows are filled up to is tried, once per shape, number of threads and process.
A step of one to four rows then takes a fifth to a third less than with sixteen. It cannot take much
less: reading the weights is most of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Products of at least so many rows are taken to keep one order (found by trial on x86 with MKL:
# `torch.equal` over 1 to 4,096 rows). `TransformersEngine.batch_invariance_error` measures it.
MIN_ROWS = 16

_CANDIDATES = (4, 8)
_TRIED = 17  # rows
# Which of the candidates give the bits of many rows, by what decides about the kernel.
_EQUAL: dict[tuple[object, ...], frozenset[int]] = {}


def row_counts(model: torch.nn.Module) -> tuple[int, ...]:
    """Ascending numbers of rows that give the same bits as many rows; the last is `MIN_ROWS`.

    For the present number of torch's threads. A model whose products are not all known (weights
    outside linear layers, as of fused experts) has `MIN_ROWS` alone.

    Args:
        model: On a CPU, float32, outside any session of a `ModelForward`.
    """
    counts = set(_CANDIDATES)
    for module in _products(model):
        if module is None or not counts:
            return (MIN_ROWS,)
        counts &= _equal(module)
    return (*sorted(counts), MIN_ROWS)


def _products(model: torch.nn.Module) -> Iterator[torch.nn.Module | None]:
    """The modules that are matrix products; None for weights that some other code multiplies."""
    from transformers.pytorch_utils import Conv1D

    for module in model.modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            yield module
        elif not isinstance(module, torch.nn.Embedding):
            weights = module.parameters(recurse=False)
            if any(weight.ndim > 1 for weight in weights):
                yield None


def _equal(module: torch.nn.Module) -> frozenset[int]:
    weight, bias = module.weight, module.bias
    assert isinstance(weight, torch.Tensor)
    kind = (type(module), tuple(weight.shape), weight.stride(), bias is None)
    key = (*kind, torch.get_num_threads())
    if key not in _EQUAL:
        # A linear layer has its inputs last, a Conv1D first.
        width = weight.shape[-1 if isinstance(module, torch.nn.Linear) else 0]
        _EQUAL[key] = _try(module, width)
    return _EQUAL[key]


def _try(module: torch.nn.Module, width: int) -> frozenset[int]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(_TRIED, 1, width, generator=generator)
    with torch.inference_mode():
        expected = module(rows)

        def same(count: int) -> bool:
            return all(
                torch.equal(module(rows[start : start + count]), expected[start : start + count])
                for start in (0, _TRIED - count)
            )

        return frozenset(count for count in _CANDIDATES if same(count))
