"""GRPO in TRL with drafts from the epoch before: `python examples/trl_grpo.py`.

It runs as it stands, on the demo's tiny model and task, in a few minutes on a CPU. It needs
`pip install trl`. With `--vllm` it generates with TRL's colocated vLLM instead of the trainer's own
model; with `--plain` without this package, to compare.

For a 1.7B model on one GPU (not run yet, so take it as a start):
- `model_dir()`: "Qwen/Qwen3-1.7B"; the data: a set with the columns "prompt" and "answer", such as
  GSM8K's; `reward`: whether the answer is right (`math_verify`, say).
- GRPOConfig: leave out `use_cpu` and `bf16=False`; `use_vllm=True`,
  `vllm_gpu_memory_utilization=0.3`, `vllm_max_model_length` the longest prompt and completion
  together, `max_completion_length=1024`, `num_generations=8`, `learning_rate=1e-6`,
  `gradient_checkpointing=True`.
- At least two epochs: the first has no drafts.
- `SpecRollout(Lenient(0.5))` is SPEC-RL's rule: it reuses more, and is biased. `SpecRollout()` is
  lossless.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

# TRL's colocated vLLM lives in this process; on a CPU its KV cache has this many GiB.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from spec_rollout.adapters.trl import SpecRollout
from spec_rollout.demo import model_dir
from spec_rollout.demo.task import training_problems


def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1 where the right number follows the marker."""
    return [
        float(text.rpartition("answer: ")[2].strip() == right)
        for text, right in zip(completions, answer, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vllm", action="store_true", help="generate with TRL's colocated vLLM")
    parser.add_argument("--plain", action="store_true", help="without drafts, as TRL does it")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--out", default="runs/trl_grpo")
    options = parser.parse_args()

    problems = training_problems(options.prompts)
    config = GRPOConfig(
        output_dir=options.out,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=64,
        num_generations=8,
        max_completion_length=160,
        learning_rate=2e-5,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        use_vllm=options.vllm,
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=0.1,
        vllm_max_model_length=256,
    )
    trainer = GRPOTrainer(
        model=str(model_dir()),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(
            [{"prompt": problem.prompt, "answer": problem.answer} for problem in problems]
        ),
        rollout_func=None if options.plain else SpecRollout(),
    )
    trainer.train()
    print("step  reward  tokens reused  engine steps")
    for row in trainer.state.log_history:
        if "reward" in row:
            reused = row.get("spec_rollout/reused_fraction", 0.0)
            steps = row.get("spec_rollout/engine_steps", float("nan"))
            print(f"{row['step']:4d}  {row['reward']:6.3f}  {reused:13.0%}  {steps:12.0f}")


if __name__ == "__main__":
    main()
