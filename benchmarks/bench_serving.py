"""Requests of a trainer that knows nothing of us, served by vLLM as it is and with SPEC_ROLLOUT.

Every contender is an engine in a process of its own, that waits while another works. All get the
same requests in turn, in an order that rotates from round to round: eight samples of each prompt,
three times: first pass, second pass of the same prompts with the same weights, and a third one
after an update of the weights by an epoch of the demo's training. Each pass draws fresh noise,
except under `coupled`, where a sample keeps its noise.

| contender | |
|---|---|
| stock | vLLM without speculation |
| ngram | vLLM's prompt lookup, its own method |
| suffix | vLLM's suffix decoding; needs arctic-inference, left out where that does not start |
| drafting | `SPEC_ROLLOUT=drafting` |
| coupled | `SPEC_ROLLOUT='{"mode": "coupled", "identity": "arrival"}'` |
| lenient | the same with `"mode": "lenient"`, `"log_lenience": 0.5`; where it is asked for |
| idle | the plugin, and requests that it leaves to vLLM; where it is asked for |
`stock`, `drafting` and `idle` also serve prompts that never come twice (`nothing`): what it costs
where it cannot gain. `same_as_first` is the share of responses that are those of the first pass,
token for token (the same noise and weights under `coupled`, second pass), and `first_difference`
the mean place of the first other token in the rest.

    python benchmarks/bench_serving.py --model FOLDER --data questions.jsonl --moved MOVED_FOLDER \
      --max-tokens 512 --dtype bfloat16 --contenders stock idle drafting coupled lenient

With another model the update is that to the weights in MOVED_FOLDER (tools/real_model.py). Results
are written after each batch size. Of the `--budget` seconds that the engines' start leaves, each
batch size has an equal part; after it none of its rollouts begin, and of a round that is not whole
those count that `stock` has answered, too. Before the first round each engine has two short passes
of the batch, which do not count. On a GPU all engines have equal parts of its memory. A contender
that does not start, or ends, is left out; nothing goes on without `stock`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from _common import RESULTS_DIR, Results, Timing, counted_steps, parser, vllm_environment

GROUP = 8
_WARM_TOKENS = 16
PASSES = ("first", "second", "updated")
CONTENDERS: dict[str, dict[str, Any]] = {
    "stock": {},
    "ngram": {
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 4,
            "prompt_lookup_max": 4,
            "prompt_lookup_min": 2,
        }
    },
    "suffix": {"speculative_config": {"method": "suffix", "num_speculative_tokens": 15}},
    "drafting": {"variable": "drafting"},
    "coupled": {"variable": '{"mode": "coupled", "identity": "arrival"}'},
    "lenient": {"variable": '{"mode": "lenient", "identity": "arrival", "log_lenience": 0.5}'},
    "idle": {"plugin": True},
}
USUAL = ("stock", "ngram", "suffix", "drafting", "coupled")


class Child:
    """A process with one engine, told what to do over its pipes."""

    def __init__(self, name: str, args: argparse.Namespace, weights: Path) -> None:
        self.name = name
        self.is_there = True
        command = [sys.executable, __file__, "--child", name, "--weights", str(weights)]
        command += ["--max-num-seqs", str(max(args.batches))]
        command += ["--dtype", args.dtype, "--max-model-len", str(args.max_model_len)]
        if args.model:
            command += ["--model", args.model]
        variable = CONTENDERS[name].get("variable", "off")
        environment = {**os.environ, **vllm_environment(variable)}
        if args.kv_bytes:
            command += ["--kv-bytes", str(args.kv_bytes)]
        self._log: IO[str] = (  # as long as the child
            tempfile.TemporaryFile("w+")  # noqa: SIM115
            if args.logs is None
            else (args.logs / f"serving-{name}.log").open("w+")
        )
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )

    def ask(self, **what: Any) -> dict[str, Any]:
        """Does something in the child.

        Raises:
            RuntimeError: if the child has ended; with the end of its log.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        self._log.seek(0)
        raise RuntimeError(f"{self.name}: {self._log.read()[-2000:]}")

    def try_(self, **what: Any) -> dict[str, Any] | None:
        """The same; None, and it is said once, if the child has ended."""
        if not self.is_there:
            return None
        try:
            return self.ask(**what)
        except RuntimeError as error:
            print(f"{self.name} has ended: {str(error).splitlines()[-1][:200]}", flush=True)
            self.is_there = False
            return None

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def serve(args: argparse.Namespace) -> None:
    """The child: an engine, and a loop that reads what to do."""
    from spec_rollout.engines.vllm import compat
    from spec_rollout.engines.vllm.worker import ReuseWorker

    compat.install_worker()  # on CPUs its mends of vLLM's wheels serve every contender
    compat.keep_cpu_weights()
    compat.attach_calls(ReuseWorker)
    from safetensors.torch import load_file
    from vllm import LLM, SamplingParams

    from spec_rollout.demo import model_dir
    from spec_rollout.demo.task import MAX_RESPONSE_TOKENS

    counts = counted_steps()
    on_gpu = torch.cuda.is_available()
    settings: dict[str, Any] = {
        "dtype": args.dtype,
        "enforce_eager": not on_gpu,
        "max_model_len": args.max_model_len or 64 + MAX_RESPONSE_TOKENS,
        "max_num_seqs": args.max_num_seqs,
        "max_num_batched_tokens": 8192,
        "seed": 0,
        "disable_log_stats": True,
        # With bytes that are said, vLLM does not look at what other processes take meanwhile.
        **(
            {"gpu_memory_utilization": 0.02, "kv_cache_memory_bytes": args.kv_bytes}
            if on_gpu
            else {"block_size": 32}
        ),
        **{k: v for k, v in CONTENDERS[args.child].items() if k not in ("variable", "plugin")},
    }
    if CONTENDERS[args.child].get("plugin"):
        from spec_rollout.engines.vllm import engine_args

        settings |= engine_args()
    llm = LLM(args.model or str(model_dir()), **settings)
    files = sorted(Path(args.weights).glob("*.safetensors"))
    # They are asked for again and again.
    policies = [list(load_file(file).items()) for file in files]
    first: list[list[int]] = []

    for line in sys.stdin:
        what = json.loads(line)
        answer: dict[str, Any] = {}
        if what["do"] == "weights":
            llm.collective_rpc("spec_rollout_start_update")
            llm.collective_rpc("spec_rollout_load", args=(policies[what["which"]],))
            llm.collective_rpc("spec_rollout_finish_update")
            llm.reset_prefix_cache()
        elif what["do"] == "again":  # for whoever goes by updates: the same weights once more
            llm.collective_rpc("spec_rollout_weights_loaded")
            llm.reset_prefix_cache()
        elif what["do"] == "forget":
            if CONTENDERS[args.child].get("variable"):
                llm.collective_rpc("spec_rollout_history", args=("clear",))
            llm.reset_prefix_cache()
        else:
            counts.update(steps=0, computed=0)
            params = SamplingParams(
                temperature=1.0,
                max_tokens=what["max_tokens"] or MAX_RESPONSE_TOKENS,
                detokenize=False,
            )
            prompts = [{"prompt_token_ids": ids} for ids in what["prompts"]]
            start = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            seconds = time.perf_counter() - start
            responses = [list(o.outputs[0].token_ids) for o in outputs]
            if what["pass"] == "first":
                first = responses
            answer = {
                "seconds": seconds,
                "tokens": sum(map(len, responses)),
                **counts,
                **_compared(first, responses),
            }
        print("ANSWER " + json.dumps(answer), flush=True)


