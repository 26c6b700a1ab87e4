"""One training run of TRL's `GRPOTrainer`: `trl_run.py OPTIONS FOLDER` notes what it did in
FOLDER/rank0.json (one file per rank)."""

from __future__ import annotations

import functools
import itertools
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read by vLLM when it is imported: TRL's colocated engine lives in this process.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["TORCH_COMPILE_DISABLE"] = "1"


@dataclass(frozen=True)
class Options:
    """What is trained, and how.

    Attributes:
        engine: "vllm" (colocated) or "model" (the trainer's own).
        adapter: Arguments of `SpecRollout`, its rule by name; None trains without it.
        sleep: vLLM's sleep mode, as far as a CPU has it: what is called is noted, in order.
        tools: Two turns: the model is told a number between them.
        bf16: The trainer's; None leaves it to TRL.
        float32: vLLM's type; left alone it takes bfloat16 for a model of float32.
        broken: "weights" leaves the weights of vLLM as they were.
    """

    engine: str = "model"
    adapter: dict[str, Any] | None = None
    prompts: int = 8
    generations: int = 4
    rows_per_step: int = 16
    accumulate: int = 1
    epochs: int = 3
    max_tokens: int = 48
    learning_rate: float = 1e-6
    shuffle: bool = True
    evaluate: bool = False
    sleep: bool = False
    tools: bool = False
    bf16: bool | None = False
    float32: bool = False
    broken: str = ""


class Notes:
    """What a run did, call by call."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.engine_steps = 0
        self.slept: list[str] = []


def even_steps() -> None:
    """Every engine step takes as long: what is proposed does not depend on the machine."""
    from spec_rollout.engines import TransformersEngine

    readings = itertools.count(0.0, 2.0**-10)
    TransformersEngine.clock = staticmethod(lambda: next(readings))
    from spec_rollout.engines.vllm.worker.step_times import StepTimes

    StepTimes.clock = staticmethod(lambda: next(readings))


def count_engine_steps(notes: Notes) -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    original = GPUModelRunner.execute_model

    def execute_model(self: Any, scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        notes.engine_steps += scheduled.total_num_scheduled_tokens > 0
        return original(self, scheduled, *args, **kwargs)

    GPUModelRunner.execute_model = execute_model


def mend_weight_sync(llm: Any) -> None:
    """Stock vLLM on a CPU goes on with packed copies of the old weights; not with this."""
    from spec_rollout.engines.vllm.compat import cpu_wheels

    model = llm.llm_engine.model_executor.driver_worker.model_runner.model
    original = model.load_weights

    def load_weights(*args: Any, **kwargs: Any) -> Any:
        cpu_wheels.pack_before_next_forward(model)
        return original(*args, **kwargs)

    object.__setattr__(model, "load_weights", load_weights)


def make_rule(name: str) -> Any:
    from spec_rollout import Coupled, Lenient

    return {"coupled": Coupled(), "lenient": Lenient(0.5)}[name]


def two_turns(spec: Any, notes: Notes) -> Any:
    """A `rollout_func` of the user's own: after the first turn the rows are told a number."""

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        tokenizer = trainer.processing_class
        prompt_ids = tokenizer(text=prompts)["input_ids"]
        first = spec.first_turn(prompt_ids, trainer)
        completions = [list(ids) for ids in first.completion_ids]
        logprobs = [list(values) for values in first.logprobs]
        mask = [[1] * len(ids) for ids in completions]
        answer = tokenizer(text="maybe 64 ")["input_ids"]
        eos = set(trainer.eos_token_ids)
        # Rows that did not end by themselves are told something and go on.
        rows = [row for row, ids in enumerate(completions) if ids[-1] not in eos]
        told = [prompt_ids[row] + completions[row] + answer for row in rows]
        second = spec.next_turn(told, trainer)
        notes.calls.append({"second": second.completion_ids, "told": told, "answer": answer,
                            "reused": spec.last_stats.num_reused_tokens})  # fmt: skip
        for row, ids, values in zip(rows, second.completion_ids, second.logprobs, strict=True):
            completions[row] += answer + ids
            logprobs[row] += [0.0] * len(answer) + values
            mask[row] += [0] * len(answer) + [1] * len(ids)
        return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": logprobs,
                "env_mask": mask}  # fmt: skip

    return rollout


