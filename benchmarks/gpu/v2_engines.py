"""vLLM's Model Runner V2 with the plugin, beside vLLM as it is and the plugin on V1.

    python benchmarks/gpu/v2_engines.py --out OUT
    python benchmarks/gpu/v2_engines.py --out OUT --contenders stock v2-async-16 v2-async-16-full

Every contender is an engine in a process of its own, one after the other. All get the same
requests, each with a seed, up to three times in a round:

| pass | |
|---|---|
| first | no drafts |
| second | each request's draft is its response in the first pass |
| changed | the same with another token at half its length |

| contender | |
|---|---|
| stock, stock-sync | vLLM by itself on V2; without asynchronous scheduling |
| v1-K | the plugin on V1, at most K draft tokens of a request in a step |
| v2-sync-K, v2-async-K | the plugin on V2, without asynchronous scheduling and with it |
| ...-MODE | the same with this `cudagraph_mode` (full, piecewise, full_decode_only, none) |
| drafting-v1, drafting-v2 | `SPEC_ROLLOUT=drafting`: no drafts; its history in the second pass |

What there is to see: seconds and engine steps; `same_as_stock`, the share of the first pass's
responses that are stock's, token for token (on V1 they are others); `same_as_first`, the share that
is the first pass's, which drew each token in a row of its own and not in a chunk of up to K + 1
(`..._until`: the mean place of the first other token in the rest; `logprob_gap`: the largest
difference of log-probs up to there); memory, and of that the grammar bitmask's. The second pass of
`stock` says how far vLLM repeats itself.

Where the plugin does not run on V2 of the vLLM that is there, those contenders are left out.
Results are written after every contender, and rows after every batch size. None starts after
`--budget` seconds, and the one at work then is ended. `--quick` runs two on a CPU, V2 in Triton's
interpreter as the tests run it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from _common import RESULTS_DIR, Results, Timing, counted_steps, vllm_environment
from bench_serving import GROUP, prompts_of_task
from session import without_v2

# Those come first that say most: minutes may be all there are.
USUAL = (
    "stock",
    "v2-async-16",
    "v2-sync-16",
    "v1-16",
    "v2-async-32",
    "v2-async-16-full",
    "drafting-v2",
    "v2-async-16-piecewise",
    "stock-sync",
    "v2-sync-32",
    "v1-32",
    "drafting-v1",
)
_KV_BYTES = 40 << 30  # on a GPU
TESTS_V2 = Path(__file__).resolve().parents[2] / "tests" / "engines" / "vllm_v2"
PASSES = ("first", "second", "changed")
_NAME = re.compile(
    r"(?P<stock>stock(-sync)?)|drafting-(?P<drafting>v[12])"
    r"|(?P<plugin>v1|v2-sync|v2-async)-(?P<tokens>[1-9]\d*)(-(?P<mode>[a-z_]+))?"
)


@dataclass(frozen=True)
class Contender:
    """An engine.

    Attributes:
        runner: vLLM's model runner, "v1" or "v2".
        is_async: Asynchronous scheduling; None leaves it to vLLM.
        num_speculative_tokens: Of `engine_args`; 0 without drafts.
        drafts_itself: Has SPEC_ROLLOUT=drafting.
        cudagraph_mode: None is vLLM's default.
    """

    name: str
    runner: str
    is_async: bool | None = None
    num_speculative_tokens: int = 0
    drafts_itself: bool = False
    cudagraph_mode: str | None = None

    @classmethod
    def named(cls, name: str) -> Contender:
        """The contender of that name.

        Raises:
            argparse.ArgumentTypeError: if there is none.
        """
        found = _NAME.fullmatch(name)
        if found is None:
            raise argparse.ArgumentTypeError(
                f"expected stock, stock-sync, drafting-v1 or -v2, v1-K, v2-sync-K or v2-async-K, "
                f"with -MODE or without, got {name}"
            )
        if found["stock"]:
            return cls(name, "v2", False if name == "stock-sync" else None)
        if found["drafting"]:
            return cls(name, found["drafting"], drafts_itself=True)
        runner, _, scheduling = found["plugin"].partition("-")
        mode = found["mode"]
        return cls(
            name,
            runner,
            None if runner == "v1" else scheduling == "async",
            int(found["tokens"]),
            cudagraph_mode=mode and mode.upper(),
        )

    @property
    def is_ours(self) -> bool:
        """Whether the plugin is in it."""
        return self.num_speculative_tokens > 0 or self.drafts_itself

    @property
    def passes(self) -> Sequence[str]:
        return PASSES if self.num_speculative_tokens else PASSES[:2]

    def llm_args(self) -> dict[str, Any]:
        """Arguments of `LLM`; called in the contender's process."""
        from spec_rollout.engines.vllm import engine_args

        args: dict[str, Any] = {"logprobs_mode": "processed_logprobs"}
        if self.num_speculative_tokens:
            args |= engine_args(self.num_speculative_tokens, model_runner=self.runner)
        if self.is_async is not None:
            args["async_scheduling"] = self.is_async
        if self.cudagraph_mode is not None:
            args["compilation_config"] = {"cudagraph_mode": self.cudagraph_mode}
        return args

    def environment(self) -> dict[str, str]:
        return {
            **vllm_environment("drafting" if self.drafts_itself else "off"),
            "VLLM_USE_V2_MODEL_RUNNER": "1" if self.runner == "v2" else "0",
        }


