"""What reuse saves: one rollout step by share of accepted draft tokens, strategy by strategy.

    python benchmarks/bench_rollout.py --engine vllm

`--table drafting` measures prefix reuse, history drafting and both instead (rollout_drafting.py
says how).

A CPU core computes a further token of a step for a third to a half of what decoding one costs, a
GPU for far less. What a GPU does can still be told on a CPU by a model of which a step costs much
whatever is in it: many layers, narrow ones, and a vocabulary large for its width (`--shape thin`,
the default). `small` and `tiny` are bound by the processor's arithmetic and by vLLM's own
scheduling.

All strategies produce the same responses, token for token (checked; in 16 bits the share is
reported): the drafts are the responses themselves, and each is rejected at a prescribed token by
the log-probability it comes with (`Lenient`), whereupon the keyed noise draws the same token again.
Response lengths are log-normal: half are short, a few reach the limit.

| strategy | does |
|---|---|
| stock | vLLM without the plugin and without log-probs |
| stock+logprobs | the same, with log-probs of the drawn tokens |
| no key | the requests of stock, in vLLM with the plugin; same tokens (checked with seeds) |
| vanilla | vLLM with the plugin, no drafts |
| two_pass | the draft scored as a prompt, cut, resubmitted (the published design) |
| inflight | the draft verified while the KV cache is written |
| floor | continuations alone, the KV cache of prompt and accepted prefix given for free |

Every timed run starts with an empty prefix cache (floor: with one that holds just what it needs).
The runs of all strategies and shares are interleaved. `seconds` are quantiles; `peers` compares
medians, `paired` is the median of the quotients within a round, for wall time and for the process's
own processor time (`cpu`), which a busy machine does not stretch as it does wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np
import rollout_drafting
import torch
from _common import Results, Timing, parser

from spec_rollout.acceptance import Lenient
from spec_rollout.engines.vllm import VLLMEngine
from spec_rollout.engines.vllm.client.requests import Job
from spec_rollout.packed import cu_lens_from
from spec_rollout.types import Drafts, RolloutRequests, Rollouts, SamplingParams

SHARES = (0.0, 0.25, 0.45, 0.67, 0.9, 1.0)
RULE = Lenient(0.0)
_SURE, _NEVER = (
    -80.0,
    80.0,
)  # log-probs a draft token claims, to be accepted or rejected for certain

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"vocab_size": 2048, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64},  # noqa: E501
    "thin": {"vocab_size": 16384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32},  # noqa: E501
    "small": {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64},  # noqa: E501
    "qwen3-1.7b": {"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},  # noqa: E501
}  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """One batch of prompts and the lengths of their responses."""

    requests: RolloutRequests
    limits: list[int]
    sampling: SamplingParams

    @classmethod
    def make(cls, num_requests: int, max_tokens: int, vocab: int, group: int = 8) -> Workload:
        rng = np.random.default_rng(0)
        prompts = [
            rng.integers(3, vocab, size=rng.integers(24, 96)).astype(np.int32)
            for _ in range(-(-num_requests // group))
        ]
        rows = [prompts[r // group] for r in range(num_requests)]
        lens = np.exp(rng.normal(np.log(max_tokens / 3.5), 0.7, num_requests)).astype(int)
        return cls(
            RolloutRequests(
                torch.from_numpy(np.concatenate(rows)),
                cu_lens_from(torch.tensor([row.size for row in rows])),
                torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, num_requests)),
                Drafts.none(num_requests),
            ),
            np.clip(lens, 4, max_tokens).tolist(),
            SamplingParams(max_tokens=max_tokens),
        )

    def with_drafts(self, rollouts: Rollouts, share: float) -> RolloutRequests:
        """The rollouts as drafts of which `share` of the tokens will be accepted, unevenly over the
        rows."""
        rng = np.random.default_rng(1)
        lens = rollouts.response_lens.numpy()
        cuts = _cuts(lens, share, rng.random(lens.size))
        logprobs = np.full(int(lens.sum()), _SURE, np.float32)
        cu = rollouts.cu_response_lens.numpy()
        rejected = cuts < lens
        logprobs[(cu[:-1] + cuts)[rejected]] = _NEVER
        drafts = Drafts(
            rollouts.response_ids,
            rollouts.cu_response_lens,
            torch.from_numpy(logprobs),
            torch.zeros(lens.size, dtype=torch.bool),
        )
        r = self.requests
        return RolloutRequests(r.prompt_ids, r.cu_prompt_lens, r.keys, drafts)


def _cuts(lens: np.ndarray, share: float, uniforms: np.ndarray) -> np.ndarray:
    """Accepted lengths: row fractions U^k, k chosen so that `share` of all tokens is accepted."""
    if share in (0.0, 1.0):
        return (lens * share).astype(int)
    low, high = 1e-3, 1e3
    for _ in range(60):
        k = (low * high) ** 0.5
        cuts = np.floor(lens * uniforms**k + 0.5).astype(int)
        low, high = (k, high) if cuts.sum() > share * lens.sum() else (low, k)
    return cuts


class Bench:
    """The engines, and one timed function per strategy."""

    def __init__(self, args: argparse.Namespace, model: str) -> None:
        from vllm import LLM

        on_gpu = torch.cuda.is_available()
        common: dict[str, Any] = {
            "dtype": args.dtype,
            "enforce_eager": not on_gpu or args.eager,
            "max_model_len": args.max_tokens + 128,
            "max_num_seqs": args.slots,
            "max_num_batched_tokens": args.token_budget,
            "load_format": "dummy",
            "seed": 0,
        }
        if on_gpu:
            common["gpu_memory_utilization"] = 0.4
        else:
            common["block_size"] = 32
        self.args, self.common = args, common
        common |= dict(args.llm_args)
        # The stock engine first: on GPUs it takes vLLM's newer model runner, the plugin the older
        # one, which leaves capturing of CUDA graphs switched off in the process when it has
        # captured its own.
        self.stock = LLM(
            model,
            skip_tokenizer_init=True,
            generation_config="vllm",
            disable_log_stats=True,
            **common,
        )
        self.engine = VLLMEngine(
            model, num_speculative_tokens=args.k, first_chunk=args.first_chunk, llm_args=common
        )
        self.steps = 0
        for llm in (self.engine.llm, self.stock):
            self._count_steps(llm.llm_engine)
        self.work = Workload.make(args.requests, args.max_tokens, self.engine.vocab_size)

    def _count_steps(self, engine: Any) -> None:
        step = engine.step

        def counting() -> Any:
            self.steps += 1
            return step()

        engine.step = counting

    def rollout(self, strategy: str, requests: RolloutRequests) -> Rollouts:
        self.engine.strategy = strategy
        return self.engine.rollout_with_limits(requests, self.work.sampling, RULE, self.work.limits)

    def run_stock(
        self, llm: Any, logprobs: int | None = None, seed: int | None = None
    ) -> list[list[int]]:
        """The same lengths without a key: vLLM's own sampler."""
        from vllm import SamplingParams as VLLMSamplingParams

        params = [
            VLLMSamplingParams(
                max_tokens=n,
                ignore_eos=True,
                detokenize=False,
                logprobs=logprobs,
                flat_logprobs=logprobs is not None,
                seed=None if seed is None else seed + row,
            )
            for row, n in enumerate(self.work.limits)
        ]
        job = Job.of(
            self.work.requests,
            self.work.sampling,
            RULE,
            self.work.limits,
            self.engine.max_model_len,
        )
        outputs = llm.generate(job.prompts(), params, use_tqdm=False)
        return [list(o.outputs[0].token_ids) for o in outputs]

    def floor(
        self, requests: RolloutRequests, cuts: list[int]
    ) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """(untimed: fills the prefix cache, timed: generates the continuations)."""
        job = Job.of(
            requests, self.work.sampling, RULE, self.work.limits, self.engine.max_model_len
        )
        cu = job.drafts.cu_lens.tolist()
        ids = job.drafts.token_ids.tolist()
        rows = [r for r in range(job.batch) if cuts[r] < job.limits[r]]

        def make(limits: list[int]) -> Job:
            return Job(
                prompt_ids=[job.prompt_ids[r] + ids[cu[r] : cu[r] + cuts[r]] for r in rows],
                limits=limits,
                keys=[job.keys[r] for r in rows],
                first_positions=[cuts[r] for r in rows],
                rule=RULE,
                drafts=Drafts.none(len(rows)),
            )

        fill, timed = make([1] * len(rows)), make([job.limits[r] - cuts[r] for r in rows])
        if not rows:
            return (lambda: None), (lambda: None)
        return (lambda: self._generate(fill)), (lambda: self._generate(timed))

    def _generate(self, job: Job) -> None:
        """Without drafts or history; the workers are told of the requests, as in a rollout."""
        stops = list(self.work.sampling.stop_token_ids)
        self.engine.llm.collective_rpc("spec_rollout_begin", args=(job.batch, None, stops, True))
        self.engine.generate(job, self.work.sampling)