def _compared(first: list[list[int]], responses: list[list[int]]) -> dict[str, float | None]:
    """How many responses are the same, and where the others begin to differ, in the mean."""
    if len(first) != len(responses):
        return {}
    places = [
        next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        for a, b in zip(first, responses, strict=True)
        if a != b
    ]
    return {
        "same_as_first": 1.0 - len(places) / max(1, len(responses)),
        "first_difference": float(np.mean(places)) if places else None,
    }


def prompts_of_task(
    count: int, first: int, model: str | None, data: Path | None = None
) -> list[list[int]]:
    """Prompts of the demo's task, or of a file; `first` of them left out."""
    from transformers import AutoTokenizer

    if data is not None:
        from serve_client import prompts_of

        assert model is not None
        tokenizer = AutoTokenizer.from_pretrained(model)
        texts = prompts_of(data, model, first + count)[first:]
        return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    from spec_rollout.demo import model_dir
    from spec_rollout.demo.task import training_problems

    tokenizer = AutoTokenizer.from_pretrained(model or model_dir())
    problems = training_problems(first + count)[first:]
    return [tokenizer(problem.prompt)["input_ids"] for problem in problems]


def write_policies(folder: Path, quick: bool = False) -> None:
    """Two files of weights: the demo's, one epoch of training apart."""
    from rollout_drafting import _policies
    from safetensors.torch import save_file

    for i, weights in enumerate(_policies(quick)):
        save_file(dict(weights), folder / f"{i}.safetensors")


