"""Steps of TRL and verl on a CPU, with this package and without.

    python benchmarks/bench_trainers.py
    python benchmarks/bench_trainers.py --trainers trl --repeats 5

| setup | contender | |
|---|---|---|
| trl_vllm | stock | `GRPOTrainer` with its colocated vLLM |
| | drafting | the same, `SPEC_ROLLOUT=drafting` |
| | adapter | the same, `rollout_func=SpecRollout()` |
| trl_model | stock | `GRPOTrainer`, which generates with its own model |
| | adapter | the same, `rollout_func=SpecRollout()` |
| verl | stock | `main_ppo` |
| | drafting | the same, `SPEC_ROLLOUT=drafting` |
| | coupled | the same, `SPEC_ROLLOUT=coupled` and the override with `ReuseManager` |

Each run is a training of its own, several epochs of the same prompts, in the environment that
`make test-trl` or `make test-verl` made; a trainer without one is left out. One process works at a
time, with one thread, and the order of the contenders rotates from repeat to repeat. The model and
the task are those of tests/trainers. The seconds are the trainers' own (`trainer_runs.py` says
which); verification, the cache, what is shared and the way of the weights to the engine are among
them. In the first epoch nothing can be followed, so it stands apart; its first step, in which
processes start, is left out. verl looks every two seconds whether rollouts are finished, here every
20 ms (`verl_sampler.py`).

`--quick` is tiny, and runs TRL alone unless `--trainers` names verl, which takes minutes to start.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import ROOT, Results, Timing, parser
from trainer_runs import Step

RUN_SECONDS = 7200  # a run that hangs
MANAGER = (
    "+actor_rollout_ref.rollout.agent.agent_loop_manager_class="
    "spec_rollout.adapters.verl.ReuseManager"
)
# Of each setup: its trainer, and of each contender SPEC_ROLLOUT and the options of its run.
Contender = tuple[str | None, dict[str, Any]]
SETUPS: dict[str, tuple[str, dict[str, Contender]]] = {
    "trl_vllm": (
        "trl",
        {
            "stock": (None, {"engine": "vllm", "adapter": None}),
            "drafting": ("drafting", {"engine": "vllm", "adapter": None}),
            "adapter": (None, {"engine": "vllm", "adapter": {}}),
        },
    ),
    "trl_model": (
        "trl",
        {
            "stock": (None, {"engine": "model", "adapter": None}),
            "adapter": (None, {"engine": "model", "adapter": {}}),
        },
    ),
    "verl": (
        "verl",
        {
            "stock": (None, {"variable": "off", "more": []}),
            "drafting": (None, {"variable": "drafting", "more": []}),
            "coupled": (None, {"variable": "coupled", "more": [MANAGER]}),
        },
    ),
}
TRAINERS = tuple(dict.fromkeys(trainer for trainer, _ in SETUPS.values()))
SIZES: dict[str, dict[str, Any]] = {
    "trl": {
        "prompts": 32,
        "generations": 8,
        "rows_per_step": 64,
        "max_tokens": 160,
        "epochs": 3,
        "learning_rate": 2e-5,
        "float32": True,
    },
    "verl": {"generations": 8, "more": ["trainer.total_epochs=4"]},
}
QUICK: dict[str, dict[str, Any]] = {
    "trl": {**SIZES["trl"], "prompts": 8, "rows_per_step": 16, "max_tokens": 32, "epochs": 2}
    | {"generations": 4},
    "verl": {"generations": 4, "more": ["trainer.total_epochs=2"]},
}


def environment_of(trainer: str) -> Path | None:
    """The interpreter of the environment with `trainer`; says so and returns None if missing."""
    folder = ROOT / f".venv-{trainer}"
    python = folder / "bin" / "python"
    if (folder / ".installed").is_file() and python.is_file():
        return python
    print(f"{trainer} is left out: no {folder.name} here (make test-{trainer} makes it)")
    return None


def run(python: Path, setup: str, contender: str, folder: Path, *, quick: bool) -> dict[str, Any]:
    """One training; what `trainer_runs.py` wrote of it.

    Args:
        folder: Of its files; new, beside those of other runs.

    Raises:
        RuntimeError: if it fails; with the end of its log.
    """
    trainer, contenders = SETUPS[setup]
    variable, options = contenders[contender]
    sizes = (QUICK if quick else SIZES)[trainer]
    if "more" in options:
        options = {**options, "more": sizes["more"] + options["more"]}
    options = {**sizes, **options}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    environment.pop("SPEC_ROLLOUT", None)
    if variable is not None:
        environment["SPEC_ROLLOUT"] = variable
    folder.mkdir()
    log = folder / "log"
    command = [python, Path(__file__).with_name("trainer_runs.py"), trainer, json.dumps(options)]
    with log.open("w") as output:
        status = subprocess.run(
            [*map(str, command), str(folder)],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=RUN_SECONDS,
            check=False,
        ).returncode
    if status:
        end = log.read_text(errors="replace")[-4000:]
        raise RuntimeError(f"{setup}, {contender}: ended with {status}\n{end}")
    found = json.loads((folder / "run.json").read_text())
    found["steps"] = [Step(**step) for step in found["steps"]]
    return found


def _timing(values: Iterable[float]) -> Timing:
    samples = list(values)
    p20, p50, p80 = np.percentile(samples, [20, 50, 80]).tolist()
    return Timing(p20, p50, p80, len(samples))


def _speedup(
    stock: list[list[Step]], ours: list[list[Step]], seconds: Callable[[Step], float]
) -> float:
    """Median over the repeats. Per token: what is drawn differs from contender to contender."""

    def per_token(steps: list[Step]) -> float:
        return sum(map(seconds, steps)) / sum(step.tokens for step in steps)

    ratios = [per_token(a) / per_token(b) for a, b in zip(stock, ours, strict=True)]
    return round(float(np.median(ratios)), 4)


def add_rows(results: Results, setup: str, found: dict[str, list[list[Step]]], **more: Any) -> None:
    """A row for each contender of `setup` and for the first and the later epochs.

    Args:
        found: Of each contender the steps of each of its runs. The first step of a run, in which
            processes start and memory is touched first, counts nowhere.
        more: What stands in every row.
    """
    for which in ("first", "later"):
        first = which == "first"
        parts = {
            name: [[step for step in run[1:] if (step.epoch == 0) == first] for run in runs]
            for name, runs in found.items()
        }
        for name, runs in parts.items():
            steps = [step for run in runs for step in run]
            engine_steps = [step.engine_steps for step in steps if step.engine_steps is not None]
            results.add(
                f"{setup}, {name}, {which}",
                timing=_timing(step.rollout_seconds for step in steps),
                dtype="float32",
                setup=setup,
                contender=name,
                which=which,
                step_seconds=asdict(_timing(step.step_seconds for step in steps)),
                rollout_speedup=_speedup(parts["stock"], runs, lambda s: s.rollout_seconds),
                step_speedup=_speedup(parts["stock"], runs, lambda s: s.step_seconds),
                engine_steps=round(float(np.mean(engine_steps)), 1) if engine_steps else None,
                tokens=round(sum(step.tokens for step in steps) / len(steps), 1),
                repeats=len(runs),
                **more,
            )


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=3, help="trainings of each contender")
    options.add_argument("--trainers", nargs="+", choices=TRAINERS, help="all if left out")
    options.add_argument("--name", default="trainers", help="of the results file")
    args = options.parse_args()
    if args.repeats < 1:
        options.error(f"--repeats: expected >= 1, got {args.repeats}")
    if args.quick:
        args.repeats = 1
    wanted = args.trainers or (["trl"] if args.quick else list(TRAINERS))
    pythons = {name: path for name in wanted if (path := environment_of(name)) is not None}
    if not pythons:
        sys.exit("nothing to measure: none of the trainers is installed")
    torch.set_num_threads(1)  # as in the runs
    results = Results(args.name, args.out)
    with tempfile.TemporaryDirectory() as folder:
        for setup, (trainer, contenders) in SETUPS.items():
            if trainer not in pythons:
                continue
            found: dict[str, list[list[Step]]] = {name: [] for name in contenders}
            for repeat in range(args.repeats):
                shift = repeat % len(contenders)
                names = list(contenders)
                for name in names[shift:] + names[:shift]:
                    place = Path(folder) / f"{setup}_{name}_{repeat}"
                    made = run(pythons[trainer], setup, name, place, quick=args.quick)
                    found[name].append(made["steps"])
                    line = {"setup": setup, "contender": name, "repeat": repeat}
                    line["steps"] = [asdict(step) for step in made["steps"]]
                    print(json.dumps(line), flush=True)
            sizes = (QUICK if args.quick else SIZES)[trainer]
            add_rows(results, setup, found, sizes=sizes, versions=made["versions"])
    results.write()


if __name__ == "__main__":
    main()
