"""One call of every op on small CUDA inputs, for tests of how the ops run rather than of what they
compute."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch

from spec_rollout import ops
from spec_rollout.acceptance import Coupled, Lenient, OneHot
from spec_rollout.packed import cu_lens_from

Outputs = tuple[torch.Tensor, ...]

NATIVE = [
    "token_logprobs",
    "sample_tokens",
    "sample_tokens, filtered",
    "accept_prefix, packed",
    "accept_prefix, padded",
    "verify_prefix, lenient",
    "verify_prefix, coupled, filtered",
    "verify_prefix, one-hot, per row",
    "splice_kv, to rows",
    "splice_kv, in place",
    "splice_kv, to blocks",
    "assemble",
]
TRITON = ["token_logprobs, triton", "verify_prefix, triton"]
NAMES = NATIVE + (TRITON if importlib.util.find_spec("triton") else [])


def make_call(name: str, device: str = "cuda", vocab: int = 1003) -> Callable[[], Outputs]:
    """A call of op `name` on inputs that are made here, once; each call returns all that the op
    writes.

    Inputs are made on the CPU and copied: initcheck sees copies, but not what torch's own kernels
    write, as only this project's are checked.
    """
    generator = torch.Generator().manual_seed(3)
    lens = torch.tensor([5, 0, 17, 1, 9])
    batch, tokens = len(lens), int(lens.sum())
    rows = tokens + batch
    logits = (torch.randn(rows, vocab, generator=generator) * 2).bfloat16().to(device)
    keys = torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator).to(device)
    row_keys = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator).to(device)
    positions = torch.arange(rows).to(device)
    ids = torch.randint(0, vocab, (rows,), generator=generator).to(device)
    cu = cu_lens_from(lens).to(device)
    target = -torch.rand(tokens, generator=generator)
    draft = target - 0.1 * torch.randn(tokens, generator=generator)
    target, draft = target.to(device), draft.to(device)
    padded = -torch.rand(batch, 20, generator=generator)
    padded, padded_target = padded.to(device), (padded - 0.05).to(device)
    drafts = {"keys": keys, "draft_logprobs": draft}
    per_row = {
        "temperature": torch.tensor([0.0, 1.0, 0.7, 1.3, 0.0], device=device),
        "top_k": torch.tensor([0, 5, 0, 50, 3], device=device),
    }
    caches = [
        torch.randn(6, 2, 24, 16, generator=generator).bfloat16().to(device) for _ in range(4)
    ]
    other = [torch.zeros(cache.shape, dtype=cache.dtype).to(device) for cache in caches]
    blocks = [torch.zeros(36, 4, 2, 16, dtype=torch.bfloat16).to(device) for _ in range(4)]
    table = torch.randperm(36, generator=generator).view(6, 6).to(device)
    index = torch.arange(batch).to(device)
    starts = torch.tensor([0, 3, 2, 0, 1], device=device)
    ranges = {
        "src_rows": index, "src_starts": starts, "dst_rows": index, "dst_starts": torch.full((batch,), 2).to(device),
        "lens": lens.to(device),
    }  # fmt: skip
    split = {"layout": "split", "max_prompt_len": 20, "max_response_len": 20}
    prompts = torch.randint(0, vocab, (tokens,), generator=generator).to(device)

    def verify(rule, **more) -> Outputs:
        return ops.verify_prefix(logits, ids[:tokens], cu, rule=rule, **drafts, **more)

    def splice(src, dst, **more) -> Outputs:
        ops.splice_kv(src, dst, **ranges, **more)
        return tuple(dst)

    lens_on_device = lens.to(device)

    def assembled() -> Outputs:
        result = ops.assemble(prompts, cu, ids[:tokens], cu, lens_on_device, **split)
        return tuple(value for value in result if value is not None)

    def accept(**more) -> Outputs:
        return (ops.accept_prefix(rule=Lenient(0.0), keys=keys, **more),)

    calls: dict[str, Callable[[], Outputs]] = {
        "token_logprobs": lambda: (ops.token_logprobs(logits, ids),),
        "sample_tokens": lambda: ops.sample_tokens(logits, keys=row_keys, positions=positions),
        "sample_tokens, filtered": lambda: ops.sample_tokens(
            logits, keys=row_keys, positions=positions, top_k=20, top_p=0.9
        ),
        "accept_prefix, packed": lambda: accept(
            draft_logprobs=draft, target_logprobs=target, cu_draft_lens=cu
        ),
        "accept_prefix, padded": lambda: accept(
            draft_logprobs=padded, target_logprobs=padded_target, draft_lens=lens_on_device
        ),
        "verify_prefix, lenient": lambda: verify(Lenient(0.5)),
        "verify_prefix, coupled, filtered": lambda: verify(Coupled(), top_p=0.9),
        "verify_prefix, one-hot, per row": lambda: verify(OneHot(), **per_row),
        "splice_kv, to rows": lambda: splice(caches, other),
        "splice_kv, in place": lambda: splice(caches, caches),
        "splice_kv, to blocks": lambda: splice(caches, blocks, dst_block_table=table),
        "assemble": assembled,
        "token_logprobs, triton": lambda: (ops.token_logprobs(logits, ids, impl="triton"),),
        "verify_prefix, triton": lambda: verify(Lenient(0.5), impl="triton"),
    }
    return calls[name]
