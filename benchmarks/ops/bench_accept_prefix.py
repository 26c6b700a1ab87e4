"""accept_prefix against the same decision in padded torch, and its cost as a function of how much
is accepted.

The peers are what a trainer does with right-padded [batch, 4096] tensors: uniforms for every cell,
a mask, and the first rejection of each row by `argmax` (as the published implementation finds it)
or by `cumprod`. They draw other uniforms, so they cannot agree token for token: the peers are
checked against each other on equal uniforms, the op against its reference on part of the rows.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _common import Results, measure, parser, peak_extra_bytes
from _workload import PADDED_LEN, Workload, make_workload, pad

from spec_rollout import ops
from spec_rollout.acceptance import Lenient
from spec_rollout.ops.reference import accept_prefix as reference


def padded_argmax(draft, target, mask, log_lenience, uniforms=None):
    """Uniforms of all cells, then the first rejected token; rows without one keep all."""
    log_u = (torch.rand_like(target) if uniforms is None else uniforms.clone()).log_()
    log_ratio = (target - draft).masked_fill_(~mask, 0.0) + log_lenience
    rejected = mask & ~((log_ratio >= 0) | (log_u <= log_ratio))
    lens = mask.sum(dim=1)
    first = rejected.to(torch.int8).argmax(dim=1)
    return torch.where(rejected.any(dim=1), first, lens)


def padded_cumprod(draft, target, mask, log_lenience, uniforms=None):
    """Uniforms of all cells, then the sum of the running product of the decisions."""
    log_u = (torch.rand_like(target) if uniforms is None else uniforms.clone()).log_()
    accepted = (log_u <= target - draft + log_lenience) & mask
    return accepted.to(torch.int32).cumprod(dim=1).sum(dim=1)


def check(work: Workload, accepted: torch.Tensor, rows: int = 64) -> None:
    """The op against its reference on the first rows; a difference must be a near-tie in the last
    float32 digit."""
    lens = work.draft_lens[:rows]
    count = int(work.cu_draft_lens[rows])
    width = int(lens.max())
    expected = reference.accept_prefix(
        pad(work.draft_logprobs[:count], lens, width),
        pad(work.target_logprobs[:count], lens, width),
        lens,
        rule=Lenient(0.0),
        keys=work.keys[:rows],
    )
    wrong = (accepted[:rows] != expected).sum().item()
    assert wrong <= rows // 32, f"{wrong} of {rows} rows differ from the reference"


def bytes_of(num_accepted: int, batch: int, log_lenience: float) -> int:
    """Read and written at least: lens, keys and offsets, and two log-probs of each accepted token
    and of the one that is rejected. A rule that keeps all reads the target's only, to refuse NaN.
    """
    rows = 20 * batch
    if not Lenient(log_lenience).needs_draft_logprobs:
        return 4 * num_accepted + rows
    return 8 * (num_accepted + batch) + rows


def main() -> None:
    args = parser(__doc__).parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    batch = 256 if args.quick else 8192
    repeats = 3 if args.quick else 15
    results = Results("ops_accept_prefix", args.out)
    work = make_workload(batch)
    mask = torch.arange(PADDED_LEN)[None, :] < work.draft_lens[:, None]
    draft = pad(work.draft_logprobs, work.draft_lens, PADDED_LEN)
    target = pad(work.target_logprobs, work.draft_lens, PADDED_LEN)
    uniforms = torch.rand(64, PADDED_LEN)
    small = (draft[:64], target[:64], mask[:64], 0.0, uniforms)
    assert torch.equal(padded_argmax(*small), padded_cumprod(*small))

    def packed(log_lenience: float) -> torch.Tensor:
        return ops.accept_prefix(
            work.draft_logprobs,
            work.target_logprobs,
            rule=Lenient(log_lenience),
            keys=work.keys,
            cu_draft_lens=work.cu_draft_lens,
        )

    def padded() -> torch.Tensor:
        return ops.accept_prefix(
            draft, target, rule=Lenient(0.0), keys=work.keys, draft_lens=work.draft_lens
        )

    accepted = packed(0.0)
    check(work, accepted)
    assert torch.equal(accepted, padded())
    peers = {
        "padded torch, argmax": measure(
            lambda: padded_argmax(draft, target, mask, 0.0), repeats=max(3, repeats // 3)
        ),
        "padded torch, cumprod": measure(
            lambda: padded_cumprod(draft, target, mask, 0.0), repeats=max(3, repeats // 3)
        ),
    }

    def add(
        name: str, function, accepted: torch.Tensor, peers=None, log_lenience: float = 0.0
    ) -> None:
        num_accepted = int(accepted.sum())
        kept = (accepted == work.draft_lens).float().mean().item()
        results.add(
            name,
            shape={"batch": batch, "draft tokens": int(work.draft_lens.sum())},
            dtype="float32",
            timing=measure(function, repeats=repeats, warmup=3),
            bytes_moved=bytes_of(num_accepted, batch, log_lenience),
            peak_extra=peak_extra_bytes(function),
            peers=peers,
            accepted_tokens=num_accepted,
            accepted_fraction=round(num_accepted / int(work.draft_lens.sum()), 4),
            rows_to_regenerate=round(1 - kept, 4),
        )

    add("accept_prefix, packed", lambda: packed(0.0), accepted, peers)
    add("accept_prefix, padded", padded, accepted, peers)
    for log_lenience in (-0.005, 0.005, float("inf")):
        name = f"accept_prefix, log_lenience {log_lenience}"
        accepted = packed(log_lenience)
        add(name, lambda value=log_lenience: packed(value), accepted, log_lenience=log_lenience)
    results.write()


if __name__ == "__main__":
    main()