def noted(rollout: Any, notes: Notes) -> Any:
    """`rollout`, with the difference between its log-probs and those of the model noted."""
    import torch

    def call(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        output = rollout(prompts, trainer)
        worst, total, count = 0.0, 0.0, 0
        model = trainer.model
        training, _ = model.training, model.eval()
        with torch.no_grad():
            rows = zip(
                output["prompt_ids"], output["completion_ids"], output["logprobs"], strict=True
            )
            masks = output.get("env_mask") or [[1] * len(c) for c in output["completion_ids"]]
            for (prompt, completion, logprobs), mask in zip(rows, masks, strict=True):
                logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
                logits = logits.float() / trainer.temperature
                expected = torch.log_softmax(logits, -1)
                expected = expected.gather(1, torch.tensor(completion)[:, None])[:, 0]
                delta = (expected - torch.tensor(logprobs)).abs() * torch.tensor(mask)
                worst = max(worst, float(delta.max()))
                total, count = total + float(delta.sum()), count + len(completion)
        model.train(training)
        notes.calls.append({"worst_difference": worst, "mean_difference": total / count})
        return output

    return call


def main(options: Options, folder: Path) -> None:
    import torch
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from spec_rollout.demo import model_dir
    from spec_rollout.demo.task import training_problems

    torch.set_num_threads(1)
    notes = Notes()
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    even_steps()
    on_vllm = options.engine == "vllm"
    plain_vllm = on_vllm and options.adapter is None and not os.environ.get("SPEC_ROLLOUT")
    if on_vllm:
        count_engine_steps(notes)
    if options.float32:
        from trl.generation import vllm_generation

        vllm_generation.LLM = functools.partial(vllm_generation.LLM, dtype="float32")
    if plain_vllm:
        from spec_rollout.engines.vllm import compat

        compat.install_worker()
        compat.keep_cpu_weights()

    problems = training_problems(options.prompts)
    data = Dataset.from_list([{"prompt": p.prompt, "answer": p.answer} for p in problems])
    trainer: Any = None

    def reward(
        prompts: Any, completions: Any, completion_ids: Any, answer: Any, **rest: Any
    ) -> Any:
        rewards = [float(a in c) for c, a in zip(completions, answer, strict=True)]
        notes.calls.append(
            {
                "step": trainer.state.global_step,
                "epoch": trainer.state.epoch,
                "train": trainer.model.training,
                "engine_steps": notes.engine_steps,
                "prompts": list(prompts),
                "completion_ids": [list(ids) for ids in completion_ids],
                "rewards": rewards,
            }
        )
        return rewards

    rollout, spec = None, None
    if options.adapter is not None:
        from spec_rollout.adapters.trl import SpecRollout

        arguments = dict(options.adapter)
        spec = SpecRollout(make_rule(arguments.pop("rule", "coupled")), **arguments)
        rollout = noted(two_turns(spec, notes) if options.tools else spec, notes)
    rows = options.rows_per_step // processes
    config = GRPOConfig(
        output_dir=str(folder / "out"), use_cpu=True, bf16=options.bf16, use_vllm=on_vllm,
        vllm_mode="colocate", vllm_gpu_memory_utilization=0.1, vllm_max_model_length=256,
        per_device_train_batch_size=rows // options.accumulate, per_device_eval_batch_size=rows,
        gradient_accumulation_steps=options.accumulate, num_generations=options.generations,
        max_completion_length=options.max_tokens, num_train_epochs=options.epochs,
        learning_rate=options.learning_rate, lr_scheduler_type="constant", logging_steps=1,
        report_to=[], save_strategy="no", temperature=1.0, seed=1, disable_tqdm=True,
        shuffle_dataset=options.shuffle, eval_strategy="epoch" if options.evaluate else "no",
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=str(model_dir()), reward_funcs=reward, args=config, train_dataset=data,
        eval_dataset=data.select(range(4)) if options.evaluate else None, rollout_func=rollout,
    )  # fmt: skip
    generation = getattr(trainer, "vllm_generation", None)
    if plain_vllm:
        mend_weight_sync(generation.llm)
    if options.broken == "weights":
        generation.sync_weights = lambda: None
    if options.sleep:
        llm = generation.llm
        generation.enable_sleep_mode = generation._llm_weights_sleeping = True
        sync = generation.sync_weights
        llm.wake_up = lambda tags: notes.slept.append(f"wake {tags[0]}")
        llm.sleep = lambda level: notes.slept.append(f"sleep {level}")

        def sync_weights() -> None:
            notes.slept.append("sync")
            sync()

        generation.sync_weights = sync_weights
    trainer.train()
    result = {
        "calls": notes.calls,
        "history": trainer.state.log_history,
        "slept": notes.slept,
        "is_autocast": hasattr(trainer.model, "_original_forward"),
        "cache": None if spec is None else spec.cache.stats.num_samples,
    }
    if on_vllm and os.environ.get("SPEC_ROLLOUT"):
        result["remembers"] = generation.llm.collective_rpc("spec_rollout_history")[0]
    (folder / f"rank{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Options(**json.loads(sys.argv[1])), Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # vLLM's and gloo's threads have nothing more to do
