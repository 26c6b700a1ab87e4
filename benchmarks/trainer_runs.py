"""One run of a trainer in its own environment, for `bench_trainers.py`:

    .venv-trl/bin/python benchmarks/trainer_runs.py trl OPTIONS FOLDER
    .venv-verl/bin/python benchmarks/trainer_runs.py verl OPTIONS FOLDER

The runs are those of tests/trainers, which say what is trained. What a step took is written to
FOLDER/run.json. OPTIONS is JSON: what the two functions below take.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent / "tests"
# Of a step of verl, as it names them.
TRAINING = ("reward", "old_log_prob", "ref", "values", "adv", "update_critic", "update_actor")


@dataclass(frozen=True, slots=True)
class Step:
    """What a step of the training took.

    Attributes:
        epoch: From 0.
        rollout_seconds: Of the weights' way to the engine and of the rollouts, all included.
        step_seconds: As the trainer logs it.
        tokens: Of the responses.
        engine_steps: Forward passes of the engine; None where they are not known.
    """

    epoch: int
    rollout_seconds: float
    step_seconds: float
    tokens: int
    engine_steps: int | None


def run_trl(folder: Path, **options: Any) -> list[Step]:
    """TRL's `GRPOTrainer`.

    `step_seconds` is TRL's `step_time`, without the optimizer. TRL has no time of the whole rollout
    in its log; that of its method `_generate` is taken here.

    Args:
        folder: Of its files.
        **options: `trl_run.Options`.

    Raises:
        RuntimeError: if drafts were asked for and none was used.
    """
    sys.path.insert(0, str(TESTS / "trainers" / "trl"))
    import trl_run

    # The tests want runs that do not depend on the machine, and look at every log-prob.
    trl_run.even_steps = lambda: None  # type: ignore[assignment]
    trl_run.noted = lambda rollout, notes: rollout  # type: ignore[assignment]
    from trl import GRPOTrainer

    seconds: list[float] = []
    original = GRPOTrainer._generate

    def generate(self: Any, prompts: Any) -> Any:
        start = time.perf_counter()
        output = original(self, prompts)
        seconds.append(time.perf_counter() - start)
        return output

    GRPOTrainer._generate = generate
    wanted = trl_run.Options(**options)
    trl_run.main(wanted, folder)
    result = json.loads((folder / "rank0.json").read_text())
    logged = [row for row in result["history"] if "step_time" in row]
    steps_per_epoch = wanted.prompts * wanted.generations // wanted.rows_per_step
    steps: list[Step] = []
    before = 0
    for number, (row, call, spent) in enumerate(zip(logged, result["calls"], seconds, strict=True)):
        lengths = [len(ids) for ids in call["completion_ids"]]
        if wanted.engine == "vllm":
            engine_steps = call["engine_steps"] - before
            before = call["engine_steps"]
        elif wanted.adapter is not None:
            engine_steps = round(row["spec_rollout/engine_steps"])
        else:  # TRL's own `generate` goes on until the longest row has ended
            engine_steps = max(lengths)
        steps.append(
            Step(number // steps_per_epoch, spent, row["step_time"], sum(lengths), engine_steps)
        )
    reused = [row.get("spec_rollout/reused_fraction", 0.0) for row in logged]
    if wanted.adapter is not None and not any(reused):
        raise RuntimeError("SpecRollout: expected reused tokens in a later epoch, got none")
    if os.environ.get("SPEC_ROLLOUT") and not result["remembers"]["num_served"]:
        raise RuntimeError("SPEC_ROLLOUT: expected requests served by it, got none")
    return steps


def run_verl(folder: Path, *, variable: str, generations: int, more: list[str]) -> list[Step]:
    """verl's `main_ppo`, on the tests' model and data, which are made where they are missing.

    All times are verl's own: the rollouts' is `timing_s/step` without the parts that train, so
    that what the manager does before verl's `gen` and the weights' way to the engine are in it.
    verl logs no count of engine steps. Its sampler is `verl_sampler.EagerSampler`.

    Args:
        folder: Of its files; the model and the data are beside it.
        variable: SPEC_ROLLOUT.
        generations: Samples of each prompt.
        more: Further overrides.

    Raises:
        RuntimeError: if drafts were asked for and the engine does not say that it has them.
    """
    sys.path[:0] = [str(TESTS / "trainers" / "verl"), str(TESTS)]
    # Ray's processes look for the tests' modules, too.
    os.environ["PYTHONPATH"] = str(TESTS)
    import verl_runs

    shared = folder.parent / "verl"
    if not (shared / "train.parquet").exists():
        verl_runs.make_model(shared / "model")
        verl_runs.make_data(shared / "train.parquet")
    sampler = "trainer.v1.sampler.custom_sampler"
    run = verl_runs.run_ppo(
        shared,
        folder.name,
        variable,
        f"actor_rollout_ref.rollout.n={generations}",
        f"{sampler}.path={HERE / 'verl_sampler.py'}",
        f"{sampler}.name=EagerSampler",
        *more,
    )
    if variable != "off" and "requests are proposed what this engine generated" not in run.log:
        raise RuntimeError(f"SPEC_ROLLOUT={variable}: expected its line in vLLM's log, got none")
    steps_per_epoch = verl_runs.NUM_PROMPTS // verl_runs.BATCH
    rows = verl_runs.BATCH * generations
    return [
        Step(
            number // steps_per_epoch,
            step["timing_s/step"] - sum(step.get(f"timing_s/{part}", 0.0) for part in TRAINING),
            step["timing_s/step"],
            round(step["response_length/mean"] * rows),
            None,
        )
        for number, step in enumerate(run.metrics)
    ]


def main() -> None:
    trainer, options, folder = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
    steps = {"trl": run_trl, "verl": run_verl}[trainer](folder, **options)
    # By what is imported: vLLM's build for CPUs is a distribution of another name.
    distributions = metadata.packages_distributions()
    versions = {
        name: metadata.version(distributions[name][0]) for name in (trainer, "vllm", "torch")
    }
    found = {"versions": versions, "steps": [asdict(step) for step in steps]}
    (folder / "run.json").write_text(json.dumps(found))


if __name__ == "__main__":
    status = 0
    try:
        main()
    except Exception:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # vLLM's and gloo's threads have nothing more to do
