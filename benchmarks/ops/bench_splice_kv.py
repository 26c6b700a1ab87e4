"""splice_kv against what one would write in torch: slice copies per row and cache, and
index_select.

- "ragged": every row of a slot cache [rows, heads, positions, head_dim] is brought to another
  cache, cut to its accepted length (mean 45 % of a long-tailed draft). Peers: a loop of slice
  copies; `index_select` of whole rows, which copies the padding too and needs a second cache of
  full size.
- "in place": rows slide by a few positions within their own cache, overlapping themselves. Peer:
  slice copies with the clone that torch needs.
- "to blocks": the same ranges from a contiguous to a paged cache [blocks, block_size, heads,
  head_dim], and back. Peer: index_put / index_select with a slot per token, per layer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _common import Results, Timing, measure, parser, peak_extra_bytes
from _workload import long_tailed_lens

from spec_rollout import ops

LAYERS, HEADS, HEAD_DIM, POSITIONS, BLOCK_SIZE = 4, 2, 64, 1024, 16


def main() -> None:
    args = parser(__doc__).parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = 8 if args.quick else 128
    repeats = 3 if args.quick else 15
    generator = torch.Generator().manual_seed(0)
    results = Results("ops_splice_kv", args.out)
    shape = (rows, HEADS, POSITIONS, HEAD_DIM)
    src = [torch.randn(shape, generator=generator).bfloat16() for _ in range(2 * LAYERS)]
    dst = [torch.zeros_like(cache) for cache in src]
    lens = (long_tailed_lens(rows, 350, POSITIONS, generator) * 0.45).long()
    order = torch.randperm(rows, generator=generator)
    index = torch.arange(rows)
    zero = torch.zeros_like(index)
    moved = 2 * int(lens.sum()) * 2 * LAYERS * HEADS * HEAD_DIM * 2  # read and written

    def add(
        name: str, function: Callable[[], object], peers: dict[str, Callable[[], object]]
    ) -> None:
        timings: dict[str, Timing] = {
            peer: measure(call, repeats=max(3, repeats // 3)) for peer, call in peers.items()
        }
        results.add(
            name,
            shape={"caches": 2 * LAYERS, "rows": rows, "tokens": int(lens.sum())},
            dtype="bfloat16",
            timing=measure(function, repeats=repeats, min_seconds=0.2),
            bytes_moved=moved,
            peak_extra=peak_extra_bytes(function),
            peers=timings,
        )

    # Ragged rows to another cache.
    def ragged() -> None:
        ops.splice_kv(
            src, dst, src_rows=order, src_starts=zero, dst_rows=index, dst_starts=zero, lens=lens
        )

    pairs = list(zip(order.tolist(), lens.tolist(), strict=True))

    def ragged_slices() -> None:
        for source, target in zip(src, dst, strict=True):
            for i, (row, length) in enumerate(pairs):
                target[i, :, :length] = source[row, :, :length]

    def ragged_index_select() -> list[torch.Tensor]:
        return [source.index_select(0, order) for source in src]

    ragged_slices()
    expected = [cache.clone() for cache in dst]
    for cache in dst:
        cache.zero_()
    ragged()
    assert all(torch.equal(a, b) for a, b in zip(dst, expected, strict=True))
    peers = {"slice copies": ragged_slices, "index_select": ragged_index_select}
    add("splice_kv, ragged rows", ragged, peers)

    # Within the rows, three positions back and forth: the caches end as they began.
    shift = 3
    slide_lens = lens.clamp(max=POSITIONS - shift)
    there = {"src_starts": zero, "dst_starts": zero + shift}
    back = {"src_starts": zero + shift, "dst_starts": zero}

    def slide(starts: dict[str, torch.Tensor]) -> None:
        ops.splice_kv(dst, dst, src_rows=index, dst_rows=index, lens=slide_lens, **starts)

    slide_pairs = slide_lens.tolist()

    def slide_slices() -> None:
        for cache in dst:
            for i, length in enumerate(slide_pairs):
                cache[i, :, shift : shift + length] = cache[i, :, :length].clone()

    before = [cache.clone() for cache in dst]
    slide_slices()
    expected = [cache.clone() for cache in dst]
    for cache, old in zip(dst, before, strict=True):
        cache.copy_(old)
    slide(there)
    assert all(torch.equal(a, b) for a, b in zip(dst, expected, strict=True))
    add("splice_kv, in place", lambda: slide(there), {"slice copies with clone": slide_slices})
    slide(back)

    # To blocks and back.
    table = torch.randperm(rows * POSITIONS // BLOCK_SIZE, generator=generator).reshape(rows, -1)
    blocks = [torch.zeros(table.numel(), BLOCK_SIZE, HEADS, HEAD_DIM).bfloat16() for _ in src]

    def to_blocks() -> None:
        ops.splice_kv(
            src,
            blocks,
            src_rows=order,
            src_starts=zero,
            dst_rows=index,
            dst_starts=zero,
            lens=lens,
            dst_block_table=table,
        )

    def from_blocks() -> None:
        ops.splice_kv(
            blocks,
            dst,
            src_rows=index,
            src_starts=zero,
            dst_rows=index,
            dst_starts=zero,
            lens=lens,
            src_block_table=table,
        )

    position = torch.arange(POSITIONS)[None, :].expand(rows, -1)
    kept = position < lens[:, None]
    slots = (table.repeat_interleave(BLOCK_SIZE, dim=1) * BLOCK_SIZE + position % BLOCK_SIZE)[kept]
    source_rows, target_rows = (
        order[:, None].expand_as(kept)[kept],
        index[:, None].expand_as(kept)[kept],
    )
    source_positions = position[kept]

    def to_blocks_indexed() -> None:
        for source, target in zip(src, blocks, strict=True):
            target.view(-1, HEADS, HEAD_DIM)[slots] = source[source_rows, :, source_positions]

    def from_blocks_indexed() -> None:
        for source, target in zip(blocks, dst, strict=True):
            target[target_rows, :, source_positions] = source.view(-1, HEADS, HEAD_DIM)[slots]

    to_blocks_indexed()
    expected = [cache.clone() for cache in blocks]
    for cache in blocks:
        cache.zero_()
    to_blocks()
    assert all(torch.equal(a, b) for a, b in zip(blocks, expected, strict=True))
    for cache in dst:
        cache.zero_()
    from_blocks()
    for target, source in zip(dst, src, strict=True):
        assert torch.equal(target, torch.where(kept[:, None, :, None], source[order], 0))
    add("splice_kv, to blocks", to_blocks, {"indexing by slot": to_blocks_indexed})
    add("splice_kv, from blocks", from_blocks, {"indexing by slot": from_blocks_indexed})
    results.write()


if __name__ == "__main__":
    main()
