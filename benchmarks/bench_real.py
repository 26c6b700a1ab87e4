"""Rollouts of a small model that speaks, with each way of reuse, in both engines.

    python benchmarks/bench_real.py
    python benchmarks/bench_real.py --data questions.jsonl --full

The model is SmolLM2-135M-Instruct (tools/real_model.py fetches it), the policies lie an epoch of
GRPO on these very questions apart (`real_policies`), the questions are the demo's arithmetic in
words or rows {"question", "answer"} of a file, as GSM8K has them. Both policies and the model are
kept in `--folder`, made the first time.

For each engine and dtype a process of its own generates what `real_rollouts` lists: in an epoch
where only siblings can help, and in a later one. Everything is in the seconds: lookup,
verification, storing. What reuses is compared with the same engine where it reuses nothing, under
the same noise: with lossless rules these are the same texts, with others seconds are compared per
token. That engine itself is compared with stock vLLM, per token, for the texts differ. Sizes are
gone through in `--repeats` rounds, the largest first, and no round begins that `--budget` would not
let end; results are written after every rollout. `step` is the speed-up of a training step: of
generating and of the update of the same tokens, whose seconds are those of the training above.

At last `real_entropy` says which guesses pass where the policy is uncertain, with a plot beside the
results.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import real_entropy
from _common import ROOT, Results, Timing, copy_bandwidth, vllm_environment, write_json
from real_options import checked, options_of, policies_of
from real_policies import Policies, Training
from real_rollouts import BASES, ORDERS

Answer = dict[str, Any]
Setting = tuple[str, str, int, str, str]  # engine, dtype, requests, phase, contender
_SETTING = ("engine", "dtype", "requests", "phase", "contender")
_MEANS = (
    "num_response_tokens",
    "num_engine_steps",
    "max_row_steps",
    "num_tail_steps",
    "tail_seconds",
    "verification_seconds",
    "tokens_per_step",
    "longest_response",
)


def rows_of(answers: Sequence[Answer], update_seconds: float) -> list[dict[str, Any]]:
    """A row for each setting, of what the processes said so far.

    Args:
        update_seconds: Of the trainer, for a token of a response.
    """
    by_setting: dict[Setting, dict[int, Answer]] = {}
    for answer in answers:
        engine, dtype, requests, phase, contender = (answer[name] for name in _SETTING)
        setting = (engine, dtype, requests, phase, contender)
        by_setting.setdefault(setting, {})[answer["round"]] = answer
    rows = []
    for setting, rounds in by_setting.items():
        engine, dtype, requests, phase, contender = setting
        base = BASES.get(contender)
        if base is None and engine == "vllm" and contender not in ORDERS:
            base = "stock"
        at = "later" if base == "stock" else phase
        theirs = by_setting.get((engine, dtype, requests, at, base)) if base else None
        pairs = [(rounds[r], theirs[r]) for r in rounds if theirs and r in theirs]
        each = list(rounds.values())
        p20, p50, p80 = np.percentile([one["seconds"] for one in each], [20, 50, 80]).tolist()
        tokens = sum(one["num_response_tokens"] for one in each)
        row = {
            "op": ", ".join(map(str, setting)),
            "shape": {"requests": requests},
            "seconds": asdict(Timing(p20, p50, p80, len(each))),
            **dict(zip(_SETTING, setting, strict=True)),
            "reused": sum(one.get("num_reused_tokens", 0) for one in each) / tokens,
            "computed_per_token": sum(one.get("num_computed_tokens", 0) for one in each) / tokens,
            **{k: float(np.mean([one[k] for one in each])) for k in _MEANS if k in each[0]},
        }
        if pairs:
            mine, base_seconds = (
                np.array([_per_token(one) for one in side]) for side in zip(*pairs, strict=True)
            )
            row["base"] = base
            row["over_base"] = float(np.median(base_seconds / mine))
            row["step_over_base"] = float(
                np.median((base_seconds + update_seconds) / (mine + update_seconds))
            )
            longest = [a["max_row_steps"] / max(1, b["max_row_steps"]) for a, b in pairs]
            row["longest_over_base"] = float(np.mean(longest))
        rows.append({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})
    return rows


def _per_token(answer: Answer) -> float:
    return answer["seconds"] / answer["num_response_tokens"]


def crossovers(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Up to how many requests each contender is faster than the engine that reuses nothing.

    `at` is where the speed-up is 1, on a straight line over the logarithm of the number; None where
    it is on one side at all sizes.
    """
    found = []
    names = dict.fromkeys(
        tuple(row[k] for k in ("engine", "dtype", "phase", "contender"))
        for row in rows
        if "over_base" in row and row["contender"] in BASES
    )
    for name in names:
        points = sorted(
            (row["requests"], row["over_base"])
            for row in rows
            if "over_base" in row  # else what it is compared with is still to come
            and tuple(row[k] for k in ("engine", "dtype", "phase", "contender")) == name
        )
        at, text = None, "pays at all sizes" if points[0][1] > 1 else "pays at no size"
        for (a, x), (b, y) in pairwise(points):
            if (x > 1) != (y > 1):
                share = (x - 1) / (x - y)
                at = a * (b / a) ** share
                text = f"pays {'up to' if x > 1 else 'from'} about {at:.0f} requests"
                break
        sizes = f"{points[0][0]} to {points[-1][0]}"
        engine, dtype, phase, contender = name
        found.append(
            {
                **{"engine": engine, "dtype": dtype, "phase": phase, "contender": contender},
                "at": at if at is None else round(at, 1),
                "text": f"{text} ({sizes} tried)" if at is None else text,
            }
        )
    return found


