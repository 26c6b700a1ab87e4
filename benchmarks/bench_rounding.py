"""What rounding costs reuse: tokens rejected by the very policy that drew them, by engine, dtype,
rule and tolerance.

    python benchmarks/bench_rounding.py
    python benchmarks/bench_rounding.py --data questions.jsonl

Model, questions and the two policies are those of bench_real.py. Each engine runs in each dtype in
a process of its own. It draws responses with the cache off, measures its rounding as a session does
(`RolloutSession.measure_rounding`; `"auto"` is the quantile 0.99 of that), and verifies the
responses by every rule and tolerance: under the weights that drew them, where what is rejected is
rounding's doing, and under those of the epoch's end. Texts are compared with those drawn with the
cache off under the same weights and noise.

| engine | what it is |
|---|---|
| embedded | batch-invariant where that can be had |
| embedded, padded | `batch_invariant=False`: forwards with masks |
| embedded, padded, float32 head | the same; the last norm and the output head in float32 |
| vllm | the plugin |
| vllm, batch-invariant | with VLLM_BATCH_INVARIANT=1 |

The last may not run everywhere: the row has the error then. Tolerances are tried in bfloat16. No
run begins that `--budget` would not let end; results are written after every run.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from _common import Results, copy_bandwidth, vllm_environment, write_json
from bench_real import said, vllm_python
from real_options import checked, options_of, policies_of
from real_policies import Policies, Training, prompt_ids, questions
from real_rollouts import CHUNK, longest_row, sampling_of, weights

from spec_rollout import RolloutCache, RolloutSession
from spec_rollout.acceptance import AcceptanceRule, Coupled, Lenient, NoReuse
from spec_rollout.engines.base import RolloutEngine
from spec_rollout.keys import prompt_key
from spec_rollout.types import Rollouts

Row = dict[str, Any]
RULES: Mapping[str, Coupled | Lenient] = {"coupled": Coupled(), "lenient 0": Lenient(0.0)}
TOLERANCES = (0.0, "auto", 0.1)


@dataclass(frozen=True, slots=True)
class Setting:
    """An engine and how it is run.

    Attributes:
        engine: As the table calls it.
        options: Of the engine, or of vLLM's `LLM`.
        environment: Of the process.
        may_fail: Whether an error is a result.
    """

    engine: str
    dtype: str
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    float32_head: bool = False
    may_fail: bool = False

    @property
    def package(self) -> str:
        return self.engine.split(",")[0]


SETTINGS = (
    Setting("embedded", "float32"),
    Setting("embedded, padded", "float32", {"batch_invariant": False}),
    Setting("vllm", "float32"),
    Setting("embedded", "bfloat16"),
    Setting("embedded, padded", "bfloat16", {"batch_invariant": False}),
    Setting(
        "embedded, padded, float32 head",
        "bfloat16",
        # The check takes logits in float32 for a model in float32.
        {"batch_invariant": False, "check_model": False},
        float32_head=True,
    ),
    Setting("vllm", "bfloat16"),
    Setting(
        "vllm, batch-invariant",
        "bfloat16",
        environment={"VLLM_BATCH_INVARIANT": "1"},
        may_fail=True,
    ),
)


def use_float32_head(policy: Any) -> None:
    """The last norm and the output head compute in float32 from now on."""
    head = policy.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().float())
    policy.base_model.norm.register_forward_pre_hook(lambda _, args: (args[0].float(), *args[1:]))


def embedded(
    args: argparse.Namespace, setting: Setting
) -> tuple[RolloutEngine, Callable[[Path], None]]:
    """The engine, and what puts the weights of a folder in."""
    from transformers import AutoModelForCausalLM

    from spec_rollout import TransformersEngine

    policy = AutoModelForCausalLM.from_pretrained(args.old, dtype=getattr(torch, setting.dtype))
    body = policy.dtype
    if setting.float32_head:
        use_float32_head(policy)
    engine = TransformersEngine(policy, num_slots=args.requests[0], **setting.options)

    def load(folder: Path) -> None:
        tensors = dict(weights(folder))
        if setting.float32_head:  # which is tied to the embedding no longer
            tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
        known = policy.state_dict().keys()
        engine.update_weights([(n, t.to(body)) for n, t in tensors.items() if n in known])

    return engine, load


def vllm(
    args: argparse.Namespace, setting: Setting
) -> tuple[RolloutEngine, Callable[[Path], None]]:
    """The same of the plugin."""
    from spec_rollout import VLLMEngine

    engine = VLLMEngine(
        str(args.old),
        num_speculative_tokens=CHUNK,
        llm_args={
            "dtype": setting.dtype,
            "enforce_eager": True,
            "max_model_len": longest_row(args),
            "max_num_seqs": args.requests[0],
            **({"gpu_memory_utilization": 0.4} if torch.cuda.is_available() else {}),
            **setting.options,
        },
    )
    return engine, lambda folder: engine.update_weights(weights(folder))


def mean_bias(logprobs: torch.Tensor, tolerance: float) -> float:
    """docs/acceptance.md's bound on `Coupled`'s bias, in the mean over positions.

    It is a sum over tokens, each times its probability: the mean over tokens drawn estimates it.

    Args:
        logprobs: Of tokens drawn. [tokens].
        tolerance: Nats.
    """
    p = logprobs.double().exp()
    return float(((1 - p) * math.expm1(tolerance) / (p + (1 - p) * math.exp(tolerance))).mean())


def texts(rollouts: Rollouts) -> list[list[int]]:
    return [ids.tolist() for ids in rollouts.response_ids.split(rollouts.response_lens.tolist())]


def outcome(again: Rollouts, drafts: Rollouts, plain: Rollouts) -> Row:
    """What became of drafts.

    Args:
        again: Drafts verified, and gone on with.
        drafts: The responses that they were.
        plain: What is drawn without them.
    """
    kept = int(again.accepted_lens.sum())
    rejected = int((again.accepted_lens < drafts.response_lens).sum())
    same = sum(a == b for a, b in zip(texts(again), texts(plain), strict=True))
    return {
        "rejections_per_token": rejected / (kept + rejected),
        "reused": kept / again.response_ids.numel(),
        "same_texts": same / len(again.accepted_lens),
        "seconds": again.stats.rollout_seconds,
    }


def measure(args: argparse.Namespace, setting: Setting) -> None:
    """Prints the setting's row, as far as it is known, after every run."""
    end = time.monotonic() + args.budget
    engine, load = (embedded if setting.package == "embedded" else vllm)(args, setting)
    sampling = sampling_of(args)
    prompts = prompt_ids(questions(args.data, args.prompts), args.old)
    keys = [prompt_key(ids) for ids in prompts for _ in range(args.group)]
    sample_ids = list(range(args.group)) * len(prompts)

    def run(rule: AcceptanceRule, cached: Rollouts | None = None) -> Rollouts:
        cache = RolloutCache()
        if cached is not None:
            cache.store(keys, sample_ids, cached)
        session = RolloutSession(engine, rule, cache=cache, reuse=cached is not None)
        return session.rollout(prompts, args.group, sampling, step=1, epoch=1)

    plain = drafts = run(Coupled())
    rounding = RolloutSession(engine, NoReuse()).measure_rounding(prompts, args.group, sampling)
    nats = rounding.tolerance
    row: Row = {
        "op": setting.engine,
        "dtype": setting.dtype,
        "batch_invariant": getattr(engine, "batch_invariant", None),
        "num_tokens": drafts.response_ids.numel(),
        "rounding": asdict(rounding),
        "bias": {t: _bias(nats if t == "auto" else t, drafts.logprobs) for t in TOLERANCES[1:]},
        "rules": [],
    }
    # What rounding does in float32 needs no remedy.
    tolerances = TOLERANCES[:1] if setting.dtype == "float32" else TOLERANCES
    resolved = {}
    for tolerance in tolerances:
        for name, rule in RULES.items():
            row["rules"].append({"rule": name, "tolerance": tolerance})
            resolved[name, tolerance] = replace(rule, tolerance=tolerance).with_tolerance(nats)
    _print(row)
    for phase in ("unchanged", "updated"):
        if phase == "updated":
            load(args.new)
            plain = run(Coupled())
        done: dict[AcceptanceRule, Row] = {}  # "auto" is often 0
        longest = 0.0
        for found in row["rules"]:
            name, start = found["rule"], time.monotonic()
            rule = resolved[name, found["tolerance"]]
            if start + longest > end:
                print(f"{setting.engine}, {setting.dtype}: no time left for {phase}, {rule}")
                continue
            strict = done.get(RULES[name])
            if phase == "unchanged" and strict and not strict["rejections_per_token"]:
                done[rule] = strict  # what keeps every token keeps it with a tolerance, too
            elif rule not in done:
                done[rule] = outcome(run(rule, drafts), drafts, plain)
                longest = max(longest, time.monotonic() - start)
            found[phase] = {k: round(v, 5) for k, v in done[rule].items()}
            _print(row)