def _link_policies(folder: Path, model: Path, moved: Path) -> None:
    """The same of two models' folders."""
    for i, source in enumerate((model, moved)):
        (file,) = source.glob("*.safetensors")
        (folder / f"{i}.safetensors").symlink_to(file.resolve())


def _kv_bytes(weights: Path, contenders: int) -> int:
    """Of the KV cache of one of so many engines that share a GPU; 0 without one."""
    if not torch.cuda.is_available():
        return 0
    size = max(file.stat().st_size for file in weights.glob("*.safetensors"))
    total = torch.cuda.get_device_properties(0).total_memory
    # Beside the weights, those of an update, activations, graphs and CUDA itself.
    return max(1 << 30, int(0.9 * total / contenders) - 2 * size - (5 << 30))


def _timing(samples: list[float]) -> Timing:
    p20, p50, p80 = np.percentile(samples, [20, 50, 80]).tolist()
    return Timing(p20, p50, p80, len(samples))


def run(args: argparse.Namespace, results: Results, weights: Path) -> None:
    """Measures all batch sizes and adds the rows."""
    began = time.monotonic()
    args.kv_bytes = _kv_bytes(weights, len(args.contenders))
    started = [Child(name, args, weights) for name in args.contenders]
    children: list[Child] = []
    try:
        for child in started:
            try:
                child.ask(do="forget")  # answered when it has started
            except RuntimeError as error:
                if child.name == "stock":
                    raise
                why = str(error).splitlines()[-1][:200]
                print(f"{child.name} does not start here: {why}", flush=True)
                continue
            children.append(child)
        print(f"engines are there after {time.monotonic() - began:.0f} s", flush=True)
        end = began + args.budget
        for number, batch in enumerate(args.batches):
            # What one does not need the next ones have.
            now = time.monotonic()
            share = (end - now) / (len(args.batches) - number)
            _run_batch(args, results, children, batch, now + share)
            results.write()
            if started and not any(child.name == "stock" for child in children):
                raise RuntimeError("stock has ended: there is nothing to compare with")
    finally:
        for child in started:
            child.end()


def _warm(children: list[Child], prompts: list[list[int]]) -> None:
    """What happens at the first use only, with proposals and without."""
    for child in children:
        child.try_(do="forget")
        for pass_ in ("first", "second"):
            what = {"prompts": prompts, "max_tokens": _WARM_TOKENS, "pass": pass_}
            child.try_(do="generate", **what)
    children[:] = [child for child in children if child.is_there]


