"""The demo's runs and sizes: a preset of `spec_rollout.ablate`.

Every run starts from the same checkpoint on the same prompts and differs in nothing but the
acceptance rule.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spec_rollout.ablate.grid import Grid
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
from spec_rollout.config.toml import with_overrides
from spec_rollout.demo import model_dir
from spec_rollout.demo.task import (
    MAX_RESPONSE_TOKENS,
    heldout_problems,
    training_problems,
    write_jsonl,
)

Runs = Mapping[str, Mapping[str, Any]]

# Here `vanilla` is plain sampling with the noise that `both` has: a rollout's own, kept over the
# epochs. It costs what plain sampling costs, and the law of each token given the weights is that of
# plain sampling; what it shares with `both` alone is that epochs are not independent draws. So one
# run is the plain one to compare times with and, token for token, what `both` must give.
QUICK_RUNS: Runs = {
    "vanilla": {"rule": "coupled", "reuse": False},
    "lenient": {"rule": "lenient", "log_lenience": 0.5},
    "both": {"rule": "coupled", "drafting": True},
}
FULL_RUNS: Runs = {
    "vanilla": {"rule": "none", "reuse": False},
    "lenient": {"rule": "lenient", "log_lenience": 0.5},
    "coupled": {"rule": "coupled"},
    "both": {"rule": "coupled", "drafting": True},
    "coupled_off": {"rule": "coupled", "reuse": False},
}


def cache_off(runs: Runs) -> str | None:
    """The run with the noise of the lossless ones and no reuse; None if there is none."""
    off = {"rule": "coupled", "reuse": False}
    return next((name for name, changes in runs.items() if changes == off), None)


def lossless(runs: Runs) -> list[str]:
    """Runs whose rollouts must be those of `cache_off`, token for token."""
    off = cache_off(runs)
    return [name for name, changes in runs.items() if changes["rule"] == "coupled" and name != off]


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

    @property
    def num_steps(self) -> int:
        """Training steps of a run."""
        return self.epochs * -(-self.num_prompts // self.prompts_per_step)


FULL = DemoSize()
# Half of it in every step: three minutes on one core.
QUICK = DemoSize(num_prompts=128, num_heldout=128, prompts_per_step=64)
SHORT = DemoSize(
    num_prompts=8, num_heldout=8, prompts_per_step=4, num_samples=2, epochs=2, num_eval_samples=1
)
# Of the runs of `spec-rollout ablate demo`: small, for there are many of them.
ABLATION = DemoSize(num_prompts=128, num_heldout=256, prompts_per_step=64, epochs=4, threads=1)
_TRAIN, _HELDOUT = "train.jsonl", "heldout.jsonl"


def demo_config(out: Path, size: DemoSize, seed: int) -> RunConfig:
    """What all runs have in common; the prompts are expected in `out` (`write_prompts`)."""
    return RunConfig(
        model=ModelConfig(path=str(model_dir()), device="cpu"),
        data=DataConfig(path=str(out / _TRAIN), max_rows=size.num_prompts),
        rollout=RolloutConfig(
            num_samples=size.num_samples,
            max_tokens=MAX_RESPONSE_TOKENS,
            # All rollouts of a step at once: more slots were faster for the plain run, which the
            # others are compared with, as far as benchmarks/bench_engine.py sweeps them (256).
            num_slots=1024,
        ),
        reward=RewardConfig(functions=("spec_rollout.demo.task:reward",)),
        train=TrainConfig(
            seed=seed,
            prompts_per_step=size.prompts_per_step,
            epochs=size.epochs,
            lr=size.lr,
            betas=(0.9, 0.95),
            kl_coef=0.0,
            micro_batch_tokens=4096,
            threads=size.threads,
        ),
        eval=EvalConfig(
            path=str(out / _HELDOUT),
            num_train_prompts=size.num_prompts,
            num_heldout_prompts=size.num_heldout,
            num_samples=size.num_eval_samples,
            every_steps=size.num_steps // size.epochs,
        ),
        checkpoint=CheckpointConfig(at_end=False),
        log=LogConfig(progress="off"),
    )


def demo_grid(
    runs: Runs,
    out: Path,
    size: DemoSize,
    seed: int,
    engine: str = "transformers",
) -> Grid:
    """The runs, written to `out`/name; the prompts are expected in `out` (`prepare`).

    Args:
        engine: As `rollout.engine`.
    """
    off = cache_off(runs)
    # Equal rollouts make equal weights: of the runs that must be the same, one is judged.
    judged = off if off == "vanilla" else "coupled"
    changes: dict[str, dict[str, Any]] = {}
    for name, rollout in runs.items():
        changes[name] = {f"rollout.{key}": value for key, value in rollout.items()}
        changes[name]["rollout.engine"] = engine
        if rollout["rule"] == "coupled" and name != judged:
            changes[name].update({"eval.at_end": False, "eval.every_steps": "none"})
    # An engine of vLLM has the process's process group: one run after the other.
    together = engine == "transformers"
    return Grid(demo_config(out, size, seed), changes, out, together=together)


def judged_run(runs: Runs) -> str | None:
    """The run whose evaluations are those of all lossless ones."""
    off = cache_off(runs)
    return off if off == "vanilla" else "coupled" if "coupled" in runs else None


def ablation_config(out: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of `spec-rollout ablate demo`: the demo's smaller size on one thread,
    judged on held-out prompts only.

    Args:
        out: Where the prompts are (`write_prompts`).
        overrides: "section.key=value" each.

    Raises:
        ConfigError: naming a key.
    """
    base = demo_config(out, ABLATION, seed=0)
    base = replace(base, eval=replace(base.eval, num_train_prompts=0, every_steps=None))
    return with_overrides(base, overrides)


def write_prompts(out: Path, size: DemoSize = FULL) -> None:
    """Writes prompts to train on and to evaluate on."""
    write_jsonl(training_problems(size.num_prompts), out / _TRAIN)
    write_jsonl(heldout_problems(size.num_heldout), out / _HELDOUT)


def prepare(out: Path, names: Sequence[str], size: DemoSize) -> None:
    """Writes the prompts and makes room for the runs.

    Earlier results of the same demo are removed.

    Raises:
        ValueError: if a run's folder holds something else than a run.
    """
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
    write_prompts(out, size)
