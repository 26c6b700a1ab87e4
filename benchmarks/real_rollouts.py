"""One engine in one dtype, for bench_real.py: a process of its own that prints what each rollout
took, a line of JSON each, as it goes.

A round has two phases. In `first` the policy is the one at the epoch's start and nothing is cached:
`none` and `drafting`, which can propose from siblings only. In `later` the policy is the one at
the epoch's end, and what `none` generated in the first phase is cached (untimed): all contenders.
The order rotates from round to round. `BASES` says which contender generates the same requests with
the same noise and reuses nothing: where the rule is lossless, the same texts.

| contender | rule | drafting |
|---|---|---|
| stock | vLLM without the plugin, by its own sampler; in the phase `later` | |
| none | NoReuse | no |
| same noise | NoReuse, with the noise of the phase before, which `Coupled` keeps | no |
| drafting | NoReuse | yes |
| coupled | Coupled | no |
| lenient 0, lenient 0.5 | Lenient | no |
| both | Coupled | yes |
| as they come | Coupled, in a quarter of the slots, begun in the order of the prompts | yes |
| longest first | the same, begun with those that were long the last time | yes |
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real_policies import prompt_ids, questions

from spec_rollout import RolloutCache, RolloutSession
from spec_rollout.acceptance import AcceptanceRule, Coupled, Lenient, NoReuse
from spec_rollout.engines.base import RolloutEngine
from spec_rollout.engines.transformers.requests import Plan
from spec_rollout.keys import prompt_key
from spec_rollout.types import RolloutRequests, Rollouts, SamplingParams

RULES: Mapping[str, tuple[AcceptanceRule, bool]] = {
    "none": (NoReuse(), False),
    "same noise": (Coupled(), False),  # with nothing cached
    "drafting": (NoReuse(), True),
    "coupled": (Coupled(), False),
    "lenient 0": (Lenient(0.0), False),
    "lenient 0.5": (Lenient(0.5), False),
    "both": (Coupled(), True),
}
BASES = {
    "drafting": "none",
    "coupled": "same noise",
    "lenient 0": "none",
    "lenient 0.5": "none",
    "both": "same noise",
}
CHUNK = 64  # draft tokens that a step of vLLM verifies at most
ORDERS = ("as they come", "longest first")
FIRST = ("none", "drafting")
_COUNTS = (
    "num_response_tokens",
    "num_reused_tokens",
    "num_generated_tokens",
    "num_computed_tokens",
    "num_proposed_tokens",
    "num_accepted_proposals",
    "num_fully_reused",
    "num_engine_steps",
    "num_tail_steps",
    "max_row_steps",
    "tail_seconds",
    "verification_seconds",
    "tokens_per_step",
)


@contextmanager
def callers_order() -> Iterator[None]:
    """Both engines begin requests in the order in which they come."""
    plan, requests = Plan.order, RolloutRequests.longest_first
    Plan.order = lambda self: np.arange(self.batch)
    RolloutRequests.longest_first = lambda self, draft_lens: torch.arange(self.batch)
    try:
        yield
    finally:
        Plan.order, RolloutRequests.longest_first = plan, requests


@dataclass(slots=True)
class Served:
    """An engine and what can be changed of it between rollouts.

    Attributes:
        load: Puts the weights of a folder in.
        set_slots: Requests served at a time.
        stock: Generates as vLLM does by itself; returns tokens, engine steps and the longest
            response. None where there is no such thing.
    """

    engine: RolloutEngine
    load: Callable[[Path], None]
    set_slots: Callable[[int], None]
    stock: Callable[[list[list[int]], SamplingParams], dict[str, float]] | None = None


def weights(folder: Path) -> list[tuple[str, torch.Tensor]]:
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    return [item for file in files for item in load_file(file).items()]


def embedded(args: argparse.Namespace) -> Served:
    from transformers import AutoModelForCausalLM

    from spec_rollout import TransformersEngine

    model = AutoModelForCausalLM.from_pretrained(args.old, dtype=getattr(torch, args.dtype))
    engine = TransformersEngine(model, num_slots=max(args.requests))

    def load(folder: Path) -> None:
        known = model.state_dict().keys()
        engine.update_weights([(n, t.to(model.dtype)) for n, t in weights(folder) if n in known])

    def set_slots(count: int) -> None:
        engine.num_slots = count

    return Served(engine, load, set_slots)


def longest_row(args: argparse.Namespace) -> int:
    """Prompt and response, and room for the draft that a step verifies; within the model's own."""
    from transformers import AutoConfig

    prompts = prompt_ids(questions(args.data, -(-max(args.requests) // args.group)), args.old)
    wanted = max(map(len, prompts)) + args.max_tokens + CHUNK
    return min(wanted, AutoConfig.from_pretrained(args.old).max_position_embeddings)


def vllm(args: argparse.Namespace) -> Served:
    from vllm import LLM
    from vllm import SamplingParams as VLLMSamplingParams

    from spec_rollout import VLLMEngine

    common: dict[str, Any] = {
        "dtype": args.dtype,
        "enforce_eager": not torch.cuda.is_available(),
        "max_model_len": longest_row(args),
        "max_num_seqs": max(args.requests),
        "max_num_batched_tokens": 8192,
        "seed": 0,
        "disable_log_stats": True,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        **({"gpu_memory_utilization": 0.4} if torch.cuda.is_available() else {"block_size": 32}),
    }
    engine = VLLMEngine(str(args.old), num_speculative_tokens=CHUNK, llm_args=common)
    # Its weights stay those of the epoch's end: what they are does not change what a step costs.
    plain = LLM(str(args.new), **common)
    steps = 0
    step = plain.llm_engine.step

    def counted() -> Any:
        nonlocal steps
        steps += 1
        return step()

    plain.llm_engine.step = counted

    def stock(prompts: list[list[int]], sampling: SamplingParams) -> dict[str, float]:
        nonlocal steps
        steps = 0
        params = VLLMSamplingParams(
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            stop_token_ids=list(sampling.stop_token_ids),
            ignore_eos=True,
            detokenize=False,
            logprobs=0,
            flat_logprobs=True,
        )
        plain.reset_prefix_cache()
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = plain.generate(asked, params, use_tqdm=False)
        lens = [len(output.outputs[0].token_ids) for output in outputs]
        return {
            "num_response_tokens": sum(lens),
            "num_generated_tokens": sum(lens),
            "num_engine_steps": steps,
            "max_row_steps": max(lens),
            "tokens_per_step": 1.0,
        }

    def load(folder: Path) -> None:
        engine.update_weights(weights(folder))

    def set_slots(count: int) -> None:
        scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler
        assert hasattr(scheduler, "max_num_active_reqs")  # who may run; slots are more than that
        scheduler.max_num_active_reqs = count

    return Served(engine, load, set_slots, stock)


def sampling_of(args: argparse.Namespace) -> SamplingParams:
    """Of `--temperature`, `--max-tokens` and the model's stop tokens."""
    from transformers import AutoConfig

    stop = AutoConfig.from_pretrained(args.old).eos_token_id
    stops = tuple(stop) if isinstance(stop, list) else (stop,)
    return SamplingParams(
        temperature=args.temperature, max_tokens=args.max_tokens, stop_token_ids=stops
    )


def measure(args: argparse.Namespace, served: Served) -> None:
    """Prints a line for every rollout."""
    sampling = sampling_of(args)
    end = time.monotonic() + args.budget
    took: dict[int, float] = {}
    for round_ in range(args.repeats):
        for count in sorted(args.requests, reverse=True):
            group = min(args.group, count)
            prompts = prompt_ids(questions(args.data, -(-count // group)), args.old)
            start = time.monotonic()
            # As long as the last time, or what a larger number of requests lets expect.
            expected = min((s * (count / n) ** 0.5 for n, s in took.items()), default=0.0)
            if start + took.get(count, expected) > end:
                shown = f"round {round_ + 1}, {count} requests"
                print(f"{args.engine}, {args.dtype}: no time left for {shown}", flush=True)
                continue
            if not round_:
                served.set_slots(count)
                warm = RolloutSession(served.engine, NoReuse(), seed=1)
                few = replace(sampling, max_tokens=4)
                warm.rollout(prompts, group, few, step=0, epoch=0)
                if served.stock is not None:
                    served.stock([ids for ids in prompts for _ in range(group)], few)
            _round(args, served, prompts, group, sampling, round_)
            took[count] = time.monotonic() - start


def _round(
    args: argparse.Namespace,
    served: Served,
    prompts: list[list[int]],
    group: int,
    sampling: SamplingParams,
    round_: int,
) -> None:
    count = len(prompts) * group
    keys = [prompt_key(ids) for ids in prompts for _ in range(group)]
    sample_ids = list(range(group)) * len(prompts)
    cached: Rollouts | None = None

    def session(contender: str) -> RolloutSession:
        rule, drafting = RULES["both" if contender in ORDERS else contender]
        cache = RolloutCache()
        if cached is not None and contender != "same noise":
            cache.store(keys, sample_ids, cached)
        return RolloutSession(served.engine, rule, cache=cache, drafting=drafting, seed=0)

    def run(contender: str, phase: str) -> Rollouts | None:
        step = 0 if phase == "first" else 1 + round_
        rollouts = None
        if contender == "stock":
            assert served.stock is not None
            flat = [ids for ids in prompts for _ in range(group)]
            start = time.perf_counter()
            counts = served.stock(flat, sampling)
            seconds = time.perf_counter() - start
        else:
            one = session(contender)
            served.set_slots(max(1, count // 4) if contender in ORDERS else count)
            epoch = int(phase == "later")
            with callers_order() if contender == ORDERS[0] else nullcontext():
                start = time.perf_counter()
                rollouts = one.rollout(prompts, group, sampling, step=step, epoch=epoch)
            seconds = time.perf_counter() - start
            counts = {name: getattr(rollouts.stats, name) for name in _COUNTS}
            counts["longest_response"] = int(rollouts.cu_response_lens.diff().max())
        line = {
            "engine": args.engine,
            "dtype": args.dtype,
            "requests": count,
            "phase": phase,
            "contender": contender,
            "round": round_,
            "seconds": seconds,
        }
        print("ROW " + json.dumps(line | counts), flush=True)
        return rollouts

    def rotated(names: list[str]) -> list[str]:
        shift = round_ % len(names)
        return names[shift:] + names[:shift]

    served.load(args.old)
    done = {name: run(name, "first") for name in rotated(list(FIRST))}
    cached = done["none"]
    served.load(args.new)
    later = [*(["stock"] if served.stock else []), *RULES]
    if count == max(args.requests) and count >= 16:
        later += ORDERS
    for name in rotated(later):
        run(name, "later")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--engine", choices=["embedded", "vllm"], required=True)
    options.add_argument("--dtype", required=True)
    options.add_argument("--old", type=Path, required=True)
    options.add_argument("--new", type=Path, required=True)
    options.add_argument("--data", type=Path)
    options.add_argument("--requests", type=int, nargs="+", required=True)
    options.add_argument("--repeats", type=int, required=True)
    options.add_argument("--group", type=int, required=True)
    options.add_argument("--max-tokens", type=int, required=True)
    options.add_argument("--temperature", type=float, required=True)
    options.add_argument("--budget", type=float, required=True, help="seconds")
    args = options.parse_args()
    measure(args, (embedded if args.engine == "embedded" else vllm)(args))


if __name__ == "__main__":
    main()
