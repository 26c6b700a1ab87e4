"""A tiny model whose text repeats, its data, and runs of `verl.trainer.main_ppo` on them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from byte_tokenizer import EOS, PAD, VOCAB_SIZE, byte_tokenizer

HERE = Path(__file__).parent
NUM_PROMPTS = 16
BATCH = 8
GROUP = 4
MAX_TOKENS = 64
# One turn of a user, then the model's.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<think>{% endif %}"
)
_WORDS = ("red", "green", "blue", "black", "white", "brown", "grey", "pink")
_RUN_SECONDS = 3600  # a run that hangs


def make_prompt(number: int) -> str:
    """The text of a prompt."""
    return f"{_WORDS[number % 8]} {_WORDS[(number * 3 + number // 8) % 8]}?"


def _answer(number: int, rng: random.Random) -> str:
    """One of the answers that the model is trained to give: mostly alike, not quite."""
    first, second = make_prompt(number)[:-1].split()
    verb = rng.choice(("is", "is", "is", "was"))
    return f"{first} {verb} {rng.choice((first, second))}, {second} {verb} {first}."


def make_model(folder: Path, steps: int = 300) -> None:
    """A model and its tokenizer, trained for seconds to answer `make_prompt` in a few ways."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = byte_tokenizer(TEMPLATE)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=EOS,
        pad_token_id=PAD,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rng = random.Random(0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
    for _ in range(steps):
        rows = []
        for _ in range(16):
            number = rng.randrange(NUM_PROMPTS)
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": make_prompt(number)}],
                add_generation_prompt=True,
                tokenize=False,
            )
            answer = _answer(number, rng)
            rows.append((tokenizer.encode(prompt), [*tokenizer.encode(answer), EOS]))
        longest = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids = torch.full((16, longest), PAD)
        labels = torch.full((16, longest), -100)
        for r, (prompt, answer) in enumerate(rows):
            ids[r, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            labels[r, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        loss = model(input_ids=ids, labels=labels, attention_mask=(ids != PAD).long()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_data(path: Path, num_prompts: int = NUM_PROMPTS, source: str = "colours") -> None:
    """A Parquet file as verl reads it."""
    import pandas

    rows = [
        {
            "data_source": source,
            "prompt": [{"role": "user", "content": make_prompt(number)}],
            "reward_model": {"style": "rule", "ground_truth": "r"},
            "extra_info": {"index": number},
        }
        for number in range(num_prompts)
    ]
    pandas.DataFrame(rows).to_parquet(path)


@dataclass(frozen=True)
class PPORun:
    """What a run left.

    Attributes:
        metrics: Of each step, as verl's file logger has them.
        log: What Ray's processes wrote.
        responses: Prompts and responses of each step, as text.
    """

    metrics: list[dict[str, Any]]
    log: str
    responses: list[list[tuple[str, str]]]

    def values(self, name: str) -> list[float]:
        """A metric, step by step."""
        return [step[name] for step in self.metrics if name in step]

    def log_lines(self) -> list[dict[str, float]]:
        """What the engine said of itself now and then: tokens per step, proposed, share kept."""
        pattern = (
            r"spec_rollout: ([\d.]+) tokens per request and step, (?:(\d+)%|none) of ([\d,]+) "
            r"proposed tokens accepted; requests: ([\d,]+) served, ([\d,]+) passed by, ([\d,]+) with"
        )
        found = []
        for match in re.finditer(pattern, self.log):
            speed, share, proposed, served, passed_by, own = match.groups()
            found.append(
                {
                    "tokens_per_step": float(speed),
                    "share": float(share or 0) / 100,
                    "proposed": int(proposed.replace(",", "")),
                    "served": int(served.replace(",", "")),
                    "passed_by": int(passed_by.replace(",", "")),
                    "with_own": int(own.replace(",", "")),
                }
            )
        return found


def overrides(folder: Path) -> list[str]:
    """Of main_ppo: GRPO on the files of `folder`, on a CPU."""
    rollout, actor = "actor_rollout_ref.rollout", "actor_rollout_ref.actor"
    return [
        "algorithm.adv_estimator=grpo",
        f"data.train_files={folder}/train.parquet",
        f"data.val_files={folder}/train.parquet",
        f"data.train_batch_size={BATCH}",
        "data.max_prompt_length=32",
        f"data.max_response_length={MAX_TOKENS}",
        "data.dataloader_num_workers=0",
        "data.filter_overlong_prompts=False",
        f"actor_rollout_ref.model.path={folder}/model",
        "actor_rollout_ref.model.use_remove_padding=False",
        "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
        "actor_rollout_ref.model.enable_gradient_checkpointing=False",
        f"{actor}.optim.lr=1e-5",
        f"{actor}.ppo_mini_batch_size={BATCH}",
        f"{actor}.ppo_micro_batch_size_per_gpu={BATCH * GROUP}",
        f"{actor}.use_kl_loss=False",
        f"{actor}.use_torch_compile=False",
        f"{actor}.fsdp_config.use_torch_compile=False",
        f"{actor}.fsdp_config.dtype=float32",
        f"+{actor}.fsdp_config.mixed_precision={{param_dtype:fp32,reduce_dtype:fp32}}",
        f"{actor}.strategy=fsdp2",
        f"{rollout}.name=vllm",
        f"{rollout}.n={GROUP}",
        f"{rollout}.dtype=float32",
        f"{rollout}.tensor_model_parallel_size=1",
        f"{rollout}.log_prob_micro_batch_size_per_gpu={BATCH * GROUP}",
        f"{rollout}.enforce_eager=True",
        f"{rollout}.max_model_len=256",
        f"{rollout}.max_num_batched_tokens=2048",
        f"{rollout}.max_num_seqs=64",
        f"{rollout}.gpu_memory_utilization=0.2",
        f"{rollout}.free_cache_engine=False",
        f"+{rollout}.enable_sleep_mode=False",
        f"{rollout}.load_format=auto",
        f"{rollout}.agent.num_workers=1",
        f"{rollout}.checkpoint_engine.update_weights_bucket_megabytes=16",
        f"reward.custom_reward_function.path={HERE}/verl_reward.py",
        "reward.custom_reward_function.name=compute_score",
        "reward.num_workers=1",
        "trainer.n_gpus_per_node=1",
        "trainer.nnodes=1",
        "trainer.device=cpu",
        "trainer.logger=[file]",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        "trainer.total_epochs=3",
        "trainer.resume_mode=disable",
        # Of eight, each a process that imports everything.
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        # What Ray is told, not what there is: verl's actors ask for a processor each.
        "+ray_kwargs.ray_init.num_gpus=1",
        "ray_kwargs.ray_init.num_cpus=16",
        "+ray_kwargs.ray_init.object_store_memory=100000000",
        "+ray_kwargs.ray_init.include_dashboard=False",
    ]


def environment(variable: str | None) -> dict[str, str]:
    """Of a process with verl on a CPU.

    Args:
        variable: SPEC_ROLLOUT; None: not set.
    """
    values = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])),
        "VERL_USE_EXTERNAL_MODULES": "verl_cpu",
        "VERL_PLATFORM": "cpu",
        "VERL_ENGINE_DEVICE": "cuda",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "INFO",  # verl's default leaves our line out
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_COMPILE_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
        "HYDRA_FULL_ERROR": "1",
        "RAY_DEDUP_LOGS": "0",
        "RAY_enable_worker_prestart": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # not behind everything else of the machine
        "RAY_memory_monitor_refresh_ms": "0",
    }
    values.pop("SPEC_ROLLOUT", None)
    if variable is not None:
        values["SPEC_ROLLOUT"] = variable
    return values


