"""How few rows the matrix products of a forward may have.

Torch's float32 products on a CPU (MKL) add up each output element in one order for any number of
rows from `MIN_ROWS` on, and in another for one to three rows, which go through matrix-vector
kernels. In between it depends on the number of rows, threads and the machine: on the one where it
was tried, four and eight rows keep the order of many with one and two threads, five with one thread
alone. So what few rows are filled up to is tried, once per shape, number of threads and process.
A step of one to four rows then takes a fifth to a third less than with sixteen. It cannot take much
less: reading the weights is most of it.

Products in bfloat16 (oneDNN) accumulate in float32, on processors that have instructions for them
in one order for any number of rows from a few on. Elsewhere they may not: what is tried there
includes many rows, and a model whose products fail is not run as batch-invariant.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

import torch

# Products of at least so many rows are taken to keep one order (found by trial on x86 with MKL:
# `torch.equal` over 1 to 4,096 rows). `TransformersEngine.batch_invariance_error` measures it.
MIN_ROWS = 16

_CANDIDATES = (4, 8)
_CANDIDATES_BFLOAT16 = (1, 2, 4, 8)
_TRIED = 17  # rows
# Of bfloat16 every one of these must have the bits of `_TRIED_BFLOAT16`.
_MANY_BFLOAT16 = (MIN_ROWS, 17, 33, 48, 80, 130)
_TRIED_BFLOAT16 = 272
# Which of the candidates give the bits of many rows, by what decides about the kernel; `MIN_ROWS`
# among them says that many rows are all alike.
_EQUAL: dict[tuple[object, ...], frozenset[int]] = {}

# Weights of linear layers whose products are tried.
_TRIED_DTYPES = (torch.float32, torch.bfloat16)
# Buffers of other types are packed weights: masks are bool, positions int64, tables of rotary
# embeddings floats.
_NO_WEIGHTS = (torch.bool, torch.int64, torch.float64, torch.float32, torch.float16, torch.bfloat16)


def row_counts(model: torch.nn.Module) -> tuple[int, ...]:
    """Ascending numbers of rows that give the same bits as many rows; the last is `MIN_ROWS`.

    For the present number of torch's threads. A model whose products are not all known (weights
    outside linear layers, as of fused experts, or quantised ones) has `MIN_ROWS` alone; in bfloat16
    it has none, as has one whose products depend on the number of rows.

    Args:
        model: On a CPU, all weights of one dtype but for quantised ones, outside any session of a
            `ModelForward`.
    """
    counts = {*_CANDIDATES_BFLOAT16, MIN_ROWS}
    for module in _products(model):
        if module is None:
            counts &= {MIN_ROWS} if _is_float32(model) else set()
        else:
            counts &= _equal(module)
        if not counts:
            break
    return tuple(sorted(counts))


def _is_float32(model: torch.nn.Module) -> bool:
    """By the first weights that are not quantised, as a model of transformers has its dtype."""
    dtypes = (weight.dtype for weight in model.parameters())
    return (
        next((t for t in dtypes if t.is_floating_point and t.itemsize > 1), None) == torch.float32
    )


def _products(model: torch.nn.Module) -> Iterator[torch.nn.Module | None]:
    """The modules that are matrix products; None for weights that some other code multiplies."""
    from transformers.pytorch_utils import Conv1D

    for module in model.modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            yield module if has_plain_weights(module) else None
        elif not isinstance(module, torch.nn.Embedding):
            buffers = (b for b in module.buffers(recurse=False) if b.dtype not in _NO_WEIGHTS)
            if any(w.ndim > 1 for w in itertools.chain(module.parameters(recurse=False), buffers)):
                yield None


def has_plain_weights(module: torch.nn.Module) -> bool:
    """Whether a linear layer's weights are numbers in a plain tensor: those of a quantised one are
    not."""
    weight = getattr(module, "weight", None)
    return (
        isinstance(weight, torch.Tensor)
        and type(weight) in (torch.Tensor, torch.nn.Parameter)
        and weight.ndim == 2
        and weight.dtype in _TRIED_DTYPES
    )


def _equal(module: torch.nn.Module) -> frozenset[int]:
    weight, bias = module.weight, module.bias
    assert isinstance(weight, torch.Tensor)
    kind = (type(module), tuple(weight.shape), weight.stride(), weight.dtype, bias is None)
    key = (*kind, torch.get_num_threads())
    if key not in _EQUAL:
        # A linear layer has its inputs last, a Conv1D first.
        inputs = -1 if isinstance(module, torch.nn.Linear) else 0
        _EQUAL[key] = (_try if weight.dtype == torch.float32 else _try_bfloat16)(module, inputs)
    return _EQUAL[key]


def _try(module: torch.nn.Module, inputs: int) -> frozenset[int]:
    width = module.get_parameter("weight").shape[inputs]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(_TRIED, 1, width, generator=generator, dtype=torch.float32)
    return frozenset(_same(module, rows, _CANDIDATES)) | {MIN_ROWS}


def _try_bfloat16(module: torch.nn.Module, inputs: int) -> frozenset[int]:
    """Outputs rounded to eight bits would hide most of another order of summation.

    So the trial's sums are 0: half of each is the other half's negative. What comes out is the
    error of adding up alone, all of it visible. Where which terms lie is drawn, for a kernel may
    add up by lanes, in which a regular order would cancel. Few products can be added without error,
    so every second row's sums are not 0: what is another value altogether shows there.
    """
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.zeros_like(value) for name, value in module.named_parameters()}
    weight = weights["weight"]
    width = weight.shape[inputs]
    half = width // 2
    first, second = (weight.narrow(inputs, start, half) for start in (0, half))
    torch.neg(first.uniform_(-1, 1, generator=generator), out=second)
    rows = torch.zeros(_TRIED_BFLOAT16, 1, width, dtype=weight.dtype)
    rows[..., :half].uniform_(-1, 1, generator=generator)
    rows[..., half : 2 * half] = rows[..., :half]
    rows[1::2, :, half : 2 * half].neg_()
    order = torch.randperm(width, generator=generator)
    weight.copy_(weight.index_select(inputs, order))
    rows = rows[..., order]

    def product(x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.func.functional_call(module, weights, (x,))
        return result

    counts = _same(product, rows, (*_CANDIDATES_BFLOAT16, *_MANY_BFLOAT16))
    if not counts.issuperset(_MANY_BFLOAT16):
        return frozenset()
    return frozenset(counts.intersection(_CANDIDATES_BFLOAT16)) | {MIN_ROWS}


def _same(
    product: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, counts: Iterable[int]
) -> set[int]:
    """Those counts whose products have the bits of all rows together."""
    with torch.inference_mode():
        expected = product(rows)
        return {
            count
            for count in counts
            if all(
                torch.equal(product(rows[start : start + count]), expected[start : start + count])
                for start in (0, len(rows) - count)
            )
        }