def _bias(tolerance: float, logprobs: torch.Tensor) -> dict[str, float]:
    return {
        "nats": tolerance,
        "most": -math.expm1(-tolerance),
        "coupled_mean": mean_bias(logprobs, tolerance),
    }


def _print(row: Row) -> None:
    print("ROW " + json.dumps(row), flush=True)


def measure_or_say_why_not(args: argparse.Namespace, setting: Setting) -> None:
    try:
        measure(args, setting)
    except Exception as error:
        if not setting.may_fail:
            raise
        words = f"{type(error).__name__}: {error}".splitlines()[0]
        _print({"op": setting.engine, "dtype": setting.dtype, "error": words})


def run_all(args: argparse.Namespace, policies: Policies) -> None:
    """Measures everything; writes rounding.json in `args.out`."""
    bandwidth = (lambda: copy_bandwidth(1 << 20)) if args.tiny else copy_bandwidth
    results = Results("rounding", args.out, bandwidth)
    more = {
        "training": policies.facts,
        "data": "the demo's arithmetic in words" if args.data is None else args.data.name,
        **{name: getattr(args, name) for name in ("prompts", "group", "temperature", "max_tokens")},
    }
    pythons = {"embedded": Path(sys.executable), "vllm": vllm_python()}
    if "vllm" in args.engines and pythons["vllm"] is None:
        print("vllm is left out: it is neither here nor in .venv-vllm (make venv-vllm)", flush=True)
    chosen = [
        (number, setting, pythons[setting.package])
        for number, setting in enumerate(SETTINGS)
        if setting.package in args.engines
        and setting.dtype in args.dtypes
        and pythons[setting.package] is not None
    ]
    common = ["--old", str(policies.old), "--new", str(policies.new)]
    common += ["--prompts", str(args.prompts), "--group", str(args.group)]
    common += ["--max-tokens", str(args.max_tokens), "--temperature", str(args.temperature)]
    if args.data:
        common += ["--data", str(args.data)]
    end = time.monotonic() + args.budget
    rows: dict[int, Row] = {}
    for place, (number, setting, python) in enumerate(chosen):
        left = max(0.0, (end - time.monotonic()) / (len(chosen) - place))
        command = [str(python), __file__, *common, "--only", str(number), "--budget", str(left)]
        for row in said(command, "ROW", {**vllm_environment("off"), **setting.environment}):
            rows[number] = row
            results.rows = list(rows.values())
            write_json(args.out / "rounding.json", {**results.as_dict(), **more})
        shown = rows[number].get("error") or rows[number]["rounding"]
        print(f"{setting.engine}, {setting.dtype}: {shown}", flush=True)
    print(f"wrote {args.out / 'rounding.json'}")


def main() -> None:
    defaults = {"max_tokens": 80, "temperature": Training().temperature, "budget": 1000.0}
    options = options_of(__doc__, defaults)
    options.add_argument("--prompts", type=int, default=4)
    options.add_argument("--only", type=int, help=argparse.SUPPRESS)  # a process of its own
    for name in ("--old", "--new"):
        options.add_argument(name, type=Path, help=argparse.SUPPRESS)
    args = checked(options, "prompts")
    if args.only is not None:
        args.requests = [args.prompts * args.group]
        measure_or_say_why_not(args, SETTINGS[args.only])
        return
    if args.quick:
        args.prompts, args.group, args.max_tokens = 2, 4, 24
    run_all(args, policies_of(args, Training()))


if __name__ == "__main__":
    main()
