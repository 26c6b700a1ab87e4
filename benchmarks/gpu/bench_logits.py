"""token_logprobs, verify_prefix and sample_tokens on a GPU, against what one would call instead.

`bytes_moved` is one read of the logits rows that the job needs. Logits are normal with standard
deviation 3, bfloat16 unless said otherwise: flatter than a language model's, so that few tokens can
be ruled out without their noise.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from _gpu import Bench, Results, bench_of, finish, options, peers
from _peers import (
    close,
    compiled,
    draft_distribution,
    flashinfer_chain,
    liger_logprobs,
    quack_logprobs,
    torch_log_softmax,
    torch_logsumexp,
    torch_sample,
    torch_verify,
    vllm_logprobs,
    vllm_rejection,
)

from spec_rollout import ops
from spec_rollout.acceptance import Coupled, Lenient
from spec_rollout.ops.reference import logits as reference

DRAFT_LEN = 15  # and a bonus row: 16 logits rows a draft
ROWS = (1, 16, 256, 4096, 65_536)
VOCABS = (32_000, 128_256, 151_936)
CHECKED_ROWS = 64


def sizes(bench: Bench, short: bool) -> Iterator[tuple[int, int, torch.dtype]]:
    if bench.dry:
        yield from ((1, 40, torch.bfloat16), (32, 40, torch.float32))
        return
    for vocab in VOCABS:
        for rows in ROWS:
            if not short or rows == 4096 or vocab == VOCABS[-1]:
                yield rows, vocab, torch.bfloat16
    for dtype in (torch.float16, torch.float32):
        yield 4096, 151_936, dtype


def triton_is_usable(bench: Bench) -> None:
    """ImportError where triton cannot run: without it, or on the CPU, where it would be
    interpreted."""
    import triton  # noqa: F401

    if bench.dry:
        raise ImportError("triton kernels are not run on the CPU here")


def bench_token_logprobs(
    bench: Bench, results: Results, logits: torch.Tensor, ids: torch.Tensor
) -> None:
    few = slice(0, CHECKED_ROWS)
    truth = reference.token_logprobs(logits[few].cpu(), ids[few].cpu()).to(bench.device)
    close(ops.token_logprobs(logits, ids)[few], truth, 5e-6)
    dense = 2 * logits.numel() * 4  # a float32 copy and a result of its size

    def plain(function):
        close(function(logits, ids)[few], truth, 1e-4)
        return lambda: function(logits, ids)

    def triton():
        triton_is_usable(bench)
        close(ops.token_logprobs(logits, ids, impl="triton")[few], truth, 5e-6)
        return lambda: ops.token_logprobs(logits, ids, impl="triton")

    timings, absent = peers(
        bench,
        {
            "torch log_softmax": (dense, lambda: plain(torch_log_softmax)),
            "torch logsumexp": (dense, lambda: plain(torch_logsumexp)),
            "torch.compile": (dense, lambda: plain(compiled(torch_logsumexp, bench.dry))),
            "our triton": (0, triton),
            "vllm": (0, lambda: vllm_logprobs(logits, ids, truth)),
            "liger": (logits.nbytes, lambda: liger_logprobs(logits, ids, truth)),
            "quack": (0, lambda: quack_logprobs(logits, ids, truth)),
        },
    )
    results.add(
        "token_logprobs",
        shape={"rows": logits.shape[0], "vocab": logits.shape[1]},
        dtype=str(logits.dtype).removeprefix("torch."),
        timing=bench.time(lambda: ops.token_logprobs(logits, ids)),
        bytes_moved=logits.nbytes + 12 * logits.shape[0],
        peers=timings,
        absent=absent,
    )


def bench_sample_tokens(
    bench: Bench,
    results: Results,
    logits: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    few = min(4, logits.shape[0])

    def compiled_sample():
        function = compiled(torch_sample, bench.dry)
        return lambda: function(logits)

    filters = {"": {}, ", top_k 50": {"top_k": 50}, ", top_p 0.95": {"top_p": 0.95}}
    for name, sampling in filters.items():
        args = {"keys": keys, "positions": positions, **sampling}
        got = ops.sample_tokens(logits, **args)
        expected = reference.sample_tokens(
            logits[:few].cpu(), keys=keys[:few].cpu(), positions=positions[:few].cpu(), **sampling
        )
        assert torch.equal(got.token_ids[:few].cpu(), expected[0]), "drew other tokens"
        table = {}
        if not sampling:
            dense = 4 * logits.numel() * 4
            table = {
                "torch": (dense, lambda: lambda: torch_sample(logits)),
                "torch.compile": (dense, compiled_sample),
            }
        timings, absent = peers(bench, table)
        results.add(
            f"sample_tokens{name}",
            shape={"rows": logits.shape[0], "vocab": logits.shape[1]},
            dtype=str(logits.dtype).removeprefix("torch."),
            timing=bench.time(lambda args=args: ops.sample_tokens(logits, **args)),
            bytes_moved=logits.nbytes,
            peers=timings,
            absent=absent,
        )


def bench_verify_prefix(
    bench: Bench, results: Results, logits: torch.Tensor, keys: torch.Tensor
) -> None:
    device = bench.device
    rows, vocab = logits.shape
    length = min(DRAFT_LEN, rows - 1)
    batch = rows // (length + 1)
    keys = keys[:batch].contiguous()
    positions = torch.arange(length + 1, device=device).repeat(batch)
    drawn = ops.sample_tokens(
        logits, keys=keys.repeat_interleave(length + 1), positions=positions
    ).token_ids.view(batch, -1)[:, :length]
    unlikely = logits.view(batch, length + 1, vocab)[:, :length].argmin(-1)
    cu = torch.arange(batch + 1, device=device) * length
    for acceptance in (0.0, 0.5, 1.0) if length else (1.0,):
        accepted = int(acceptance * length)
        drafts = torch.where(
            torch.arange(length, device=device) < accepted, drawn.long(), unlikely.long()
        ).contiguous()
        flat = drafts.reshape(-1)
        # As the draft's policy would have it: equal to the target's, and certain of what will be
        # rejected.
        old = ops.token_logprobs(
            logits.view(batch, length + 1, vocab)[:, :length].reshape(-1, vocab), flat
        ).view(batch, length)
        old[:, accepted:] = 0.0
        for rule in (Lenient(0.0), Coupled()):
            args = {"rule": rule, "keys": keys, "draft_logprobs": old.reshape(-1)}

            def ours(impl="native", args=args, flat=flat):
                return ops.verify_prefix(logits, flat, cu, impl=impl, **args)

            got = ours()
            assert bool((got.accepted_lens == accepted).all()), "accepted other lengths"

            def triton(ours=ours, got=got):
                triton_is_usable(bench)
                other = ours("triton")
                assert torch.equal(other.accepted_lens, got.accepted_lens)
                assert torch.equal(other.next_token_ids, got.next_token_ids)
                return lambda: ours("triton")

            table = {"our triton": (0, triton)}
            if length and isinstance(rule, Lenient):
                dense = 4 * logits.numel() * 4

                def plain(function, drafts=drafts, old=old, accepted=accepted):
                    assert bool((function(logits, drafts, old)[0] == accepted).all())
                    return lambda: function(logits, drafts, old)

                table |= {
                    "torch": (dense, lambda plain=plain: plain(torch_verify)),
                    "torch.compile": (
                        dense,
                        lambda plain=plain: plain(compiled(torch_verify, bench.dry)),
                    ),
                    "vllm stock": (
                        dense,
                        lambda d=drafts, a=accepted: vllm_rejection(logits, d, a),
                    ),
                    "flashinfer": (
                        dense,
                        lambda d=drafts, a=accepted: flashinfer_chain(logits, d, a),
                    ),
                }
            timings, absent = peers(bench, table)
            results.add(
                f"verify_prefix, {type(rule).__name__.lower()}",
                shape={"rows": rows, "vocab": vocab, "accepted": f"{acceptance:.0%}"},
                dtype=str(logits.dtype).removeprefix("torch."),
                timing=bench.time(ours),
                bytes_moved=batch * (accepted + 1) * vocab * logits.element_size(),
                peers=timings,
                absent=absent,
            )


def main() -> None:
    parser = options(__doc__)
    parser.add_argument(
        "--short",
        action="store_true",
        help="of the smaller vocabularies, 4,096 rows only",
    )
    args = parser.parse_args()
    started = time.perf_counter()
    bench = bench_of(args)
    results = bench.results("gpu_logits")
    generator = torch.Generator(device=bench.device).manual_seed(0)
    for rows, vocab, dtype in sizes(bench, args.short):
        logits = torch.empty(rows, vocab, dtype=dtype, device=bench.device)
        logits.normal_(0.0, 3.0, generator=generator)
        ids = torch.randint(0, vocab, (rows,), generator=generator, device=bench.device)
        keys = torch.arange(rows, device=bench.device) * 7919
        bench_token_logprobs(bench, results, logits, ids)
        bench_verify_prefix(bench, results, logits, keys)
        if dtype == torch.bfloat16 and (rows in (256, 4096) or bench.dry):
            bench_sample_tokens(bench, results, logits, keys, ids)
        del logits
    if bench.dry:  # the peers' inputs, which no package here may use
        logits = torch.randn(32, 40)
        draft, target = draft_distribution(logits, torch.zeros(2, 15, dtype=torch.int64), 7)
        assert draft.shape == (2, 15, 40)
        assert target.shape == (2, 16, 40)
    finish(bench, results, started)


if __name__ == "__main__":
    main()
