"""token_logprobs, verify_prefix and sample_tokens against plain torch on the same job, CPU,
bfloat16 [256, 151936].

`bytes_moved` is one read of the logits rows that the job needs. The logits are normal with standard
deviation 3: flatter than a language model's, so that few tokens can be ruled out without their
noise.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _common import Results, measure, parser, peak_extra_bytes

from spec_rollout import ops
from spec_rollout.acceptance import AcceptanceRule, Coupled, Lenient, OneHot
from spec_rollout.ops.reference import logits as reference

DRAFT_LEN = 15  # and a bonus row: 16 logits rows a draft


def torch_logprobs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.float(), -1).gather(-1, ids[:, None])[:, 0]


def torch_logsumexp(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    x = logits.float()
    return x.gather(-1, ids[:, None])[:, 0] - x.logsumexp(-1)


def torch_sample(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw by exponential race (as vLLM does), and the log-prob of what was drawn."""
    logp = torch.log_softmax(logits.float(), -1)
    ids = (logp.exp() / torch.empty_like(logp).exponential_()).argmax(-1)
    return ids, logp.gather(-1, ids[:, None])[:, 0]


def torch_sample_top_p(logits: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    x, order = logits.float().sort(dim=-1, descending=True)
    probs = x.softmax(-1)
    x[probs.cumsum(-1) - probs >= top_p] = -torch.inf
    picked, logprobs = torch_sample(x)
    return order.gather(-1, picked[:, None])[:, 0], logprobs


def torch_verify(logits: torch.Tensor, drafts: torch.Tensor, draft_logprobs: torch.Tensor) -> tuple:
    """Lenient at 0, all rows the same length: [batch, DRAFT_LEN] drafts."""
    batch = drafts.shape[0]
    logp = torch.log_softmax(logits.float(), -1).view(batch, DRAFT_LEN + 1, -1)
    p = logp[:, :-1].gather(-1, drafts[..., None])[..., 0]
    accept = torch.rand_like(p).log() <= p - draft_logprobs
    n = accept.long().cumprod(1).sum(1)
    next_logp = logp[torch.arange(batch), n]
    ids = (next_logp.exp() / torch.empty_like(next_logp).exponential_()).argmax(-1)
    return n, ids, p, next_logp.gather(-1, ids[:, None])


def torch_verify_coupled(logits: torch.Tensor, drafts: torch.Tensor) -> tuple:
    """Every position's argmax under noise; the noise is torch's, not keyed."""
    batch = drafts.shape[0]
    ids, logprobs = torch_sample(logits)
    ids = ids.view(batch, DRAFT_LEN + 1)
    n = (ids[:, :-1] == drafts).long().cumprod(1).sum(1)
    return n, ids.gather(1, n[:, None]), logprobs


def check(
    logits: torch.Tensor, ids: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor
) -> None:
    """A benchmark of wrong results is worth nothing."""
    few = slice(0, 4)
    truth = reference.token_logprobs(logits[few], ids[few])
    torch.testing.assert_close(
        ops.token_logprobs(logits[few], ids[few]).double(), truth, atol=5e-6, rtol=0
    )
    args = {"keys": keys[few], "positions": positions[few], "top_p": 0.9}
    got, expected = (
        ops.sample_tokens(logits[few], **args),
        reference.sample_tokens(logits[few], **args),
    )
    assert torch.equal(got.token_ids, expected[0])


def main() -> None:
    args = parser(__doc__).parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    rows, vocab = (32, 20_000) if args.quick else (256, 151_936)
    repeats, peer_repeats = (2, 1) if args.quick else (15, 5)
    results = Results("ops_logits", args.out)
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(rows, vocab, generator=generator) * 3).bfloat16()
    ids = torch.randint(0, vocab, (rows,), generator=generator)
    keys = torch.arange(rows)
    positions = torch.arange(rows) % (DRAFT_LEN + 1)
    check(logits, ids, keys, positions)
    shape = {"rows": rows, "vocab": vocab}

    def bench(
        op: str, ours: Callable[[], object], peers: dict[str, Callable[[], object]], **more: object
    ) -> None:
        extra = peak_extra_bytes(ours)
        results.add(
            op,
            shape=shape,
            dtype="bfloat16",
            timing=measure(ours, repeats=repeats),
            bytes_moved=more.pop("rows_read", rows) * vocab * 2,
            peak_extra=extra,
            peak_extra_share_of_logits=None if extra is None else round(extra / logits.nbytes, 5),
            peers={n: measure(f, repeats=peer_repeats, warmup=1) for n, f in peers.items()},
            **more,
        )

    bench(
        "token_logprobs",
        lambda: ops.token_logprobs(logits, ids),
        {
            "log_softmax_gather": lambda: torch_logprobs(logits, ids),
            "logsumexp_gather": lambda: torch_logsumexp(logits, ids),
        },
    )

    sample_args = {"keys": keys, "positions": positions}
    bench(
        "sample_tokens",
        lambda: ops.sample_tokens(logits, **sample_args),
        {"softmax_exponential_argmax": lambda: torch_sample(logits)},
    )
    bench(
        "sample_tokens, top_k 50",
        lambda: ops.sample_tokens(logits, top_k=50, **sample_args),
        {},
    )
    bench(
        "sample_tokens, top_p 0.95",
        lambda: ops.sample_tokens(logits, top_p=0.95, **sample_args),
        {} if args.quick else {"sort_softmax_argmax": lambda: torch_sample_top_p(logits, 0.95)},
    )

    # Drafts that plain sampling gave, so everything is accepted and all rows are needed; then
    # drafts of which the first token is rejected, so one row in 16 is.
    batch = rows // (DRAFT_LEN + 1)
    row_keys = keys[:batch].contiguous()
    good = ops.sample_tokens(
        logits, keys=row_keys.repeat_interleave(DRAFT_LEN + 1), positions=positions
    )
    drafts = good.token_ids.view(batch, -1)[:, :DRAFT_LEN].long().contiguous()
    old = good.logprobs.view(batch, -1)[:, :DRAFT_LEN].contiguous()
    cu = torch.arange(batch + 1) * DRAFT_LEN
    cases: list[tuple[str, AcceptanceRule, dict[str, Callable[[], object]]]] = [
        ("lenient", Lenient(0.0), {"log_softmax": lambda: torch_verify(logits, drafts, old)}),
        (
            "coupled",
            Coupled(),
            {"softmax_exponential_argmax": lambda: torch_verify_coupled(logits, drafts)},
        ),
    ]
    for name, rule, peers in cases:
        for outcome, draft_ids in (("accepted", drafts), ("rejected", (drafts + 1) % vocab)):
            flat = draft_ids.reshape(-1)
            # A rejected draft also claims to have been certain.
            draft_logprobs = old.reshape(-1) if outcome == "accepted" else torch.zeros(flat.numel())

            def ours(
                rule: AcceptanceRule = rule,
                flat: torch.Tensor = flat,
                draft_logprobs: torch.Tensor = draft_logprobs,
            ) -> ops.VerifyResult:
                return ops.verify_prefix(
                    logits, flat, cu, rule=rule, keys=row_keys, draft_logprobs=draft_logprobs
                )

            accepted = int(ours().accepted_lens.sum())
            assert accepted == (drafts.numel() if outcome == "accepted" else 0), accepted
            bench(
                f"verify_prefix, {name}, {outcome}",
                ours,
                peers,
                rows_read=rows if outcome == "accepted" else batch,
            )
    one_hot = OneHot()
    bench(
        "verify_prefix, one-hot",
        lambda: ops.verify_prefix(logits, drafts.reshape(-1), cu, rule=one_hot, keys=row_keys),
        {},
        rows_read=int(
            ops.verify_prefix(logits, drafts.reshape(-1), cu, rule=one_hot, keys=row_keys)
            .accepted_lens.clamp(max=DRAFT_LEN)
            .sum()
        )
        + batch,
    )
    results.write()


if __name__ == "__main__":
    main()
