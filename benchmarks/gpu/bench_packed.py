"""accept_prefix, splice_kv, assemble and the cost of a call, on a GPU.

- accept_prefix: one step's 8,192 drafts of up to 4,096 tokens, packed, against padded torch.
- splice_kv: accepted prefixes of a slot cache to another one, 1 GiB read and written, against slice
  copies per row and `index_select` of whole rows; the same to a paged cache, against indexing by
  slot.
- assemble: contexts and the trainer's final tensors of that step, into buffers that exist.
- calls: host microseconds of each op on an empty batch.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path

import torch
from _gpu import Bench, Results, bench_of, finish, options, peers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ops"))

from _workload import PADDED_LEN, PROMPT_WIDTH, Workload, long_tailed_lens, make_workload, pad
from bench_accept_prefix import check, padded_argmax, padded_cumprod

from spec_rollout import ops
from spec_rollout.acceptance import Coupled, Lenient

LAYERS, HEADS, HEAD_DIM, POSITIONS, BLOCK_SIZE = 4, 8, 128, 4096, 16


def to_device(work: Workload, device: str) -> Workload:
    moved = {
        field.name: value.to(device)
        for field in dataclasses.fields(work)
        if isinstance(value := getattr(work, field.name), torch.Tensor)
    }
    return dataclasses.replace(work, **moved)


def bench_accept_prefix(
    bench: Bench, results: Results, host: Workload, work: Workload
) -> torch.Tensor:
    def ours() -> torch.Tensor:
        return ops.accept_prefix(
            work.draft_logprobs,
            work.target_logprobs,
            rule=Lenient(0.0),
            keys=work.keys,
            cu_draft_lens=work.cu_draft_lens,
        )

    accepted = ours()
    check(host, accepted.cpu())
    mask = torch.arange(PADDED_LEN)[None, :] < host.draft_lens[:, None]
    padded = (
        pad(host.draft_logprobs, host.draft_lens, PADDED_LEN).to(bench.device),
        pad(host.target_logprobs, host.draft_lens, PADDED_LEN).to(bench.device),
        mask.to(bench.device),
        0.0,
    )
    uniforms = torch.rand_like(padded[0])
    assert torch.equal(padded_argmax(*padded, uniforms), padded_cumprod(*padded, uniforms))
    del uniforms
    timings, absent = peers(
        bench,
        {
            "padded torch, argmax": (0, lambda: lambda: padded_argmax(*padded)),
            "padded torch, cumprod": (0, lambda: lambda: padded_cumprod(*padded)),
        },
    )
    results.add(
        "accept_prefix, packed",
        shape={"batch": work.batch, "draft tokens": work.draft_ids.numel()},
        dtype="float32",
        timing=bench.time(ours),
        bytes_moved=8 * (int(accepted.sum()) + work.batch) + 20 * work.batch,
        peers=timings,
        absent=absent,
    )
    return accepted


def bench_splice_kv(bench: Bench, results: Results) -> None:
    device = bench.device
    rows, positions = (3, 64) if bench.dry else (96, POSITIONS)
    generator = torch.Generator().manual_seed(0)
    shape = (rows, HEADS, positions, HEAD_DIM)
    src = [torch.empty(shape, device=device).normal_().bfloat16() for _ in range(2 * LAYERS)]
    dst = [torch.zeros_like(cache) for cache in src]
    token_bytes = 2 * LAYERS * HEADS * HEAD_DIM * 2
    # Long-tailed lengths that come to 1 GiB, so that 2 GiB pass through memory.
    mean = min(positions / 3, (1 << 30) / token_bytes / rows)
    host_lens = long_tailed_lens(rows, mean, positions, generator)
    host_order = torch.randperm(rows, generator=generator)
    lens, order = host_lens.to(device), host_order.to(device)
    index = torch.arange(rows, device=device)
    zero = torch.zeros_like(index)
    ranges = {
        "src_rows": order, "src_starts": zero, "dst_rows": index, "dst_starts": zero, "lens": lens,
    }  # fmt: skip
    pairs = list(zip(host_order.tolist(), host_lens.tolist(), strict=True))

    def add(name, ours, table) -> None:
        timings, absent = peers(bench, table)
        results.add(
            name,
            shape={"caches": 2 * LAYERS, "rows": rows, "tokens": int(host_lens.sum())},
            dtype="bfloat16",
            timing=bench.time(ours),
            bytes_moved=2 * int(host_lens.sum()) * token_bytes,
            peers=timings,
            absent=absent,
        )

    def slices() -> None:
        for source, target in zip(src, dst, strict=True):
            for row, (from_row, length) in enumerate(pairs):
                target[row, :, :length] = source[from_row, :, :length]

    def ragged() -> None:
        ops.splice_kv(src, dst, **ranges)

    slices()
    expected = [cache.clone() for cache in dst]
    for cache in dst:
        cache.zero_()
    ragged()
    assert all(torch.equal(a, b) for a, b in zip(dst, expected, strict=True))
    del expected
    add(
        "splice_kv, rows to rows",
        ragged,
        {
            "slice copies": (0, lambda: slices),
            "index_select": (
                sum(cache.nbytes for cache in src),
                lambda: lambda: [cache.index_select(0, order) for cache in src],
            ),
        },
    )

    table = torch.randperm(rows * positions // BLOCK_SIZE, generator=generator).to(device)
    table = table.reshape(rows, -1)
    paged_shape = (table.numel(), BLOCK_SIZE, HEADS, HEAD_DIM)
    blocks = [torch.zeros(paged_shape, dtype=torch.bfloat16, device=device) for _ in src]
    position = torch.arange(positions, device=device)[None, :].expand(rows, -1)
    kept = position < lens[:, None]
    slots = (table.repeat_interleave(BLOCK_SIZE, dim=1) * BLOCK_SIZE + position % BLOCK_SIZE)[kept]
    source_rows, source_positions = order[:, None].expand_as(kept)[kept], position[kept]

    def indexed() -> None:
        for source, target in zip(src, blocks, strict=True):
            target.view(-1, HEADS, HEAD_DIM)[slots] = source[source_rows, :, source_positions]

    def to_blocks() -> None:
        ops.splice_kv(src, blocks, **ranges, dst_block_table=table)

    indexed()
    expected = [cache.clone() for cache in blocks]
    for cache in blocks:
        cache.zero_()
    to_blocks()
    assert all(torch.equal(a, b) for a, b in zip(blocks, expected, strict=True))
    add("splice_kv, rows to blocks", to_blocks, {"indexing by slot": (0, lambda: indexed)})


def bench_assemble(bench: Bench, results: Results, work: Workload, accepted: torch.Tensor) -> None:
    prompts = {
        "prompt_ids": work.prompt_ids,
        "cu_prompt_lens": work.cu_prompt_lens,
        "prefix_ids": work.draft_ids,
        "cu_prefix_lens": work.cu_draft_lens,
        "accepted_lens": accepted,
        "prefix_logprobs": work.target_logprobs,
    }
    limits = {"max_prompt_len": PROMPT_WIDTH, "max_response_len": PADDED_LEN}
    out = ops.assemble(**prompts, layout="split", **limits)
    row = work.batch - 1
    first, last = work.cu_draft_lens[row], work.cu_draft_lens[row] + accepted[row]
    response = out.input_ids[row, PROMPT_WIDTH : PROMPT_WIDTH + int(accepted[row])]
    assert torch.equal(response, work.draft_ids[int(first) : int(last)].long())
    cells = out.input_ids.numel()
    used = int(work.cu_prompt_lens[-1]) + int(accepted.sum())
    results.add(
        "assemble, split, into out",
        shape={"batch": work.batch, "tokens": used},
        dtype="int32 to int64",
        timing=bench.time(lambda: ops.assemble(**prompts, layout="split", **limits, out=out)),
        # Ids and log-probs of the tokens; ids, positions, two masks and log-probs of all cells.
        bytes_moved=8 * used + (8 + 8 + 1 + 1 + 4) * cells,
    )


def bench_calls(bench: Bench, results: Results) -> None:
    device = bench.device
    floats, ids = torch.empty(0, device=device), torch.empty(0, dtype=torch.int64, device=device)
    logits, cu = torch.empty(0, 1000, device=device), torch.zeros(1, dtype=torch.int64).to(device)
    caches = [torch.zeros(1, 1, 1, 8, device=device) for _ in range(2)]
    ranges = dict.fromkeys(("src_rows", "src_starts", "dst_rows", "dst_starts", "lens"), ids)
    limits = {"layout": "split", "max_prompt_len": 8, "max_response_len": 8}
    lenient, coupled = Lenient(0.5), Coupled()
    out = ops.assemble(ids, cu, ids, cu, ids, **limits)
    for name, call in {
        "token_logprobs": lambda: ops.token_logprobs(logits, ids),
        "accept_prefix": lambda: ops.accept_prefix(
            floats, floats, rule=lenient, keys=ids, cu_draft_lens=cu
        ),
        "verify_prefix": lambda: ops.verify_prefix(logits, ids, cu, rule=coupled, keys=ids),
        "sample_tokens": lambda: ops.sample_tokens(logits, keys=ids, positions=ids),
        "splice_kv, 2 caches": lambda: ops.splice_kv(caches, caches, **ranges),
        "assemble, split": lambda: ops.assemble(ids, cu, ids, cu, ids, **limits),
        "assemble, split, into out": lambda: ops.assemble(ids, cu, ids, cu, ids, **limits, out=out),
        "torch.add (for scale)": lambda: torch.add(floats, floats),
    }.items():
        results.add(f"call of {name}, empty batch", timing=bench.overhead(call))


def main() -> None:
    args = options(__doc__).parse_args()
    started = time.perf_counter()
    bench = bench_of(args)
    results = bench.results("gpu_packed")
    host = make_workload(64 if bench.dry else 8192)
    work = to_device(host, bench.device)
    accepted = bench_accept_prefix(bench, results, host, work)
    bench_assemble(bench, results, work, accepted)
    bench_splice_kv(bench, results)
    finish(bench, results, started)
    started = time.perf_counter()
    calls = bench.results("gpu_calls")
    bench_calls(bench, calls)
    finish(bench, calls, started)


if __name__ == "__main__":
    main()
