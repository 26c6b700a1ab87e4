"""The demo from its preset to summary.json and report.html."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from spec_rollout.ablate.compare import compare_responses
from spec_rollout.ablate.grid import RESPONSES, train_grid
from spec_rollout.ablate.progress import Progress
from spec_rollout.ablate.table import comparison_line, run_facts, table, until
from spec_rollout.acceptance import NoReuse
from spec_rollout.config.sections import ModelConfig
from spec_rollout.demo import model_dir
from spec_rollout.demo.preset import (
    DemoSize,
    Runs,
    cache_off,
    demo_grid,
    judged_run,
    lossless,
    prepare,
)
from spec_rollout.demo.task import training_problems
from spec_rollout.engines import TransformersEngine
from spec_rollout.loading.policy import load_policy
from spec_rollout.report import Run, load_run, write_report
from spec_rollout.report.accuracy import curve_of
from spec_rollout.rollout import RolloutSession
from spec_rollout.runs.environment import environment, num_cores
from spec_rollout.runs.load import number
from spec_rollout.types import SamplingParams

_WORTH_A_THREAD = 0.8  # of the time with one


def demo(
    out: Path,
    runs: Runs,
    size: DemoSize,
    seed: int,
    command: Sequence[str],
    engine: str = "transformers",
) -> dict[str, Any]:
    """Runs the demo once; writes and returns summary.json, and writes report.html.

    Args:
        runs: Settings of section `rollout` by the run's name.
        command: What to write down as the command.
        engine: As `rollout.engine`.

    Raises:
        ValueError: if `out` holds something else.
    """
    prepare(out, list(runs), size)
    grid = demo_grid(runs, out, size, seed, engine)
    configs = grid.configs()
    progress = Progress(
        grid.turns(),
        num_steps=size.num_steps,
        num_epochs=size.epochs,
        num_evals_after=sum(config.eval.at_end for config in configs.values()),
    )
    with progress:
        summaries = train_grid(grid, progress.on_step)
    content: dict[str, Any] = {
        "name": "demo",
        "command": shlex.join(command),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "engine": engine,
        "seed": seed,
        "size": asdict(size),
        "runs": {
            name: run_facts(summary, summaries.get("vanilla"), size.num_eval_samples)
            for name, summary in summaries.items()
        },
        "environment": {**environment(), "threads": torch.get_num_threads()},
    }
    off = cache_off(runs)
    if off is not None:
        for name in lossless(runs):
            content[f"{name}_equals_off"] = compare_responses(
                out / name / RESPONSES, out / off / RESPONSES
            )
    loaded = [load_run(out / name) for name in runs]
    _judge_equals(loaded, content, runs)
    for run in loaded:
        # The speed-up is known only once all runs are.
        run.summary.update(content["runs"][run.name])
    curves = {run.name: curve_of(run, "heldout") for run in loaded}
    costs = until({name: curve for name, curve in curves.items() if len(curve) > 1}, "vanilla")
    for name, values in costs.items():
        content["runs"][name]["until_plain_accuracy"] = values
    write_json(out / "summary.json", content)
    write_report(loaded, out / "report.html", "spec_rollout demo: GRPO with and without reuse")
    return content


def _judge_equals(runs: Sequence[Run], content: Mapping[str, Any], names: Runs) -> None:
    """Lossless runs, which were not judged, have the accuracies of the one that was: after every
    step their weights are the same, as far as their rollouts were found to be."""
    found, judged, off = {run.name: run for run in runs}, judged_run(names), cache_off(names)
    if judged is None or off is None:
        return
    accuracies = {
        split: {
            row["step"]: accuracy
            for row in found[judged].metrics
            if (accuracy := number(row.get(f"accuracy_{split}"))) is not None
        }
        for split in ("train", "heldout")
    }
    pairs = {name: content.get(f"{name}_equals_off") for name in (*lossless(names), off)}
    equal = [name for name, same in pairs.items() if same and same["identical"] == same["total"]]
    if judged != off and judged not in equal:
        return
    for name in (*equal, off):
        if name != judged:
            found[name].judged_elsewhere = accuracies


def result_text(content: Mapping[str, Any], runs: Runs) -> str:
    """The table of a demo, and whether lossless reuse was lossless."""
    text = table(content["runs"])
    off = cache_off(runs)
    for name in lossless(runs):
        same = content.get(f"{name}_equals_off")
        if same is not None:
            other = off if off == "vanilla" else "the same with the cache off"
            text += f"\n\n{comparison_line(name, str(other), same)}"
    return text


def busy_note() -> str | None:
    """A line about other processes' use of the processors; None if there is little."""
    if not hasattr(os, "getloadavg"):
        return None
    load, cores = os.getloadavg()[0], num_cores()
    # The demo itself is one or two of it.
    if load <= cores + 1.0:
        return None
    return (
        f"the machine was busy with other work (load {load:.0f} on {cores} cores): seconds and "
        "speed-ups are less certain than on a quiet one, all else is the same"
    )


def is_lossless(content: Mapping[str, Any], runs: Runs) -> bool:
    """Whether every comparison that was made found all rollouts identical."""
    found = [content.get(f"{name}_equals_off") for name in lossless(runs)]
    return all(same["identical"] == same["total"] for same in found if same is not None)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def fastest_threads() -> int:
    """1 or 2: two where they clearly are faster on this machine as it is now.

    More do not help a model of this size, and where other processes keep the cores busy two threads
    are many times slower than one, because each small operation waits for both. A machine that is
    quiet now may be busy in a minute, so a small gain is not worth that.
    """
    if num_cores() == 1:
        return 1
    policy = load_policy(ModelConfig(str(model_dir()), device="cpu"))
    prompts = policy.tokenizer([problem.prompt for problem in training_problems(16)])["input_ids"]
    session = RolloutSession(TransformersEngine(policy.model, num_slots=256), NoReuse())

    def seconds(threads: int, max_tokens: int = 24) -> float:
        torch.set_num_threads(threads)
        sampling = SamplingParams(max_tokens=max_tokens, stop_token_ids=policy.eos_token_ids)
        return session.rollout(prompts, 16, sampling, step=0, epoch=0).stats.rollout_seconds

    seconds(1, max_tokens=2)  # warm-up
    one = min(seconds(1) for _ in range(2))
    # All of several tries, so that a quiet moment does not decide.
    return 2 if all(seconds(2) < _WORTH_A_THREAD * one for _ in range(3)) else 1