def said(command: list[str], mark: str, environment: Mapping[str, str]) -> Iterator[Answer]:
    """The JSON of each line that begins with `mark`, as it is printed; other lines are passed on.

    Raises:
        RuntimeError: if the command fails; its standard error has been passed on.
    """
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(mark + " "):
                yield json.loads(line.removeprefix(mark + " "))
            elif line.strip():
                print(line, end="", flush=True)
        if process.wait():
            raise RuntimeError(f"{' '.join(command[:6])} ...: exit status {process.returncode}")
    finally:
        process.kill()
        process.wait()


def vllm_python() -> Path | None:
    """A Python that has vLLM: this one, or that of .venv-vllm; None if there is none."""
    import importlib.util

    if importlib.util.find_spec("vllm") is not None:
        return Path(sys.executable)
    other = ROOT / ".venv-vllm" / "bin" / "python"
    return other if (ROOT / ".venv-vllm" / ".installed").exists() else None


class Report:
    """The results file, written anew whenever something is known."""

    def __init__(self, args: argparse.Namespace, policies: Policies) -> None:
        bandwidth = (lambda: copy_bandwidth(1 << 20)) if args.tiny else copy_bandwidth
        self._results = Results("real", args.out, bandwidth)
        self._update_seconds = policies.update_seconds_per_token
        self._answers: list[Answer] = []
        self.more: dict[str, Any] = {
            "training": policies.facts,
            "data": "the demo's arithmetic in words" if args.data is None else args.data.name,
            "temperature": args.temperature,
            "max_tokens": args.max_tokens,
            "stock_is_warm": True,  # as the other engine; it was not in files that do not say so
        }
        self.path: Path = args.out / "real.json"

    def add(self, answer: Answer) -> None:
        self._answers.append(answer)
        shown = ", ".join(str(answer[name]) for name in _SETTING)
        tokens, steps = answer["num_response_tokens"], answer["num_engine_steps"]
        print(f"{shown}: {answer['seconds']:.2f} s, {tokens} tokens, {steps} steps", flush=True)
        self._results.rows = rows_of(self._answers, self._update_seconds)
        self.more["crossovers"] = crossovers(self._results.rows)
        self.write()

    def write(self) -> None:
        write_json(self.path, {**self._results.as_dict(), **self.more})


def run(args: argparse.Namespace, policies: Policies) -> None:
    """Measures everything; writes real.json and real.png in `args.out`."""
    report = Report(args, policies)
    common = ["--old", str(policies.old), "--new", str(policies.new)]
    common += ["--max-tokens", str(args.max_tokens), "--temperature", str(args.temperature)]
    if args.data:
        common += ["--data", str(args.data)]
    folder = Path(__file__).parent
    # It takes no time measurement, and says first how far apart the policies are.
    entropy = [sys.executable, str(folder / "real_entropy.py"), *common]
    entropy += ["--prompts", str(args.entropy_prompts), "--group", str(args.group)]
    for answer in said(entropy, "ENTROPY", {}):
        report.more["entropy"] = answer
        report.write()
        real_entropy.plot(answer, args.out / "real.png")
        print(
            f"{answer['entropy']} nats a token, {answer['divergence']} nats from the old policy; "
            f"right: {answer['right']}",
            flush=True,
        )
    environment = vllm_environment("off")
    if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:  # GiB
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(-(-max(args.requests) // 48))
    pythons = {"embedded": Path(sys.executable), "vllm": vllm_python()}
    if "vllm" in args.engines and pythons["vllm"] is None:
        print("vllm is left out: it is neither here nor in .venv-vllm (make venv-vllm)", flush=True)
    children = [
        (engine, dtype, python)
        for dtype in args.dtypes
        for engine in args.engines
        if (python := pythons[engine]) is not None
    ]
    end = time.monotonic() + args.budget
    for number, (engine, dtype, python) in enumerate(children):
        left = (end - time.monotonic()) / (len(children) - number)
        command = [str(python), str(folder / "real_rollouts.py"), *common]
        command += ["--engine", engine, "--dtype", dtype, "--budget", str(max(0.0, left))]
        command += ["--requests", *map(str, args.requests), "--repeats", str(args.repeats)]
        command += ["--group", str(args.group)]
        for answer in said(command, "ROW", environment):
            report.add(answer)
    for line in report.more.get("crossovers", []):
        print("{engine}, {dtype}, {phase}, {contender}: {text}".format(**line), flush=True)
    print(f"wrote {report.path}")


def main() -> None:
    defaults = {"max_tokens": 128, "temperature": 0.5, "budget": 1900.0}
    options = options_of(__doc__, defaults)
    options.add_argument("--requests", type=int, nargs="+", default=[4, 16, 64])
    options.add_argument("--full", action="store_true", help="256 requests, too")
    options.add_argument("--repeats", type=int, default=1, help="rounds")
    options.add_argument("--lr", type=float, default=Training().lr, help="of the epoch's training")
    options.add_argument("--entropy-prompts", type=int, default=8)
    args = checked(options, "requests", "repeats")
    if args.full:
        args.requests = sorted({*args.requests, 256})
    if args.tiny:
        args.entropy_prompts = 2
    training = Training(
        group=args.group, max_tokens=args.max_tokens, lr=args.lr, temperature=args.temperature
    )
    policies = policies_of(args, training)
    args.out.mkdir(parents=True, exist_ok=True)
    run(args, policies)


if __name__ == "__main__":
    main()
