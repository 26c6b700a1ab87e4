"""What rounding costs reuse: tokens rejected by the policy that drew them, by engine and dtype.

    python tools/real_model.py MODEL
    python benchmarks/bench_rounding.py MODEL --data questions.jsonl --vllm-python PYTHON

Each engine draws responses, then verifies them under unchanged weights, by rule and tolerance: what
is rejected then is rounding. After an update of the weights (a few policy-gradient steps in float32
on responses of its own, the shorter the better) the same responses are verified once more: what the
tolerance is worth in use. Engines run one after the other in processes of their own.

Rows by engine:
- `embedded`: with batch-invariant forwards where they can be had, which is the default.
- `embedded, padded`: forwards with masks, as on a GPU; and with the output head in float32, which
  shows what the rounding of the logits themselves has to do with it.
- `vllm`: as it is, with its batch-invariant mode, and with its output head in float32. Left out
  without --vllm-python.

`seconds` is the plain rollout's, once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from _common import Results, Timing, parser

from spec_rollout.acceptance import AcceptanceRule, Coupled, Lenient, NoReuse
from spec_rollout.keys import noise_keys, prompt_key
from spec_rollout.packed import cu_lens_from
from spec_rollout.rounding import measure_rounding
from spec_rollout.types import (
    Drafts,
    FinishReason,
    RolloutRequests,
    Rollouts,
    SamplingParams,
)

TEMPERATURE = 0.7
NUM_SAMPLES = 4
RULES: tuple[AcceptanceRule, ...] = (
    Coupled(),
    Coupled(tolerance="auto"),
    Coupled(tolerance=0.1),
    Lenient(0.0),
    Lenient(0.0, tolerance="auto"),
)
# The update: AdamW with this rate, once over the responses.
_LR, _MINIBATCH = 2e-5, 4


@dataclass(frozen=True)
class Setting:
    """One engine and how it is run."""

    engine: str
    dtype: str
    options: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    float32_head: bool = False

    @property
    def runs_vllm(self) -> bool:
        return self.engine.startswith("vllm")


SETTINGS = (
    Setting("embedded", "float32"),
    Setting("embedded", "bfloat16"),
    Setting("embedded, padded", "float32", {"batch_invariant": False}),
    Setting("embedded, padded", "bfloat16", {"batch_invariant": False}),
    Setting(
        "embedded, padded, float32 head",
        "bfloat16",
        {"batch_invariant": False},
        float32_head=True,
    ),
    Setting("vllm", "float32"),
    Setting("vllm", "bfloat16"),
    Setting("vllm, batch-invariant", "bfloat16", environment={"VLLM_BATCH_INVARIANT": "1"}),
    Setting("vllm, float32 head", "bfloat16", {"hf_overrides": {"head_dtype": "float32"}}),
)


class Float32Head(torch.nn.Module):
    """An output head whose products and logits are float32."""

    def __init__(self, head: torch.nn.Linear) -> None:
        super().__init__()
        self.source = head
        self.out_features = head.out_features

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(hidden.float(), self.source.weight.float())


@dataclass(frozen=True)
class Task:
    """Prompts and how they are sampled; the same for every engine."""

    prompts: list[list[int]]
    sampling: SamplingParams

    @classmethod
    def load(cls, model: Path, data: Path, num_questions: int, max_tokens: int) -> Task:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)
        prompts = []
        for line in data.read_text(encoding="utf-8").splitlines()[:num_questions]:
            turns = [{"role": "user", "content": json.loads(line)["question"]}]
            text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            prompts.append(tokenizer(text)["input_ids"])
        stop = (tokenizer.eos_token_id,)
        return cls(
            prompts,
            SamplingParams(TEMPERATURE, max_tokens=max_tokens, stop_token_ids=stop),
        )

    def requests(self) -> RolloutRequests:
        rows = [prompt for prompt in self.prompts for _ in range(NUM_SAMPLES)]
        samples = [sample for _ in self.prompts for sample in range(NUM_SAMPLES)]
        return RolloutRequests(
            torch.tensor([token for row in rows for token in row], dtype=torch.int32),
            cu_lens_from(torch.tensor([len(row) for row in rows])),
            noise_keys(0, 0, [prompt_key(row) for row in rows], samples),
            Drafts.none(len(rows)),
        )


def make_engine(setting: Setting, model: Path, task: Task) -> Any:
    if setting.runs_vllm:
        from spec_rollout.engines.vllm import VLLMEngine

        longest = max(map(len, task.prompts)) + task.sampling.max_tokens + 65
        return VLLMEngine(
            str(model),
            llm_args={
                "dtype": setting.dtype,
                "max_model_len": longest,
                "enforce_eager": True,
                "kv_cache_memory_bytes": 1 << 30,
                **setting.options,
            },
        )
    from transformers import AutoModelForCausalLM

    from spec_rollout.engines import TransformersEngine

    dtype = getattr(torch, setting.dtype)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    if setting.float32_head:
        policy.lm_head = Float32Head(policy.lm_head)
    return TransformersEngine(policy, **setting.options)


def drafts_of(rollouts: Rollouts) -> Drafts:
    return Drafts(
        rollouts.response_ids,
        rollouts.cu_response_lens,
        rollouts.logprobs,
        rollouts.finish_reasons == FinishReason.STOP,
    )


def texts(rollouts: Rollouts) -> list[list[int]]:
    return [ids.tolist() for ids in rollouts.response_ids.split(rollouts.response_lens.tolist())]


def run_setting(setting: Setting, model: Path, updated: Path, task: Task) -> dict[str, Any]:
    """Everything that is measured of one engine."""
    from safetensors.torch import load_file

    engine = make_engine(setting, model, task)
    requests = task.requests()
    plain = engine.rollout(requests, task.sampling, NoReuse())
    rounding = measure_rounding(engine, requests, task.sampling)
    drafts = drafts_of(plain)
    with_drafts = replace(requests, drafts=drafts)
    rules = [(rule, rule.with_tolerance(rounding.tolerance)) for rule in RULES]
    rows = []
    for rule, resolved in rules:
        again = engine.rollout(with_drafts, task.sampling, resolved)
        kept = int(again.accepted_lens.sum())
        rejected = int((again.accepted_lens < drafts.lens).sum())
        same = sum(a == b for a, b in zip(texts(again), texts(plain), strict=True))
        rows.append(
            {
                "rule": type(rule).__name__,
                "tolerance": rule.tolerance,
                "nats": resolved.tolerance,
                "rejections_per_token": rejected / (kept + rejected),
                "reused": kept / drafts.token_ids.numel(),
                "same_texts": same / again.batch,
            }
        )
    engine.update_weights(load_file(updated).items())
    for row, (_, resolved) in zip(rows, rules, strict=True):
        after = engine.rollout(with_drafts, task.sampling, resolved)
        row["reused_after_update"] = int(after.accepted_lens.sum()) / drafts.token_ids.numel()
    return {
        "rounding": asdict(rounding),
        "batch_invariant": getattr(engine, "batch_invariant", None),
        "plain_seconds": plain.stats.rollout_seconds,
        "num_rollouts": requests.batch,
        "num_tokens": drafts.token_ids.numel(),
        "rules": rows,
    }


def update(model: Path, path: Path, task: Task) -> None:
    """Writes the weights after a few policy-gradient steps, float32."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from spec_rollout.engines import TransformersEngine

    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    rollouts = TransformersEngine(policy).rollout(task.requests(), task.sampling, NoReuse())
    prompts = rollouts.prompt_ids.split(rollouts.cu_prompt_lens.diff().tolist())
    responses = rollouts.response_ids.split(rollouts.response_lens.tolist())
    lens = -rollouts.response_lens.double().view(-1, NUM_SAMPLES)
    advantages = (lens - lens.mean(1, keepdim=True)).flatten()
    advantages = advantages / (advantages.std() + 1e-6)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=_LR, weight_decay=0.0)
    for first in range(0, len(prompts), _MINIBATCH):
        for row in range(first, min(first + _MINIBATCH, len(prompts))):
            ids = torch.cat([prompts[row], responses[row]]).long()[None]
            logits = policy(ids).logits[0, len(prompts[row]) - 1 : -1] / TEMPERATURE
            logprobs = logits.log_softmax(-1).gather(-1, responses[row].long()[:, None])
            (-advantages[row] * logprobs.mean() / _MINIBATCH).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_file({name: p.detach() for name, p in policy.named_parameters()}, path)