def _timing(samples: list[float]) -> Timing:
    p20, p50, p80 = np.percentile(samples, [20, 50, 80]).tolist()
    return Timing(p20, p50, p80, len(samples))


@dataclass(slots=True)
class _Record:
    """What one contender did, round by round."""

    function: Callable[[], Any]
    before: Callable[[], Any] | None = None
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    steps: int = 0
    tokens: int | None = None
    same_tokens: float | None = None


def _quotient(over: _Record, under: _Record) -> dict[str, float]:
    """How many times longer `over` took, as the median over rounds."""

    def median(a: list[float], b: list[float]) -> float:
        return round(statistics.median(x / y for x, y in zip(a, b, strict=True)), 3)

    return {"wall": median(over.seconds, under.seconds), "cpu": median(over.cpu, under.cpu)}


def run(args: argparse.Namespace, results: Results, model: str) -> None:
    """Measures everything and adds the rows."""
    bench = Bench(args, model)
    work = bench.work
    reference = bench.rollout("inflight", work.requests)  # also warms up
    total = int(reference.response_lens.sum())
    prompt_tokens = work.requests.prompt_ids.numel()
    print(
        f"{work.requests.batch} requests, {prompt_tokens} prompt tokens, responses {total} tokens "
        f"(median {statistics.median(work.limits):.0f}, longest {max(work.limits)})",
        flush=True,
    )
    plugged = bench.engine.llm
    same = bench.run_stock(plugged, seed=1) == bench.run_stock(bench.stock, seed=1)
    print(f"requests without a key get stock vLLM's tokens: {same}", flush=True)
    # On a GPU stock vLLM takes another model runner, whose sampler makes other noise of a seed.
    assert same or torch.cuda.is_available() or bench.common["dtype"] != "float32"

    records: dict[tuple[str, float | None], _Record] = {
        ("stock", None): _Record(lambda: bench.run_stock(bench.stock)),
        ("no key", None): _Record(lambda: bench.run_stock(plugged)),
        ("stock+logprobs", None): _Record(lambda: bench.run_stock(bench.stock, logprobs=0)),
        ("vanilla", None): _Record(lambda: bench.rollout("inflight", work.requests)),
    }
    accepted_shares: dict[float, float] = {}
    for share in args.shares:
        requests = work.with_drafts(reference, share)
        accepted = bench.rollout("inflight", requests).accepted_lens.tolist()
        accepted_shares[share] = sum(accepted) / total
        for strategy in ("two_pass", "inflight"):
            records[strategy, share] = _Record(
                lambda strategy=strategy, requests=requests: bench.rollout(strategy, requests)
            )
        if share < 1:
            fill, floor = bench.floor(requests, accepted)
            records["floor", share] = _Record(floor, before=fill)

    for round_ in range(args.repeats + 1):
        print("warm-up" if round_ == 0 else f"round {round_} of {args.repeats}", flush=True)
        # In another order each time: what ran just before matters, to caches and to the machine's
        # clock.
        items = list(records.items())
        shift = round_ * len(items) // (args.repeats + 1)
        for (name, _), record in items[shift:] + items[:shift]:
            plugged.reset_prefix_cache()
            bench.stock.reset_prefix_cache()
            if record.before is not None:
                record.before()
            bench.engine._take_metrics()
            bench.steps = 0
            start, cpu_start = time.perf_counter(), time.process_time()
            out = record.function()
            elapsed, cpu = time.perf_counter() - start, time.process_time() - cpu_start
            if round_:
                record.seconds.append(elapsed)
                record.cpu.append(cpu)
            record.steps = bench.steps
            if isinstance(out, Rollouts):
                same = (out.response_ids == reference.response_ids).double().mean()
                record.same_tokens = float(same)
                # In 16 bits, logits depend on the batch enough to turn a near-tie now and then.
                assert same == 1.0 or bench.common["dtype"] != "float32", (name, record.same_tokens)
                record.tokens = out.stats.num_computed_tokens
            elif name == "floor":
                record.tokens = bench.engine._take_metrics().num_computed_tokens
            else:
                assert sum(map(len, out)) == total

    timings = {key: _timing(record.seconds) for key, record in records.items()}
    fixed = {"vanilla": ("stock", "stock+logprobs"), "no key": ("stock",)}
    for (name, share), record in records.items():
        if share is None:
            others = {n: (n, None) for n in fixed.get(name, ())}
        elif name == "inflight":
            others = {n: (n, share) for n in ("two_pass", "floor") if (n, share) in records}
            others["vanilla"] = ("vanilla", None)
        else:
            others = {}
        results.add(
            name if share is None else f"{name} @ {share:.2f}",
            timing=timings[name, share],
            shape={"requests": work.requests.batch, "response_tokens": total},
            dtype=bench.common["dtype"],
            peers={n: timings[key] for n, key in others.items()},
            paired={n: _quotient(records[key], record) for n, key in others.items()},
            strategy=name,
            share=share,
            accepted_share=None if share is None else round(accepted_shares[share], 4),
            engine_steps=record.steps,
            computed_tokens=record.tokens,
            same_tokens=record.same_tokens,
            cpu_seconds=round(statistics.median(record.cpu), 4),
        )


