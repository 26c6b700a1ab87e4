"""The demo: one tiny model, trained by GRPO plainly, with lenient and with lossless reuse of
rollouts.

    python -m spec_rollout.commands.demo --out runs/demo

Every run starts from the same checkpoint on the same prompts and differs in nothing but the
acceptance rule. `both` is lossless reuse and, where no draft is followed, proposals from the
prompt's other rollouts. `coupled_off` is `coupled` with the cache off: the rollouts of both must be
the same as its own, token for token, which is checked.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spec_rollout.ablate.compare import ResponseLog, compare_responses
from spec_rollout.commands.malloc import keep_freed_memory
from spec_rollout.runs.environment import environment, num_cores

if TYPE_CHECKING:
    from spec_rollout.config.sections import RunConfig
    from spec_rollout.runs.summary import RunSummary

RUNS: Mapping[str, Mapping[str, Any]] = {
    "vanilla": {"rule": "none", "reuse": False},
    "lenient": {"rule": "lenient", "log_lenience": 0.5},
    "coupled": {"rule": "coupled"},
    "both": {"rule": "coupled", "drafting": True},
    "coupled_off": {"rule": "coupled", "reuse": False},
}
# Lossless runs: their rollouts must be those of `coupled_off`.
LOSSLESS = ("coupled", "both")


@dataclass(frozen=True, slots=True)
class DemoSize:
    """How much is trained and evaluated.

    Attributes:
        num_prompts: Training prompts, all of them evaluated.
        num_heldout: Held-out prompts, only evaluated.
        prompts_per_step: Prompts of one training step; num_samples rollouts each.
        num_samples: Rollouts per prompt.
        epochs: Passes over the prompts; from the second on there is something to reuse.
        num_eval_samples: Fresh samples per evaluated prompt, before and after training.
        lr: Such that at log_lenience 0.5 about two thirds of all tokens are reused, as in the
            published runs.
        threads: CPU threads of torch; None is torch's choice.
    """

    num_prompts: int = 256
    num_heldout: int = 256
    prompts_per_step: int = 128
    num_samples: int = 8
    epochs: int = 4
    num_eval_samples: int = 2
    lr: float = 4e-4
    threads: int | None = None


SHORT = DemoSize(
    num_prompts=8, num_heldout=8, prompts_per_step=4, num_samples=2, epochs=2, num_eval_samples=1
)


def demo_config(
    name: str,
    out: Path,
    size: DemoSize,
    seed: int,
    *,
    evaluate_first: bool = True,
    engine: str = "transformers",
) -> RunConfig:
    """Config of one run, written to `out`/`name`; the prompts are expected in `out`.

    Args:
        evaluate_first: Evaluate before training too; all runs of a seed start from the same weights
            and evaluate them with the same noise, so once is enough.
        engine: As `rollout.engine`.
    """
    from spec_rollout.config.sections import (
        CheckpointConfig,
        DataConfig,
        EvalConfig,
        LogConfig,
        ModelConfig,
        RewardConfig,
        RolloutConfig,
        RunConfig,
        TrainConfig,
    )
    from spec_rollout.demo import model_dir
    from spec_rollout.demo.task import MAX_RESPONSE_TOKENS

    return RunConfig(
        model=ModelConfig(path=str(model_dir()), device="cpu"),
        data=DataConfig(path=str(out / "train.jsonl")),
        rollout=RolloutConfig(
            engine=engine,
            num_samples=size.num_samples,
            max_tokens=MAX_RESPONSE_TOKENS,
            # All rollouts of a step at once: more slots were faster for the plain run, which the
            # others are compared with, as far as benchmarks/bench_engine.py sweeps them (256).
            num_slots=1024,
            **RUNS[name],
        ),
        reward=RewardConfig(functions=("spec_rollout.demo.task:reward",)),
        train=TrainConfig(
            seed=seed,
            prompts_per_step=size.prompts_per_step,
            epochs=size.epochs,
            lr=size.lr,
            betas=(0.9, 0.95),
            micro_batch_tokens=4096,
            threads=size.threads,
        ),
        eval=EvalConfig(
            path=str(out / "heldout.jsonl"),
            num_train_prompts=size.num_prompts,
            num_samples=size.num_eval_samples,
            at_start=evaluate_first,
            # Their weights are those of `coupled`.
            at_end=name not in ("both", "coupled_off"),
        ),
        checkpoint=CheckpointConfig(at_end=False),
        log=LogConfig(run_dir=str(out / name)),
    )


def fastest_threads() -> int:
    """1 or 2, whichever lets torch sample faster on this machine as it is now.

    More do not help a model of this size, and where other processes keep the cores busy two threads
    are many times slower than one, because each small operation waits for both.
    """
    import torch

    from spec_rollout.acceptance import NoReuse
    from spec_rollout.config.sections import ModelConfig
    from spec_rollout.demo import model_dir
    from spec_rollout.demo.task import training_problems
    from spec_rollout.engines import TransformersEngine
    from spec_rollout.loading.policy import load_policy
    from spec_rollout.rollout import RolloutSession
    from spec_rollout.types import SamplingParams

    if num_cores() == 1:
        return 1
    policy = load_policy(ModelConfig(str(model_dir()), device="cpu"))
    prompts = policy.tokenizer([problem.prompt for problem in training_problems(16)])["input_ids"]
    session = RolloutSession(TransformersEngine(policy.model, num_slots=256), NoReuse())

    def seconds(threads: int, max_tokens: int = 24) -> float:
        torch.set_num_threads(threads)
        sampling = SamplingParams(max_tokens=max_tokens)
        return session.rollout(prompts, 16, sampling, step=0, epoch=0).stats.rollout_seconds

    seconds(1, max_tokens=2)  # warm-up
    one = max(seconds(1) for _ in range(2))
    # All of several tries, so that a quiet moment does not decide.
    return 2 if all(seconds(2) < one for _ in range(3)) else 1


def prepare(out: Path, names: Sequence[str], size: DemoSize) -> None:
    """Writes the prompts and makes room for the runs: earlier results of the same demo are removed.

    Raises:
        ValueError: if a run's folder holds something else than a run.
    """
    from spec_rollout.demo.task import heldout_problems, training_problems, write_jsonl

    for name in names:
        folder = out / name
        if folder.exists() and any(folder.iterdir()) and not (folder / "config.toml").is_file():
            raise ValueError(
                f"--out: expected a new folder or an earlier demo, got {folder} with other files"
            )
    for name in names:
        if (out / name).exists():
            shutil.rmtree(out / name)
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(training_problems(size.num_prompts), out / "train.jsonl")
    write_jsonl(heldout_problems(size.num_heldout), out / "heldout.jsonl")


def run_all(
    names: Sequence[str], out: Path, size: DemoSize, seed: int, engine: str
) -> dict[str, RunSummary]:
    """Trains all runs and saves the ids of each one's training rollouts in responses.npz.

    On the embedded engine the runs take turns, step by step, so that a machine that gets slower or
    faster does so for all of them. vLLM's engines run one after the other: an engine's process
    group is the whole process's.
    """
    from spec_rollout.train.trainer import Job, run_together

    responses = {name: ResponseLog() for name in names}
    jobs = {
        name: Job(
            # Evaluated once before training: the weights are the same for all.
            demo_config(name, out, size, seed, evaluate_first=name == names[0], engine=engine),
            on_step=_ticker(name),
            on_rollouts=responses[name].add,
        )
        for name in names
    }
    turns = [list(names)] if engine == "transformers" else [[name] for name in names]
    summaries: dict[str, RunSummary] = {}
    for together in turns:
        print(f"training (seed {seed}): {', '.join(together)}", flush=True)
        for name, summary in zip(
            together, run_together([jobs[name] for name in together]), strict=True
        ):
            responses[name].save(out / name / "responses.npz")
            summaries[name] = summary
    before = summaries[names[0]].accuracy_before
    return {name: replace(summary, accuracy_before=before) for name, summary in summaries.items()}


def _ticker(name: str) -> Callable[[Mapping[str, Any]], None] | None:
    """One line per epoch's worth of progress where no progress bar is shown; None on a terminal."""
    if sys.stderr.isatty():
        return None
    last = [-1]

    def tick(row: Mapping[str, Any]) -> None:
        if row["epoch"] != last[0] and "reward" in row:
            last[0] = row["epoch"]
            print(f"  {name}: epoch {row['epoch']}, reward {row['reward']:.3f}", flush=True)

    return tick


