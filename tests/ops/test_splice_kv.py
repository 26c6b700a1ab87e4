"""splice_kv against its reference, hand-computed cases, memmove, and the conflicts it must
refuse."""

from __future__ import annotations

import itertools

import pytest
import torch
from opchecks import opcheck

from spec_rollout import ops
from spec_rollout.ops.reference.kv import splice_kv as reference

HEADS, POSITIONS, BLOCK_SIZE = 3, 24, 4


def ranges(*rows: tuple[int, int, int, int, int], device: str = "cpu", dtype=torch.int64):
    """Arguments from (src_row, src_start, dst_row, dst_start, len) of each range."""
    columns = torch.tensor(rows, dtype=dtype, device=device).reshape(-1, 5).T.contiguous()
    names = ("src_rows", "src_starts", "dst_rows", "dst_starts", "lens")
    return dict(zip(names, columns, strict=True))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Bytes, so that NaNs and 8-bit floats compare."""
    return tensor.cpu().contiguous().view(torch.uint8)


def random_bytes(shape, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    num_bytes = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(
        0, 256, (*shape[:-1], shape[-1] * num_bytes), generator=generator, dtype=torch.uint8
    )
    return raw.view(dtype)


class Caches:
    """Random caches of one layout, and what a test needs to know of them."""

    def __init__(self, layout, generator, device, dtype=torch.float32, rows=5, head_dim=8):
        self.table = None
        if layout == "paged":
            per_row = POSITIONS // BLOCK_SIZE
            num_blocks = rows * per_row + 3
            blocks = torch.randperm(num_blocks, generator=generator)[: rows * per_row]
            self.table = blocks.reshape(rows, per_row).to(device)
            shapes = [(num_blocks, BLOCK_SIZE, HEADS, head_dim)] * 4
        elif layout == "contiguous":
            shapes = [(rows, HEADS, POSITIONS, head_dim)] * 4
        elif (
            layout == "transposed"
        ):  # [rows, positions, heads, head_dim] in memory: heads side by side
            shapes = [(rows, POSITIONS, HEADS, head_dim)] * 4
        else:  # "window": a slice of a larger cache in every dimension
            shapes = [(rows + 2, HEADS + 1, POSITIONS + 5, head_dim + 3)] * 4
        self.storage = [random_bytes(s, dtype, generator).to(device) for s in shapes]
        self.layout = layout
        self.rows = rows
        self.head_dim = head_dim

    def views(self, storage: list[torch.Tensor]) -> list[torch.Tensor]:
        if self.layout == "transposed":
            return [s.transpose(1, 2) for s in storage]
        if self.layout == "window":
            return [s[1:-1, 1:, 2 : 2 + POSITIONS, 2 : 2 + self.head_dim] for s in storage]
        return storage

    def clone(self) -> list[torch.Tensor]:
        return [s.clone() for s in self.storage]


def disjoint_windows(rows: int, generator: torch.Generator) -> list[tuple[int, int, int]]:
    """(row, begin, end) that do not overlap: each row cut at random places."""
    windows = []
    for row in range(rows):
        cuts = torch.randint(0, POSITIONS + 1, (3,), generator=generator).sort().values.tolist()
        edges = [0, *cuts, POSITIONS]
        windows += [(row, a, b) for a, b in itertools.pairwise(edges)]
    return windows


def randint(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


LAYOUTS = ["contiguous", "transposed", "window", "paged"]


# 7 elements of 1 or 2 bytes: only the narrowest accesses are aligned. 8 and 64 floats: 32 and 256
# bytes.
@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [
        (torch.float32, 8),
        (torch.bfloat16, 64),
        (torch.float16, 7),
        (torch.float8_e4m3fn, 7),
        (torch.int64, 5),
    ],
    ids=str,
)
@pytest.mark.parametrize("dst_layout", LAYOUTS)
@pytest.mark.parametrize("src_layout", LAYOUTS)
def test_equals_reference(device, src_layout, dst_layout, dtype, head_dim, generator) -> None:
    for index_dtype in (torch.int32, torch.int64):
        src = Caches(src_layout, generator, device, dtype, rows=4, head_dim=head_dim)
        dst = Caches(dst_layout, generator, device, dtype, rows=6, head_dim=head_dim)
        if src.table is not None:  # rows of a source may share their blocks
            src.table[1, :3] = src.table[0, :3]
        moves = []
        for row, begin, end in disjoint_windows(6, generator):
            length = randint(0, end - begin, generator)
            start = randint(0, POSITIONS - length, generator)
            moves.append(
                (
                    randint(0, 3, generator),
                    start,
                    row,
                    begin + randint(0, end - begin - length, generator),
                    length,
                )
            )
        tables = {
            name: None if table is None else table.to(index_dtype)
            for name, table in (("src_block_table", src.table), ("dst_block_table", dst.table))
        }
        expected, before = dst.clone(), src.clone()
        reference(src.views(src.storage), dst.views(expected), **ranges(*moves), **tables)
        ops.splice_kv(
            src.views(src.storage),
            dst.views(dst.storage),
            **ranges(*moves, device=device, dtype=index_dtype),
            **tables,
        )
        # The whole storage: slots that no range names, and what lies around a view, keep their
        # bytes.
        for got, want in zip(dst.storage, expected, strict=True):
            assert torch.equal(bits(got), bits(want))
        for got, want in zip(src.storage, before, strict=True):
            assert torch.equal(bits(got), bits(want))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_place_equals_reference(device, layout, generator) -> None:
    """Windows either move within themselves (any overlap) or copy to another window."""
    for _ in range(20):
        caches = Caches(layout, generator, device)
        windows = disjoint_windows(caches.rows, generator)
        order = torch.randperm(len(windows), generator=generator).tolist()
        moves = []
        while order:
            row, begin, end = windows[order.pop()]
            length = randint(0, end - begin, generator)
            src = randint(begin, end - length, generator)
            if order and randint(0, 1, generator):
                other, other_begin, other_end = windows[order.pop()]
                length = min(length, other_end - other_begin)
                moves.append((row, src, other, other_begin, length))
            else:
                moves.append((row, src, row, randint(begin, end - length, generator), length))
        tables = {"src_block_table": caches.table, "dst_block_table": caches.table}
        expected = caches.clone()
        views = caches.views(expected)
        reference(views, views, **ranges(*moves), **tables)
        views = caches.views(caches.storage)
        ops.splice_kv(views, views, **ranges(*moves, device=device), **tables)
        for got, want in zip(caches.storage, expected, strict=True):
            assert torch.equal(bits(got), bits(want))


# Longer than a tile of the CUDA kernel (1024 accesses of 16 bytes) and than a block of any paged
# cache.
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("shift", [-1300, -64, -1, 1, 5, 64, 1300])
def test_self_overlap_is_a_memmove(device, shift, paged, generator) -> None:
    positions, length = 4096, 1400
    start = 1310
    caches = [torch.randn(2, 2, positions, 8, generator=generator) for _ in range(2)]
    expected = [c.clone() for c in caches]
    for c in expected:
        c[1, :, start + shift : start + shift + length] = c[1, :, start : start + length].clone()
    args = ranges((1, start, 1, start + shift, length), device=device)
    if paged:  # 16 positions a block; row r's blocks in reverse order
        table = torch.arange(2 * positions // 16).flip(0).reshape(2, -1).to(device)
        blocks = [torch.zeros(table.numel(), 16, 2, 8, device=device) for _ in caches]
        for block, c in zip(blocks, caches, strict=True):
            rows = c.transpose(1, 2).reshape(2, -1, 16, 2, 8)
            block[table.flatten()] = rows.flatten(0, 1).to(device)
        ops.splice_kv(blocks, blocks, **args, src_block_table=table, dst_block_table=table)
        got = [b[table].reshape(2, positions, 2, 8).transpose(1, 2) for b in blocks]
    else:
        got = [c.to(device) for c in caches]
        ops.splice_kv(got, got, **args)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.cpu(), b)


def test_hand_computed(device) -> None:
    # One head of one element: row r holds 10 r + position.
    cache = (10 * torch.arange(3)[:, None] + torch.arange(6)).float().reshape(3, 1, 6, 1).to(device)
    out = torch.full((2, 1, 4, 1), -1.0, device=device)
    ops.splice_kv(
        [cache], [out], **ranges((2, 1, 0, 0, 3), (0, 5, 1, 3, 1), (1, 0, 1, 0, 0), device=device)
    )
    assert out.flatten(1).tolist() == [[21, 22, 23, -1], [-1, -1, -1, 5]]
    # To blocks of two positions: row 0 of the table is blocks 3, 0.
    blocks = torch.full((4, 2, 1, 1), -1.0, device=device)
    table = torch.tensor([[3, 0]], device=device)
    ops.splice_kv(
        [cache], [blocks], **ranges((1, 2, 0, 1, 3), device=device), dst_block_table=table
    )
    assert blocks.flatten(1).tolist() == [[13, 14], [-1, -1], [-1, -1], [-1, 12]]


def test_many_threads_and_large_ranges(generator) -> None:
    """More than one piece of work per thread, rows of very different lengths."""
    src = [torch.randn(16, 2, 1500, 32, generator=generator) for _ in range(2)]
    dst = [torch.zeros(16, 2, 1500, 32) for _ in range(2)]
    lens = (torch.rand(16, generator=generator) ** 3 * 1500).long()
    rows = torch.randperm(16, generator=generator)
    zero = torch.zeros(16, dtype=torch.int64)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        ops.splice_kv(
            src,
            dst,
            src_rows=rows,
            src_starts=zero,
            dst_rows=torch.arange(16),
            dst_starts=zero,
            lens=lens,
        )
    finally:
        torch.set_num_threads(threads)
    kept = torch.arange(1500)[None, None, :, None] < lens[:, None, None, None]
    for source, target in zip(src, dst, strict=True):
        assert torch.equal(target, torch.where(kept, source[rows], 0.0))


def test_nothing_to_do(device, generator) -> None:
    caches = Caches("contiguous", generator, device)
    before = caches.clone()
    ops.splice_kv(caches.storage, caches.storage, **ranges(device=device))
    # An empty range is skipped, wherever it points.
    ops.splice_kv(caches.storage, caches.storage, **ranges((99, -3, 99, 99, 0), device=device))
    ops.splice_kv([], [], **ranges((0, 0, 1, 0, 3), device=device))
    # Empty caches share no memory, whatever their strides.
    for empty in (torch.empty(0, HEADS, POSITIONS, 8, device=device), caches.storage[0][:0]):
        transposed = torch.empty(0, POSITIONS, HEADS, 8, device=device).transpose(1, 2)
        ops.splice_kv([empty], [transposed], **ranges((0, 0, 0, 0, 0), device=device))
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(caches.storage, before, strict=True))


def refused(match: str, src, dst, args, **tables) -> None:
    """The error comes, and before anything is written."""
    before = [d.clone() for d in dst]
    with pytest.raises(ValueError, match=match):
        ops.splice_kv(src, dst, **args, **tables)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(dst, before, strict=True))


GOOD = (0, 0, 4, 0, 4)  # goes first, so that a check made range by range would have written it


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ((5, 0, 1, 0, 2), "src_rows: expected 0 <= row < 5, got 5 at index 1"),
        ((-1, 0, 1, 0, 2), "src_rows: .* got -1 at index 1"),
        ((0, 0, 5, 0, 2), "dst_rows: expected 0 <= row < 5, got 5 at index 1"),
        (
            (0, 23, 1, 0, 2),
            "src_starts, lens: expected .* <= 24, got start 23 and len 2 at index 1",
        ),
        ((0, -1, 1, 0, 2), "src_starts, lens: .* got start -1"),
        ((0, 0, 1, 20, 5), "dst_starts, lens: .* got start 20 and len 5"),
        ((0, 0, 1, 2**62, 5), "dst_starts, lens: "),
        ((0, 0, 1, 0, -1), "lens: expected >= 0, got -1 at index 1"),
        ((0, 0, 1, 0, 2**62), "src_starts, lens: "),
    ],
)
@pytest.mark.parametrize("layout", ["contiguous", "paged"])
def test_ranges_outside_the_caches(layout, bad, match, generator) -> None:
    src, dst = Caches(layout, generator, "cpu"), Caches(layout, generator, "cpu")
    tables = {"src_block_table": src.table, "dst_block_table": dst.table}
    refused(match, src.storage, dst.storage, ranges(GOOD, bad), **tables)


def test_block_ids_outside_the_cache(generator) -> None:
    src, dst = Caches("paged", generator, "cpu"), Caches("paged", generator, "cpu")
    tables = {"src_block_table": src.table, "dst_block_table": dst.table}
    move = ranges(GOOD, (1, 2, 2, 0, 8))  # positions 2 to 9 of row 1: its blocks 0, 1 and 2
    src.table[1, 3] = -1  # not needed: not an error
    dst.table[0, 0] = 10**6
    ops.splice_kv(src.storage, dst.storage, **move, **tables)
    src.table[1, 2] = -1
    refused(
        r"src_block_table: expected 0 <= block id < 33, got -1 at \[1, 2\], needed by range 1",
        src.storage,
        dst.storage,
        move,
        **tables,
    )
    src.table[1, 2] = 0
    dst.table[2, 0] = 33
    refused(r"dst_block_table: .* got 33 at \[2, 0\]", src.storage, dst.storage, move, **tables)


def test_conflicting_ranges(generator) -> None:
    src, dst = Caches("contiguous", generator, "cpu"), Caches("contiguous", generator, "cpu")
    twice = ranges((0, 0, 1, 4, 3), (0, 0, 2, 0, 3), (0, 0, 1, 6, 3))
    refused("dst_rows, .*ranges 0 and 2 both writing to row 1", src.storage, dst.storage, twice)
    touching = ranges((0, 0, 1, 4, 2), (0, 0, 2, 0, 3), (0, 0, 1, 6, 3))
    ops.splice_kv(src.storage, dst.storage, **touching)
    # Row 1 is read by range 0 and written by range 1: allowed between two caches, not within one.
    chain = ranges((1, 0, 2, 0, 4), (0, 0, 1, 3, 4))
    ops.splice_kv(src.storage, dst.storage, **chain)
    refused("range 0 reading what range 1 writes in row 1", src.storage, src.storage, chain)
    swap = ranges((0, 0, 1, 0, 4), (1, 0, 0, 0, 4))
    refused(
        "conflict, got range 0 reading what range 1 writes in row 0", src.storage, src.storage, swap
    )


def test_conflicting_blocks(generator) -> None:
    caches = Caches("paged", generator, "cpu")
    tables = {"src_block_table": caches.table, "dst_block_table": caches.table}
    caches.table[1, 1] = caches.table[0, 1]  # positions 4 to 7 of rows 0 and 1 are the same slots
    both = ranges((2, 0, 0, 0, 8), (3, 0, 1, 7, 1))
    refused("ranges 0 and 1 both writing to block", caches.storage, caches.storage, both, **tables)
    chain = ranges((0, 4, 2, 0, 2), (3, 0, 1, 5, 2))
    refused(
        "range 0 reading what range 1 writes in block",
        caches.storage,
        caches.storage,
        chain,
        **tables,
    )
    # One range whose blocks come in different orders on its two sides has no direction that is
    # right.
    other = caches.table.clone()
    other[0, :3] = caches.table[0, [0, 2, 1]]
    shifted = ranges((0, 0, 0, 1, 10))
    refused(
        "range 0 reading what range 0 writes",
        caches.storage,
        caches.storage,
        shifted,
        src_block_table=caches.table,
        dst_block_table=other,
    )


def test_wrong_tensors(generator) -> None:
    src, dst = Caches("contiguous", generator, "cpu"), Caches("contiguous", generator, "cpu")
    a, b, args = src.storage, dst.storage, ranges(GOOD)
    refused(r"dst: expected as many caches as src \(4\), got 3", a, b[:3], args)
    refused(
        "src, dst: expected one dtype, got torch.float16, torch.float32",
        a,
        [c.half() for c in b],
        args,
    )
    refused(
        r"dst: expected shape \[dst_rows = 5, heads = 3, .*\], got \[5, 2, 24, 8\]",
        a,
        [c[:, :2] for c in b],
        args,
    )
    refused("src: expected shape", [a[0][:2], *a[1:]], b, args)
    refused("src: expected shape .*, got .5, 3, 192.", [c.flatten(2) for c in a], b, args)
    refused(
        "src: expected a contiguous last dimension",
        [c.transpose(2, 3) for c in a],
        [c.transpose(2, 3) for c in b],
        args,
    )
    refused("dst: .* expanded view", a, [c[:1].expand(5, -1, -1, -1) for c in b], args)
    refused(
        "src, dst: expected equal strides where they share memory",
        a,
        [c.as_strided((5, 3, 24, 8), (576, 8, 24, 1)) for c in a],
        args,
    )
    refused(
        "src_starts: expected shape",
        a,
        b,
        {**args, "src_starts": torch.zeros(2, dtype=torch.int64)},
    )
    refused("lens: expected int32 or int64, got float32", a, b, {**args, "lens": torch.ones(1)})
    table = torch.zeros(5, 6, dtype=torch.int64)
    paged = [c.transpose(1, 2) for c in b]  # 5 blocks of 24 positions
    refused(
        "dst_block_table: expected int32 or int64", a, paged, args, dst_block_table=table.float()
    )
    refused("dst_block_table: expected shape", a, paged, args, dst_block_table=table[0])
    refused(
        "src, dst: expected one layout when a cache is copied onto itself",
        paged,
        b,
        args,
        src_block_table=table,
    )


def test_cuda_reports_what_it_skips(generator) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    ops.check_status()
    src, dst = Caches("contiguous", generator, "cuda"), Caches("contiguous", generator, "cuda")
    before = dst.clone()
    ops.splice_kv(
        src.storage, dst.storage, **ranges((0, 0, 9, 0, 3), (0, 20, 1, 0, 5), device="cuda")
    )
    with pytest.raises(ValueError, match="KV cache"):
        ops.check_status()
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(dst.storage, before, strict=True))


@pytest.mark.slow
def test_opcheck(device, generator) -> None:
    src, dst = Caches("contiguous", generator, device), Caches("paged", generator, device)
    args = ranges((0, 0, 1, 0, 5), (2, 3, 0, 7, 4), device=device)
    opcheck(("splice_kv", (src.storage, dst.storage, *args.values(), None, dst.table)))


@pytest.mark.slow
def test_compiles_without_graph_break(generator) -> None:
    caches = Caches("contiguous", generator, "cpu")
    args = ranges((0, 2, 0, 0, 9), (1, 0, 2, 0, 4))

    def spliced(caches, args):
        ops.splice_kv(caches, caches, **args)
        return [c + 0 for c in caches]

    eager, compiled = caches.clone(), caches.clone()
    expected = spliced(eager, args)
    got = torch.compile(spliced, fullgraph=True, backend="aot_eager")(compiled, args)
    for a, b, c, d in zip(expected, got, eager, compiled, strict=True):
        assert torch.equal(bits(a), bits(b))
        assert torch.equal(bits(c), bits(d))