def _llm_arg(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=JSON, got {text!r}")
    return name, json.loads(value)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--engine", choices=["vllm"], default="vllm")
    options.add_argument(
        "--shape", choices=list(SHAPES), help="model; thin on CPU, qwen3-1.7b on a GPU"
    )
    options.add_argument("--requests", type=int, help="64 on CPU, 512 on a GPU")
    options.add_argument("--max-tokens", type=int, help="256 on CPU, 1024 on a GPU")
    options.add_argument("--slots", type=int, help="max_num_seqs; 16 on CPU, 256 on a GPU")
    options.add_argument(
        "--token-budget", type=int, help="max_num_batched_tokens; 2048 on CPU, 8192 on a GPU"
    )
    options.add_argument("--k", type=int, default=64, help="num_speculative_tokens")
    options.add_argument("--first-chunk", type=int, help="see engine_args")
    options.add_argument("--dtype", default="bfloat16", help="default: %(default)s")
    options.add_argument("--eager", action="store_true", help="no CUDA graphs")
    options.add_argument(
        "--llm-arg",
        dest="llm_args",
        metavar="NAME=JSON",
        type=_llm_arg,
        action="append",
        default=[],
        help="an argument of both engines, e.g. cudagraph_capture_sizes=[1,64]",
    )
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--shares", type=float, nargs="+", default=list(SHARES))
    options.add_argument("--table", choices=["acceptance", "drafting"], default="acceptance")
    options.add_argument(
        "--batches", type=int, nargs="+", default=[64, 256], help="of the table drafting"
    )
    args = options.parse_args()
    if args.table == "drafting":
        if args.quick:
            args.batches, args.repeats, args.max_tokens = [16], 1, 64
        if args.threads:
            torch.set_num_threads(args.threads)
        gpu_suffix = "_gpu" if torch.cuda.is_available() else ""
        results = Results(f"rollout_vllm_drafting{gpu_suffix}", args.out)
        rollout_drafting.run(args, results)
        results.write()
        return
    gpu = torch.cuda.is_available()
    defaults = {
        "shape": ("thin", "qwen3-1.7b"),
        "requests": (64, 512),
        "max_tokens": (256, 1024),
        "slots": (16, 256),
        "token_budget": (2048, 8192),
    }
    for name, choice in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, choice[gpu])
    if args.quick:
        args.shape, args.requests, args.max_tokens, args.repeats = "tiny", 24, 64, 1
    if args.threads:
        torch.set_num_threads(args.threads)
    name = "rollout_vllm_gpu" if gpu else "rollout_vllm"
    if args.shape != defaults["shape"][gpu]:
        name += f"_{args.shape}"
    results = Results(name, args.out)
    with tempfile.TemporaryDirectory() as folder:
        from transformers import Qwen3Config

        config = Qwen3Config(
            **SHAPES[args.shape],
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            architectures=["Qwen3ForCausalLM"],
        )
        config.save_pretrained(folder)
        run(args, results, str(Path(folder)))
    results.write()


if __name__ == "__main__":
    main()