def run_facts(
    summary: RunSummary, vanilla: RunSummary | None, num_eval_samples: int
) -> dict[str, Any]:
    """What summary.json says about one run."""
    totals, later = summary.totals, summary.after_first_epoch
    speedup = None
    if vanilla is not None and later.rollout_seconds > 0:
        speedup = vanilla.after_first_epoch.rollout_seconds / later.rollout_seconds
    return {
        "seed": summary.seed,
        "rule": summary.rule,
        "reuse": summary.reuse,
        "drafting": summary.drafting,
        "steps": totals.steps,
        "epochs": summary.epochs,
        "rollout_seconds": totals.rollout_seconds,
        "verification_seconds": totals.verification_seconds,
        "decode_seconds": totals.decode_seconds,
        "train_seconds": totals.train_seconds,
        "rollout_seconds_after_first_epoch": later.rollout_seconds,
        "effective_speedup": speedup,
        "generated_tokens": totals.num_generated_tokens,
        "response_tokens": totals.num_response_tokens,
        "reused_fraction": totals.reused_fraction,
        "fully_reused_fraction": totals.fully_reused_fraction,
        "reused_fraction_after_first_epoch": later.reused_fraction,
        "accepted_proposals": totals.num_accepted_proposals,
        "proposed_tokens": totals.num_proposed_tokens,
        "decode_steps_after_first_epoch": later.num_decode_steps,
        "longest_rollout_steps_after_first_epoch": later.max_row_steps,
        "tail_seconds_after_first_epoch": later.tail_seconds,
        "accuracy_before": summary.accuracy_before,
        "accuracy_after": summary.accuracy_after,
        "reward_last_step": summary.reward_last,
        "num_eval_samples": num_eval_samples,
    }


