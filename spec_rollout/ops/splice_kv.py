"""Moving ranges of tokens between KV caches."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch

from spec_rollout._native import _C, num_threads
from spec_rollout.ops._faults import refuse
from spec_rollout.ops._registry import register_op
from spec_rollout.ops._status import after_launch, status_word


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
    """Copies ranges of tokens between KV caches: all layers, keys and values, and heads in one
    call.

    Range i is the lens[i] tokens from position src_starts[i] of row src_rows[i]; they go to
    position dst_starts[i] of row dst_rows[i]. Bytes are moved, so any dtype will do. What no range
    names keeps its value.

    A cache is contiguous, [rows, heads, positions, head_dim] (Hugging Face's layout; strided views
    with a contiguous last dimension are fine), or paged, [num_blocks, block_size, heads, head_dim],
    if its block table is given: position p of row r is then at offset p % block_size of block
    block_table[r, p // block_size] (vLLM's layout).

    `src` may be `dst` (the same tensors in the same order). A range may then overlap itself, as
    with memmove. No token may be written by two ranges, nor be written by one and read by another.
    Otherwise `src` and `dst` must not share memory. Keys and values whose shapes differ (heads or
    head_dim) need a call each.

    Args:
        src: One tensor per layer for keys and one for values, in any order; all of one shape and
            dtype. 4-D.
        dst: As many as `src`, with its dtype, heads and head_dim; written in place.
        src_rows: Row (of the cache, or of the block table) of each range. [num_ranges], int32 or
            int64.
        src_starts: First position of each range. [num_ranges], int32 or int64.
        dst_rows: Like `src_rows`. [num_ranges], int32 or int64.
        dst_starts: Like `src_starts`. [num_ranges], int32 or int64.
        lens: Tokens in each range; 0 skips it. [num_ranges], int32 or int64.
        src_block_table: Block ids of a paged `src`; entries that no range needs are not read.
            [table_rows, max_blocks], int32 or int64.
        dst_block_table: The same for `dst`. [table_rows, max_blocks], int32 or int64.

    Raises:
        ValueError: naming the argument, what was expected and what was given; nothing is written
            then. Caches that require a gradient are refused where torch keeps gradients: there is
            no derivative. On CUDA, the values of rows, starts, lens and block tables are not read
            back: a range (or a token) outside a cache is skipped and reported by `check_status`,
            and conflicts between ranges are not detected.

    On CUDA, the addresses of a list of caches are copied to the device when the list is first seen,
    so that later calls with it are one launch and can be captured in a CUDA graph. The 256 latest
    lists are kept.
    """
    try:
        src_caches, dst_caches = list(src), list(dst)  # an iterator is read once
        dtypes = {cache.dtype for cache in (*src_caches, *dst_caches)}
        if len(dtypes) > 1:
            raise ValueError(
                f"src, dst: expected one dtype, got {', '.join(sorted(map(str, dtypes)))}"
            )
        _splice_kv(
            src_caches,
            dst_caches,
            src_rows,
            src_starts,
            dst_rows,
            dst_starts,
            lens,
            src_block_table,
            dst_block_table,
        )
    except Exception as error:
        refuse(error, splice_kv, locals())
        raise


_MAX_VIEW_TABLES = 256
_view_tables: OrderedDict[tuple[object, ...], torch.Tensor] = OrderedDict()


def _view_table(caches: Sequence[torch.Tensor], paged: bool) -> torch.Tensor | None:
    """Addresses and strides of the caches where a kernel finds them: [num_caches, 4], int64. None
    on CPU.

    The key is the content itself: a table cannot go stale when a cache is freed and its address
    used again.
    """
    if not caches or not caches[0].is_cuda:
        return None
    device = caches[0].device
    words = _C.cache_view_words(caches, paged)
    key = (device, *words)
    table = _view_tables.get(key)
    if table is None:
        table = torch.tensor(words, dtype=torch.int64, device=device).view(-1, 4)
        _view_tables[key] = table
        if len(_view_tables) > _MAX_VIEW_TABLES:
            _view_tables.popitem(last=False)
    else:
        _view_tables.move_to_end(key)
    return table


def _positions(caches: Sequence[torch.Tensor], block_table: torch.Tensor | None) -> int:
    """Positions in a row: no range can be longer. 0 for what the checks will refuse."""
    if not caches or caches[0].ndim != 4:
        return 0
    if block_table is None:
        return caches[0].shape[2]
    return caches[0].shape[1] * block_table.shape[-1] if block_table.ndim == 2 else 0


def _splice_kv_fake(src, dst, *ranges_and_tables):
    return None


@register_op(
    "splice_kv(Tensor[] src, Tensor(a!)[] dst, Tensor src_rows, Tensor src_starts, Tensor "
    "dst_rows, "
    "Tensor dst_starts, Tensor lens, Tensor? src_block_table, Tensor? dst_block_table) -> ()",
    fake=_splice_kv_fake,
    differentiable={"src": 0, "dst": 1},
)
def _splice_kv(
    src,
    dst,
    src_rows,
    src_starts,
    dst_rows,
    dst_starts,
    lens,
    src_block_table,
    dst_block_table,
):
    _C.splice_kv(
        src,
        dst,
        src_rows,
        src_starts,
        dst_rows,
        dst_starts,
        lens,
        src_block_table,
        dst_block_table,
        min(_positions(src, src_block_table), _positions(dst, dst_block_table)),
        _view_table(src, src_block_table is not None),
        _view_table(dst, dst_block_table is not None),
        status_word(lens),
        num_threads(),
    )
    after_launch(lens)