@dataclass
class Responses:
    """What a pass gave."""

    tokens: list[list[int]]
    logprobs: list[list[float]]

    def compared(self, other: Responses) -> dict[str, Any]:
        """How many are the same, where the others begin to differ, and how far log-probs are apart
        where tokens are the same."""
        places, gap = [], 0.0
        for a, b, x, y in zip(
            self.tokens, other.tokens, self.logprobs, other.logprobs, strict=True
        ):
            common = min(len(a), len(b))
            at = next((i for i in range(common) if a[i] != b[i]), common)
            if a != b:
                places.append(at)
            if at:
                gap = max(gap, float(np.abs(np.subtract(x[:at], y[:at])).max()))
        return {
            "same": 1.0 - len(places) / max(1, len(self.tokens)),
            "first_difference": float(np.mean(places)) if places else None,
            "logprob_gap": gap,
        }


def serve(args: argparse.Namespace) -> None:
    """The contender's process."""
    contender = args.child
    on_gpu = torch.cuda.is_available()
    v2_on_cpu: Any = None
    if not on_gpu and contender.runner == "v2":
        sys.path.insert(0, str(TESTS_V2))
        import v2_on_cpu

        v2_on_cpu.prepare()
    from vllm import LLM

    if v2_on_cpu is not None:
        v2_on_cpu.patch()
    from spec_rollout.demo import model_dir
    from spec_rollout.engines.vllm import compat

    if contender.drafts_itself:
        compat.install()  # where the package is not installed, vLLM does not find it
    counts = counted_steps()
    start = time.perf_counter()
    llm = LLM(
        str(args.model or model_dir()),
        dtype=args.dtype,
        enforce_eager=not on_gpu,
        max_model_len=args.max_model_len,
        max_num_seqs=max(args.batches),
        max_num_batched_tokens=8192,
        seed=0,
        disable_log_stats=True,
        # As many bytes for each, so that `peak_bytes` differ by what else an engine takes.
        **(
            {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": _KV_BYTES}
            if on_gpu
            else {"block_size": 32}
        ),
        **contender.llm_args(),
    )
    engine = _described(llm) | {"start_seconds": round(time.perf_counter() - start, 1)}
    rows: list[dict[str, Any]] = []
    for batch in args.batches:
        group = min(GROUP, batch)
        given = prompts_of_task(batch // group, 0, args.model, args.data)
        prompts = [ids for ids in given for _ in range(group)]
        rows += _measured(args, contender, llm, prompts, counts, engine)
        args.rows.write_text(json.dumps(rows))


def _described(llm: Any) -> dict[str, Any]:
    config = llm.llm_engine.vllm_config
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    found: dict[str, Any] = {
        "runner": "v2" if config.use_v2_model_runner else "v1",
        "scheduler": type(core.scheduler).__name__,
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
        "cudagraph_mode": config.compilation_config.cudagraph_mode.name,
        "cudagraph_sizes": len(config.compilation_config.cudagraph_capture_sizes or ()),
        "num_gpu_blocks": config.cache_config.num_gpu_blocks,
    }
    grammar = getattr(getattr(runner, "structured_outputs_worker", None), "grammar_bitmask", None)
    if grammar is not None:
        found["grammar_bitmask_bytes"] = grammar.numel() * grammar.element_size()
    if torch.cuda.is_available():
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    return found


def _measured(
    args: argparse.Namespace,
    contender: Contender,
    llm: Any,
    prompts: list[list[int]],
    counts: dict[str, int],
    engine: dict[str, Any],
) -> list[dict[str, Any]]:
    """The rows of one batch size."""
    batch = len(prompts)
    file = args.folder / f"stock-{batch}.json"
    if contender.name == "stock":
        stock = None
    else:
        stock = Responses(**json.loads(file.read_text())) if file.exists() else None
    found: dict[str, list[dict[str, Any]]] = {}
    for round_ in range(args.repeats + 1):  # in the first one kernels are compiled
        first: Responses | None = None
        for pass_ in contender.passes:
            if pass_ == "first" and contender.drafts_itself:
                llm.collective_rpc("spec_rollout_history", args=("clear",))
            llm.reset_prefix_cache()
            counts.update(steps=0, computed=0)
            params = _params(contender, args, batch, pass_, first)
            asked = [{"prompt_token_ids": ids} for ids in prompts]
            start = time.perf_counter()
            outputs = llm.generate(asked, params, use_tqdm=False)
            seconds = time.perf_counter() - start
            responses = Responses(
                [list(o.outputs[0].token_ids) for o in outputs],
                [
                    [at[t].logprob for at, t in zip(c.logprobs, c.token_ids, strict=True)]
                    for c in (o.outputs[0] for o in outputs)
                ],
            )
            one = {"seconds": seconds, "tokens": sum(map(len, responses.tokens)), **counts}
            if first is None:
                first = responses
                if contender.name == "stock" and not round_:
                    file.write_text(json.dumps(vars(responses)))
                elif stock is not None and contender.runner == "v2":
                    one["same_as_stock"] = responses.compared(stock)
            else:
                one["same_as_first"] = responses.compared(first)
            print(json.dumps({"batch": batch, "round": round_, "pass": pass_} | one), flush=True)
            if round_:
                found.setdefault(pass_, []).append(one)
    return [_row(batch, pass_, answers, engine) for pass_, answers in found.items()]


def _params(
    contender: Contender,
    args: argparse.Namespace,
    batch: int,
    pass_: str,
    first: Responses | None,
) -> list[Any]:
    from vllm import SamplingParams

    from spec_rollout import Coupled, ReuseRequest, extra_args

    sampling = []
    for i in range(batch):
        params = SamplingParams(
            temperature=1.0,
            seed=1000 + i,
            max_tokens=args.max_tokens,
            logprobs=0,
            detokenize=False,
        )
        draft: list[int] = []
        if pass_ != "first" and first is not None:
            draft = list(first.tokens[i])
            if pass_ == "changed":
                middle = len(draft) // 2
                draft[middle] = draft[middle - 1] if draft[middle - 1] != draft[middle] else 0
        # On V1 the noise is the key's, with a draft and without.
        if contender.num_speculative_tokens and (draft or contender.runner == "v1"):
            reuse = ReuseRequest(1000 + i, Coupled(), np.array(draft, np.int32))
            params.extra_args = extra_args(reuse)
        sampling.append(params)
    return sampling


def _row(
    batch: int, pass_: str, answers: list[dict[str, Any]], engine: dict[str, Any]
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "batch": batch,
        "which": pass_,
        "seconds": [a["seconds"] for a in answers],
        "engine": engine,
    }
    for key in ("tokens", "steps", "computed"):
        row[key] = round(float(np.mean([a[key] for a in answers])), 1)
    for key in ("same_as_stock", "same_as_first"):
        if all(key in a for a in answers):
            compared = [a[key] for a in answers]
            row[key] = round(float(np.mean([c["same"] for c in compared])), 4)
            places = [c["first_difference"] for c in compared if c["first_difference"] is not None]
            if places:
                row[f"{key}_until"] = round(float(np.mean(places)), 1)
            row["logprob_gap"] = max(
                row.get("logprob_gap", 0.0), *(c["logprob_gap"] for c in compared)
            )
    return row


def run(args: argparse.Namespace, results: Results) -> bool:
    """Runs the contenders and adds their rows; whether all came to their end."""
    began = time.monotonic()
    is_whole = True
    stock_seconds: dict[int, float] = {}  # a token's
    with tempfile.TemporaryDirectory() as folder:
        for contender in args.contenders:
            if contender.is_ours and contender.runner == "v2" and (why := without_v2()):
                print(f"{contender.name} is left out: {why}", flush=True)
                continue
            left = began + args.budget - time.monotonic()
            if left <= 0:
                print(f"no time left for {contender.name}", flush=True)
                return False
            print(f"-- {contender.name}", flush=True)
            rows = Path(folder) / f"{contender.name}.json"
            command = [sys.executable, __file__, "--child", contender.name]
            command += ["--rows", str(rows), "--folder", folder, "--out", str(args.out)]
            command += ["--batches", *map(str, args.batches), "--repeats", str(args.repeats)]
            command += ["--dtype", args.dtype, "--max-tokens", str(args.max_tokens)]
            command += ["--max-model-len", str(args.max_model_len)]
            if args.model:
                command += ["--model", args.model]
                command += ["--data", str(args.data)] if args.data else []
            environment = {**os.environ, **contender.environment()}
            try:
                status = subprocess.run(command, env=environment, timeout=left).returncode
            except subprocess.TimeoutExpired:
                status = None
            is_whole &= status == 0
            if status != 0:
                print(f"{contender.name} ended with {status}", flush=True)
            for row in json.loads(rows.read_text()) if rows.exists() else []:
                _add(results, contender.name, row, stock_seconds, args.dtype)
            results.write()
    return is_whole


def _add(
    results: Results,
    name: str,
    row: dict[str, Any],
    stock_seconds: dict[int, float],
    dtype: str,
) -> None:
    seconds, batch, which = row.pop("seconds"), row.pop("batch"), row.pop("which")
    per_token = float(np.median(seconds)) / row["tokens"]
    if name == "stock" and which == "first":
        stock_seconds[batch] = per_token
    if batch in stock_seconds:
        row["tokens_per_second_over_stock"] = round(stock_seconds[batch] / per_token, 4)
    p20, p50, p80 = np.percentile(seconds, [20, 50, 80]).tolist()
    results.add(
        f"{name}, {which}, {batch}",
        timing=Timing(p20, p50, p80, len(seconds)),
        shape={"batch": batch},
        dtype=dtype,
        contender=name,
        which=which,
        **row,
    )


def main() -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=Path, default=RESULTS_DIR, help="folder of the JSON file")
    options.add_argument("--quick", action="store_true", help="small sizes: does it run?")
    options.add_argument(
        "--contenders", type=Contender.named, nargs="+", default=list(map(Contender.named, USUAL))
    )
    options.add_argument("--batches", type=int, nargs="+", default=[64, 512])
    options.add_argument("--repeats", type=int, default=2)
    options.add_argument("--model", help="folder of another model than the demo's")
    options.add_argument("--data", type=Path, help="JSONL with a prompt or a question in each row")
    options.add_argument("--dtype", default="float32")
    options.add_argument("--max-tokens", type=int, default=96)
    options.add_argument("--max-model-len", type=int, default=0)
    options.add_argument("--budget", type=float, default=1e9, help="seconds")
    options.add_argument("--child", type=Contender.named, help=argparse.SUPPRESS)
    options.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.child:
        serve(args)
        return 0
    if args.quick:
        args.contenders = [Contender.named(name) for name in ("stock", "v2-async-8")]
        args.batches, args.repeats, args.max_tokens = [2], 1, 12
    args.max_model_len = args.max_model_len or args.max_tokens + 128
    return 0 if run(args, Results("v2_engines", args.out)) else 1


if __name__ == "__main__":
    sys.exit(main())