def _run_batch(
    args: argparse.Namespace, results: Results, children: list[Child], batch: int, end: float
) -> None:
    """Measures one batch size, until `end` on the monotonic clock.

    Args:
        children: Those that end are taken out.
    """
    num_prompts = max(1, batch // GROUP)
    group = batch // num_prompts
    # Of each round: what a contender answered, and stock.
    found: dict[tuple[str, str], list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    # Prompts from here on were never asked for.
    fresh = 4096 if args.data is None else num_prompts
    given = prompts_of_task(num_prompts, 0, args.model, args.data)
    prompts = [ids for ids in given for _ in range(group)]
    _warm(children, prompts)
    for round_ in range(args.repeats):
        if not any(child.name == "stock" for child in children):
            break
        print(f"batch {batch}, round {round_ + 1} of {args.repeats}", flush=True)
        order = children[round_ % len(children) :] + children[: round_ % len(children)]
        once = prompts_of_task(batch, fresh, args.model, args.data)
        fresh += batch
        answers, is_whole = _round(args, order, prompts, once, end, round_ + 1)
        children[:] = [child for child in children if child.is_there]
        for (name, which), answer in answers.items():
            if ("stock", which) in answers:
                found.setdefault((name, which), []).append((answer, answers["stock", which]))
        if not is_whole:
            print("no time left for another round", flush=True)
            break
    for (name, which), pairs in found.items():
        answers, stock = [a for a, _ in pairs], [s for _, s in pairs]
        # Responses differ from contender to contender, so seconds are compared per token.
        ratios = [(s["seconds"] / s["tokens"]) / (a["seconds"] / a["tokens"]) for a, s in pairs]
        total = {key: sum(a[key] for a in answers) for key in ("tokens", "steps", "computed")}
        same = {}
        if which in ("second", "updated"):
            same["same_as_first"] = round(float(np.mean([a["same_as_first"] for a in answers])), 4)
            places = [a["first_difference"] for a in answers if a["first_difference"] is not None]
            if places:
                same["first_difference"] = round(float(np.mean(places)), 1)
        stock_steps = sum(a["steps"] for a in stock)
        results.add(
            f"{name}, {which}, {batch}",
            timing=_timing([a["seconds"] for a in answers]),
            shape={"batch": batch, "group": group},
            dtype=args.dtype,
            contender=name,
            which=which,
            tokens_per_second_over_stock=round(float(np.median(ratios)), 4),
            engine_steps=round(total["steps"] / len(answers), 1),
            engine_steps_over_stock=round(total["steps"] / stock_steps, 4),
            computed_per_token=round(total["computed"] / total["tokens"], 4),
            tokens=round(total["tokens"] / len(answers), 1),
            **same,
        )


def _round(
    args: argparse.Namespace,
    order: list[Child],
    prompts: list[list[int]],
    once: list[list[int]],
    end: float,
    number: int,
) -> tuple[dict[tuple[str, str], dict[str, Any]], bool]:
    """What each contender answered in each pass, and whether there was time for all of them."""
    batch = len(prompts)
    found: dict[tuple[str, str], dict[str, Any]] = {}

    def generate(child: Child, asked: list[list[int]], pass_: str) -> bool:
        if time.monotonic() > end:
            return False
        what = {"do": "generate", "prompts": asked, "max_tokens": args.max_tokens, "pass": pass_}
        answer = child.try_(**what)
        if answer is None:
            return True
        found[child.name, pass_] = answer
        line = {"contender": child.name, "batch": batch, "round": number, "pass": pass_}
        print(json.dumps(line | answer), flush=True)
        return True

    for child in order:
        child.try_(do="forget")
        child.try_(do="weights", which=0)
    for pass_ in PASSES:
        for child in order:
            if pass_ == "second":
                child.try_(do="again")
            elif pass_ == "updated":
                child.try_(do="weights", which=1)
            if not generate(child, prompts, pass_):
                return found, False
    for child in order:
        if child.name in ("stock", "drafting", "idle") and len(once) == batch:
            child.try_(do="forget")
            if not generate(child, once, "nothing"):
                return found, False
    return found, True


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--batches", type=int, nargs="+", default=[16, 64, 256])
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--contenders", nargs="+", default=list(USUAL), choices=CONTENDERS)
    options.add_argument("--model", help="folder of another model")
    options.add_argument("--moved", type=Path, help="folder of its weights after an update")
    options.add_argument("--data", type=Path, help="JSONL with a prompt or a question in each row")
    options.add_argument("--policies", type=Path, help="folder with the demo's two, 0 and 1")
    options.add_argument("--logs", type=Path, help="folder for what the engines print")
    options.add_argument("--dtype", default="float32")
    options.add_argument("--budget", type=float, default=1e9, help="seconds")
    options.add_argument("--max-tokens", type=int, default=0)
    options.add_argument("--max-model-len", type=int, default=0)
    options.add_argument("--max-num-seqs", type=int, default=256, help=argparse.SUPPRESS)
    options.add_argument("--kv-bytes", type=int, default=0, help=argparse.SUPPRESS)
    options.add_argument("--child", help=argparse.SUPPRESS)
    options.add_argument("--weights", help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.child:
        serve(args)
        return
    if args.quick:
        args.batches, args.repeats = [16], 1
    results = Results("serving", args.out or RESULTS_DIR)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder)
        if args.model is not None:
            _link_policies(weights, Path(args.model), args.moved or Path(args.model))
        elif args.policies is not None:
            weights = args.policies
        else:
            write_policies(weights, args.quick)
        run(args, results, weights)


if __name__ == "__main__":
    main()
