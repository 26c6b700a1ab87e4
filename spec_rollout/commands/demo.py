"""`spec-rollout demo`: GRPO on a tiny shipped model, plainly and with reuse of rollouts.

Three runs of a few minutes: `vanilla`; `lenient`; and `both`, lossless reuse with proposals from
the prompt's other rollouts, whose rollouts must be those of `vanilla`, token for token. `--full`
makes the large table.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spec_rollout.demo.preset import DemoSize, Runs

HELP = "train a tiny shipped model plain, with lenient and with lossless reuse"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="default: %(default)s")
    parser.add_argument(
        "--full", action="store_true", help="five runs of twice the size: about 10 minutes"
    )
    parser.add_argument("--runs", help="some of the runs, with commas between (default: all)")
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--seeds", help="several seeds, e.g. 0,1,2; each gets its own folder in OUT"
    )
    parser.add_argument(
        "--results", type=Path, help="also write the summary, or all summaries, here"
    )
    parser.add_argument("--threads", type=int, help="torch threads; measured if left out")
    parser.add_argument("--epochs", type=int, help="passes over the prompts")
    parser.add_argument(
        "--short", action="store_true", help="seconds instead of minutes: does it run?"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the demo; 0 if it ran through and lossless reuse was lossless, else 1.

    Raises:
        ValueError: naming the option, before anything is written.
    """
    seeds = _seeds(args)
    if args.epochs is not None and args.epochs < 2:
        raise ValueError(
            f"--epochs: expected at least 2 (the first has nothing to reuse), got {args.epochs}"
        )
    from spec_rollout.demo import preset

    runs = _chosen(args.runs, preset.FULL_RUNS if args.full else preset.QUICK_RUNS)
    size = preset.SHORT if args.short else preset.FULL if args.full else preset.QUICK
    if args.epochs is not None:
        size = replace(size, epochs=args.epochs)
    print("loading torch and the model", flush=True)
    from spec_rollout.demo.run import (
        busy_note,
        demo,
        is_lossless,
        result_text,
        write_json,
    )

    size = replace(size, threads=_threads(args))
    contents = []
    for seed in seeds:
        out = args.out if args.seeds is None else args.out / f"seed-{seed}"
        print(_announcement(runs, size, seed) + _expected(args), flush=True)
        content = demo(out, runs, size, seed, _shown(args), args.engine)
        contents.append(content)
        print(
            f"\n{result_text(content, runs)}\n\n"
            f"summary: {out / 'summary.json'}, report: {out / 'report.html'}"
        )
        note = busy_note()
        if note is not None:
            print(f"note: {note}")
    if args.results is not None:
        content = contents[0]
        if args.seeds is not None:
            shared = {key: content[key] for key in ("command", "date", "environment")}
            content = {**shared, "summaries": contents}
        write_json(args.results, {**content, "name": args.results.stem})
        print(f"results: {args.results}")
    if not args.full:
        print("the large table (five runs, about 10 minutes): make demo-full")
    return 0 if all(is_lossless(content, runs) for content in contents) else 1


def _seeds(args: argparse.Namespace) -> list[int]:
    if args.seeds is None:
        return [args.seed]
    try:
        return [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        raise ValueError(f"--seeds: expected integers with commas, got {args.seeds!r}") from None


def _chosen(names: str | None, runs: Runs) -> Runs:
    chosen = list(runs) if names is None else names.split(",")
    for name in chosen:
        if name not in runs:
            raise ValueError(f"--runs: expected names out of {', '.join(runs)}, got {name!r}")
    return {name: runs[name] for name in chosen}


def _threads(args: argparse.Namespace) -> int | None:
    """Threads of torch; None leaves what the environment says."""
    if args.threads is not None:
        return args.threads
    if args.engine == "vllm":
        # With more, vLLM's CPU kernels add up in an order that depends on the batch, and the run
        # with the cache off is the same only up to rounding.
        print("torch threads: 1", flush=True)
        return 1
    if "OMP_NUM_THREADS" in os.environ:
        return None
    from spec_rollout.demo.run import fastest_threads

    threads = fastest_threads()
    print(f"torch threads: {threads} (of 1 and 2, what is faster here)", flush=True)
    return threads


def _announcement(runs: Runs, size: DemoSize, seed: int) -> str:
    rollouts = size.num_prompts * size.num_samples
    return (
        f"training (seed {seed}): {', '.join(runs)}; each {size.num_steps} steps in {size.epochs} "
        f"epochs of {rollouts:,} rollouts, taking turns"
    )


def _expected(args: argparse.Namespace) -> str:
    """How long it takes, for the sizes that were measured."""
    if args.short or args.epochs is not None or args.runs is not None or args.engine == "vllm":
        return ""
    return f"; about {10 if args.full else 3} minutes on two quiet cores"


def _shown(args: argparse.Namespace) -> list[str]:
    """The command, without where a machine keeps its folders, which is nobody else's business."""
    arguments = args.argv[1:]
    shown = [Path(text).name if Path(text).is_absolute() else text for text in arguments]
    return ["spec-rollout", "demo", *shown]
