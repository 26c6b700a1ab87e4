"""GRPO on several GPUs: TRL trains over `accelerate` (FSDP), each GPU's vLLM generates.

    accelerate launch --config_file examples/several-gpus/fsdp.yaml \\
      examples/several-gpus/train_grpo.py \\
      --model Qwen/Qwen3-1.7B-Base --data train.jsonl --lenience 0.5

Without `--lenience` reuse is lossless; `--plain` is TRL without this package. `--lora 32` trains
LoRA matrices. Rows of the data: {"prompt": "...", "answer": "..."}.

It has run on a CPU, in two processes with LoRA on a tiny model (`--cpu`, in `make test-trl`).
FSDP, sleep mode and bfloat16 have NOT been run with it: take the sizes as a start.
"""

from __future__ import annotations

import argparse
import os
import re
from typing import Any

# TRL's colocated vLLM lives in this process; on a CPU its KV cache has this many GiB.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

from spec_rollout import Coupled, Lenient
from spec_rollout.adapters.trl import SpecRollout


def last_number(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1 where the last number of a completion is that of the answer."""
    number = re.compile(r"-?\d+(?:\.\d+)?")
    found = [number.findall(text.replace(",", "")) for text in completions]
    right = [number.findall(str(text).replace(",", "")) for text in answer]
    return [float(bool(a and b) and a[-1] == b[-1]) for a, b in zip(found, right, strict=True)]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="a .jsonl file")
    parser.add_argument("--out", default="runs/several-gpus")
    parser.add_argument("--lenience", type=float, help="the rule lenient, with this log-lenience")
    parser.add_argument("--plain", action="store_true", help="without drafts, as TRL does it")
    parser.add_argument("--lora", type=int, default=0, help="rank; 0 trains all weights")
    parser.add_argument("--epochs", type=float, default=20)
    parser.add_argument("--samples", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--rows", type=int, default=16, help="of a device and pass")
    parser.add_argument("--accumulate", type=int, default=8, help="passes of a step")
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--max-length", type=int, default=5120, help="of prompt and completion")
    parser.add_argument("--memory", type=float, default=0.5, help="share of each GPU for vLLM")
    parser.add_argument("--cpu", action="store_true", help="for a try, in float32")
    return parser.parse_args()


def main() -> None:
    given = options()
    config = GRPOConfig(
        output_dir=given.out,
        num_train_epochs=given.epochs,
        per_device_train_batch_size=given.rows,
        gradient_accumulation_steps=given.accumulate,
        num_generations=given.samples,
        max_completion_length=given.max_tokens,
        learning_rate=2e-5 if given.lora else 5e-7,
        lr_scheduler_type="constant",
        beta=0.0,
        logging_steps=1,
        save_strategy="no" if given.cpu else "steps",
        save_steps=10,
        report_to=[],
        use_cpu=given.cpu,
        bf16=not given.cpu,
        # FSDP has a setting of its own (fsdp.yaml), which takes the place of this one.
        gradient_checkpointing=False,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=given.memory,
        vllm_max_model_length=given.max_length,
        vllm_enable_sleep_mode=not given.cpu,
        model_init_kwargs={"dtype": "float32"},
    )
    spec = None
    if not given.plain:  # before the trainer, whose vLLM it plugs into
        spec = SpecRollout(Coupled() if given.lenience is None else Lenient(given.lenience))
    peft_config = None
    if given.lora:
        from peft import LoraConfig

        peft_config = LoraConfig(
            r=given.lora, lora_alpha=2 * given.lora, target_modules="all-linear"
        )
    trainer = GRPOTrainer(
        model=given.model,
        reward_funcs=last_number,
        args=config,
        train_dataset=load_dataset("json", data_files=given.data, split="train"),
        peft_config=peft_config,
        rollout_func=spec,
    )
    trainer.train()
    if trainer.accelerator.is_main_process:
        for row in trainer.state.log_history:
            if "reward" in row:
                reused = row.get("spec_rollout/reused_fraction", 0.0)
                print(f"step {row['step']}: reward {row['reward']:.3f}, reused {reused:.0%}")


if __name__ == "__main__":
    main()
