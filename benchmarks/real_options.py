"""What the benchmarks on a model that speaks ask of the command line, and what they run with."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _common import ROOT, parser
from real_policies import Policies, Training, model_folder, prepare

ENGINES = ("embedded", "vllm")
DTYPES = ("float32", "bfloat16")


def options_of(description: str | None, defaults: dict[str, Any]) -> argparse.ArgumentParser:
    """A parser with the options that these benchmarks share.

    Args:
        defaults: Of `max_tokens`, `temperature` and `budget`.
    """
    options = parser(description)
    options.add_argument("--folder", type=Path, default=ROOT / "runs" / "real")
    options.add_argument("--data", type=Path, help="JSONL of questions and answers")
    options.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    options.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    options.add_argument("--group", type=int, default=8, help="samples of a prompt")
    options.add_argument("--max-tokens", type=int, default=defaults["max_tokens"])
    options.add_argument("--temperature", type=float, default=defaults["temperature"])
    options.add_argument(
        "--budget", type=float, default=defaults["budget"], help="seconds of all rollouts"
    )
    options.add_argument("--tiny", action="store_true", help="the demo's model: does it run?")
    return options


def checked(options: argparse.ArgumentParser, *positive: str) -> argparse.Namespace:
    """The arguments as they were given.

    Args:
        positive: Names of further integers, or lists of them, of which none may be below 1.
    """
    args = options.parse_args()
    for name in ("group", "max_tokens", *positive):
        value = getattr(args, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            options.error(f"--{name.replace('_', '-')}: expected >= 1, got {value}")
    if args.data is not None and not args.data.is_file():
        options.error(f"--data: expected a file, got {args.data}")
    return args


def policies_of(args: argparse.Namespace, training: Training) -> Policies:
    """The policies of the training, made the first time; sets up threads and paths on the way.

    With `--tiny` they are those of the demo's model, and `args.data` becomes a file of its task.
    """
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
        torch.set_num_threads(args.threads)
    args.out = args.out.resolve()
    if args.tiny:
        model, args.data = _tiny(args.folder)
        training = replace(training, prompts=2, prompts_per_step=1, lr=1e-3)
    else:
        model = model_folder(args.folder)
    name = "words" if args.data is None else args.data.stem
    return prepare(model, args.data, training, args.folder / name)


def _tiny(folder: Path) -> tuple[Path, Path]:
    """The demo's model, and a file of its task as it is."""
    from spec_rollout.demo import model_dir
    from spec_rollout.demo.task import training_problems

    path = folder / "tiny.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    rows = ({"question": p.prompt, "answer": p.answer} for p in training_problems(64))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Path(model_dir()), path
