"""Reference of `spec_rollout.ops.splice_kv`: token by token, out of a copy of the source."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def _token(
    cache: torch.Tensor, block_table: torch.Tensor | None, row: int, position: int
) -> torch.Tensor:
    """View of one token's heads: [heads, head_dim]."""
    if block_table is None:
        return cache[row, :, position]
    block_size = cache.shape[1]
    return cache[int(block_table[row, position // block_size]), position % block_size]


def splice_kv(
    src: Sequence[torch.Tensor],
    dst: Sequence[torch.Tensor],
    *,
    src_rows: torch.Tensor,
    src_starts: torch.Tensor,
    dst_rows: torch.Tensor,
    dst_starts: torch.Tensor,
    lens: torch.Tensor,
    src_block_table: torch.Tensor | None = None,
    dst_block_table: torch.Tensor | None = None,
) -> None:
    """Everything is read before anything is written, so overlap needs no thought."""
    ranges = list(
        zip(*(t.tolist() for t in (src_rows, src_starts, dst_rows, dst_starts, lens)), strict=True)
    )
    for source, target in zip(src, dst, strict=True):
        before = source.clone()
        for src_row, src_start, dst_row, dst_start, length in ranges:
            for i in range(length):
                value = _token(before, src_block_table, src_row, src_start + i)
                _token(target, dst_block_table, dst_row, dst_start + i).copy_(value)
