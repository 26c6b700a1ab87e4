"""Rows of unequal length laid end to end, with prefix sums and no padding.

Row r of `values` is `values[cu_lens[r]:cu_lens[r + 1]]`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def cu_lens_from(lens: torch.Tensor) -> torch.Tensor:
    """Prefix sums with a leading zero: [batch] of any integer type -> [batch + 1], int64."""
    cu = torch.zeros(lens.numel() + 1, dtype=torch.int64)
    torch.cumsum(lens.to(torch.int64), 0, out=cu[1:])
    return cu


def ranges(counts: np.ndarray) -> np.ndarray:
    """0..counts[0]-1, 0..counts[1]-1, ... end to end. [n], int64 -> [sum(counts)], int64."""
    return np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)


def check_packed(
    name: str, values: torch.Tensor, cu_name: str, cu: torch.Tensor, batch: int
) -> None:
    """Raises ValueError, naming the argument, unless `values` is packed by `cu` into `batch`
    rows."""
    if cu.shape != (batch + 1,) or cu.dtype != torch.int64:
        raise ValueError(
            f"{cu_name}: expected int64 of shape [{batch + 1}], "
            f"got {cu.dtype} of shape {list(cu.shape)}"
        )
    if int(cu[0]) != 0 or bool((cu[1:] < cu[:-1]).any()):
        raise ValueError(f"{cu_name}: expected non-decreasing values from 0")
    if values.dim() != 1 or values.numel() != int(cu[-1]):
        raise ValueError(
            f"{name}: expected shape [{int(cu[-1])}] ({cu_name}[-1]), got {list(values.shape)}"
        )


def lens_to_stop(
    token_ids: np.ndarray, cu_lens: np.ndarray, stop_token_ids: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Length of each row up to and with its first stop token.

    Args:
        token_ids: [num_tokens], integer.
        cu_lens: [batch + 1], int64.
        stop_token_ids: The tokens that end a row; none leaves every row whole.

    Returns:
        Lengths (the whole row where no stop token is in it), [batch] int64; and whether the last
        token of that length is a stop token, [batch] bool.
    """
    lens = np.diff(cu_lens)
    stopped = np.zeros(lens.shape, dtype=bool)
    is_stop = np.zeros(token_ids.shape, dtype=bool)
    for token in stop_token_ids:
        is_stop |= token_ids == token
    stops = np.flatnonzero(is_stop)
    rows, first = np.unique(np.searchsorted(cu_lens, stops, side="right") - 1, return_index=True)
    lens[rows] = stops[first] + 1 - cu_lens[rows]
    stopped[rows] = True
    return lens, stopped
