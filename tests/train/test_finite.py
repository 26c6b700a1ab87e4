"""NaN and infinity are found wherever they stand, and nothing else is taken for them."""

from __future__ import annotations

import pytest
import torch

from spec_rollout.train.finite import nonfinite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 4097, -1])
def test_one_bad_number_is_found(dtype: torch.dtype, value: float, place: int) -> None:
    tensors = {name: torch.randn(3, 5000).to(dtype) for name in "abc"}
    assert nonfinite(tensors.items()) is None
    tensors["b"].view(-1)[place] = value
    what = "NaN" if value != value else "infinity"
    assert nonfinite(tensors.items()) == f"{what} in b (1 of 15000 numbers)"


def test_large_numbers_are_numbers() -> None:
    """Their squares are not."""
    tensors = {"a": torch.full((9,), 3e38), "b": torch.full((9,), 60000.0, dtype=torch.float16)}
    assert nonfinite(tensors.items()) is None
    tensors["c"] = torch.tensor([1.0, float("nan"), float("inf")])
    assert nonfinite(tensors.items()) == "NaN in c (2 of 3 numbers)"


def test_nothing_is_finite() -> None:
    assert nonfinite([]) is None
    assert nonfinite({"a": torch.zeros(0), "b": torch.tensor(2.0)}.items()) is None


def test_parameters_of_mixed_kinds() -> None:
    tensors = {
        "a": torch.nn.Parameter(torch.ones(3)),
        "b": torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)),
        "c": torch.nn.Parameter(torch.tensor([1.0, float("inf")]), requires_grad=False),
    }
    assert nonfinite(tensors.items()) == "infinity in c (1 of 2 numbers)"