def run_ppo(folder: Path, name: str, variable: str | None, *more: str) -> PPORun:
    """Runs main_ppo to its end.

    Args:
        folder: With `model` and `train.parquet`.
        name: Of the run.
        variable: SPEC_ROLLOUT; None: not set.
        more: Further overrides.
    """
    metrics_path, log_path = folder / f"{name}.jsonl", folder / f"{name}.log"
    # Short: the paths of Ray's sockets are in it.
    ray_folder = Path(tempfile.mkdtemp(prefix="ray"))
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *overrides(folder), *more]
    command += [
        f"+ray_kwargs.ray_init._temp_dir={ray_folder}",
        f"trainer.rollout_data_dir={folder}/{name}_rollouts",
        f"trainer.default_local_dir={folder}/{name}_checkpoints",
        f"hydra.run.dir={folder}/{name}",
    ]
    try:
        env = {**environment(variable), "VERL_FILE_LOGGER_PATH": str(metrics_path)}
        status = run_bounded(command, env, log_path, cwd=folder)
        # The driver shows what Ray's processes write, too, but not to the end.
        outputs = sorted(ray_folder.glob("session_latest/logs/worker-*.[oe][ur][tr]"))
        text = "".join(path.read_text() for path in outputs)
    finally:
        shutil.rmtree(ray_folder, ignore_errors=True)
    assert status == 0, log_path.read_text()[-6000:]
    lines = metrics_path.read_text().splitlines()
    responses = []
    for step in range(1, len(lines) + 1):
        rows = (folder / f"{name}_rollouts" / f"{step}.jsonl").read_text().splitlines()
        responses.append([(row["input"], row["output"]) for row in map(json.loads, rows)])
    return PPORun([json.loads(line)["data"] for line in lines], text, responses)


def run_bounded(command: Sequence[str], env: dict[str, str], log_path: Path, cwd: Path) -> int:
    """Runs a command and whatever it starts; nothing of it is left.

    Ray gives its own processes 30 seconds to start, which a busy machine may not do: then it is
    run again.

    Args:
        log_path: What it writes.
    """
    for _ in range(5):
        with log_path.open("w") as log:
            process = subprocess.Popen(
                command, env=env, cwd=cwd, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            try:
                status = process.wait(_RUN_SECONDS)
            finally:
                # Ray's own processes end with the one that started them.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if status == 0 or "The current node timed out during startup" not in log_path.read_text():
            break
    return status