def in_process(python: str, number: int, setting: Setting) -> dict[str, Any]:
    """One setting in a process of its own; its last line of output is the result."""
    done = subprocess.run(
        [python, *sys.argv, "--only", str(number)],
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **setting.environment},
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{setting.engine} in {setting.dtype}: exit status {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def chosen(vllm_python: str | None) -> Iterator[tuple[int, Setting, str]]:
    for number, setting in enumerate(SETTINGS):
        if not setting.runs_vllm:
            yield number, setting, sys.executable
        elif vllm_python is not None:
            yield number, setting, vllm_python


def main() -> None:
    options = parser((__doc__ or "").splitlines()[0])
    options.add_argument("model", type=Path, help="folder of a chat model in float32")
    options.add_argument("--data", type=Path, required=True, help="JSONL with a question a row")
    options.add_argument("--vllm-python", help="Python of an environment with vLLM")
    options.add_argument("--updated", type=Path, help="safetensors of the policy after an update")
    options.add_argument("--only", type=int, help="one setting, its result as JSON on stdout")
    args = options.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    questions, tokens = (2, 24) if args.quick else (8, 64)
    task = Task.load(args.model, args.data, questions, tokens)
    if args.only is not None:
        print(json.dumps(run_setting(SETTINGS[args.only], args.model, args.updated, task)))
        return
    results = Results("rounding", args.out)
    with tempfile.TemporaryDirectory() as folder:
        if args.updated is None:
            args.updated = Path(folder) / "updated.safetensors"
            sys.argv += ["--updated", str(args.updated)]
            update(args.model, args.updated, task)
        for number, setting, python in chosen(args.vllm_python):
            found = in_process(python, number, setting)
            seconds = found.pop("plain_seconds")
            timing = Timing(seconds, seconds, seconds, 1)
            results.add(setting.engine, dtype=setting.dtype, timing=timing, **found)
            print(json.dumps(found["rounding"]))
    results.write()


if __name__ == "__main__":
    main()