def demo(
    out: Path,
    names: Sequence[str],
    size: DemoSize,
    seed: int,
    command: Sequence[str],
    engine: str = "transformers",
) -> dict[str, Any]:
    """Runs the demo once; writes and returns summary.json, and writes report.html."""
    import torch

    from spec_rollout.report import load_run, write_report

    prepare(out, names, size)
    summaries = run_all(names, out, size, seed, engine)
    content: dict[str, Any] = {
        "name": "demo",
        "command": shlex.join(command),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "engine": engine,
        "seed": seed,
        "size": asdict(size),
        "runs": {
            name: run_facts(s, summaries.get("vanilla"), size.num_eval_samples)
            for name, s in summaries.items()
        },
        "environment": {**environment(), "threads": torch.get_num_threads()},
    }
    if "coupled_off" in summaries:
        for name in summaries.keys() & set(LOSSLESS):
            content[f"{name}_equals_off"] = compare_responses(
                out / name / "responses.npz", out / "coupled_off" / "responses.npz"
            )
    write_json(out / "summary.json", content)
    runs = [load_run(out / name) for name in names]
    for run in runs:
        # The speed-up is known only once all runs are.
        run.summary.update(content["runs"][run.name])
    write_report(runs, out / "report.html", "spec_rollout demo: GRPO with and without reuse")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def table(content: Mapping[str, Any]) -> str:
    """The result as text, one column per run."""
    runs = content["runs"]

    def accuracy(run: Mapping[str, Any], split: str) -> str:
        before, after = run["accuracy_before"].get(split), run["accuracy_after"].get(split)
        return "-" if before is None or after is None else f"{before:.1%} -> {after:.1%}"

    def speedup(run: Mapping[str, Any]) -> str:
        return "-" if run["effective_speedup"] is None else f"{run['effective_speedup']:.2f}x"

    lines: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
        ("rollout seconds, everything counted", lambda r: f"{r['rollout_seconds']:.1f}"),
        ("  of these verification", lambda r: f"{r['verification_seconds']:.1f}"),
        ("effective speed-up from epoch 2 on", speedup),
        ("response tokens", lambda r: f"{r['response_tokens']:,}"),
        ("generated tokens", lambda r: f"{r['generated_tokens']:,}"),
        ("reused tokens", lambda r: f"{r['reused_fraction']:.1%}"),
        ("fully reused rollouts", lambda r: f"{r['fully_reused_fraction']:.1%}"),
        ("accepted proposals", lambda r: f"{r['accepted_proposals']:,}"),
        (
            "decoding steps from epoch 2 on",
            lambda r: f"{r['decode_steps_after_first_epoch']:,}",
        ),
        ("accuracy, training prompts", lambda r: accuracy(r, "train")),
        ("accuracy, held-out prompts", lambda r: accuracy(r, "heldout")),
    ]
    rows = [["", *runs], *([label, *map(cell, runs.values())] for label, cell in lines)]
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    text = "\n".join(
        row[0].ljust(widths[0])
        + "".join(f"  {cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )
    for name in LOSSLESS:
        same = content.get(f"{name}_equals_off")
        if same is not None:
            text += (
                f"\n\n{name} and the same with the cache off: {same['identical']:,} of "
                f"{same['total']:,} "
                "rollouts identical, token for token"
            )
            if same["first_difference"] is not None:
                text += f"\nfirst difference: {same['first_difference']}"
    return text


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    options = argparse.ArgumentParser(prog="spec-rollout demo", description=__doc__.splitlines()[0])
    options.add_argument("--out", type=Path, default=Path("runs/demo"), help="default: %(default)s")
    options.add_argument("--runs", help=f"default: {','.join(RUNS)}")
    options.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument(
        "--seeds", help="several seeds, e.g. 0,1,2; each gets its own folder in OUT"
    )
    options.add_argument(
        "--results", type=Path, help="also write the summary, or all summaries, here"
    )
    options.add_argument("--threads", type=int, help="torch threads; measured if left out")
    options.add_argument("--epochs", type=int, help="passes over the prompts")
    options.add_argument(
        "--short", action="store_true", help="seconds instead of minutes: does it run?"
    )
    args = options.parse_args(argv)
    args.runs = list(RUNS) if args.runs is None else args.runs.split(",")
    for name in args.runs:
        if name not in RUNS:
            raise ValueError(f"--runs: expected names out of {', '.join(RUNS)}, got {name!r}")
    try:
        args.seeds = None if args.seeds is None else [int(s) for s in args.seeds.split(",")]
    except ValueError:
        raise ValueError(f"--seeds: expected integers with commas, got {args.seeds!r}") from None
    if args.epochs is not None and args.epochs < 2:
        raise ValueError(
            f"--epochs: expected at least 2 (the first has nothing to reuse), got {args.epochs}"
        )
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; 0 if it ran through and lossless reuse was lossless, else 1."""
    args = _parse(argv)
    if argv is None:
        keep_freed_memory()
    size = SHORT if args.short else DemoSize()
    if args.epochs is not None:
        size = replace(size, epochs=args.epochs)
    arguments = sys.argv[1:] if argv is None else argv
    # Where a machine keeps its folders is nobody else's business.
    shown = [Path(a).name if Path(a).is_absolute() else a for a in arguments]
    command = ["python", "-m", "spec_rollout.commands.demo", *shown]
    seeds = [args.seed] if args.seeds is None else args.seeds
    size = replace(size, threads=args.threads)
    if args.threads is None and args.engine == "vllm":
        # With more, vLLM's CPU kernels add up in an order that depends on the batch, and the run
        # with the cache off is the same only up to rounding.
        size = replace(size, threads=1)
        print("torch threads: 1", flush=True)
    elif args.threads is None and "OMP_NUM_THREADS" not in os.environ:
        size = replace(size, threads=fastest_threads())
        print(f"torch threads: {size.threads} (the faster of 1 and 2 here)", flush=True)
    contents = []
    for seed in seeds:
        out = args.out if args.seeds is None else args.out / f"seed-{seed}"
        contents.append(demo(out, args.runs, size, seed, command, args.engine))
        print(
            f"\n{table(contents[-1])}\n\nsummary: {out / 'summary.json'}, report: "
            f"{out / 'report.html'}"
        )
    if args.results is not None:
        content = contents[0]
        if args.seeds is not None:
            shared = {key: content[key] for key in ("command", "date", "environment")}
            content = {**shared, "summaries": contents}
        write_json(args.results, {**content, "name": args.results.stem})
        print(f"results: {args.results}")
    lossless = all(
        same["identical"] == same["total"]
        for content in contents
        for name in LOSSLESS
        if (same := content.get(f"{name}_equals_off")) is not None
    )
    return 0 if lossless else 1


if __name__ == "__main__":
    sys.exit(main())
