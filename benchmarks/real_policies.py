"""What bench_real.py measures with: a small model that speaks, questions, and two policies of a
real training, kept in a folder that is made once.

The training is GRPO by `spec_rollout.train` on the questions of the benchmark: one epoch of a few
updates, started from the model as it is. Its rollouts are plain. A policy is a folder as
`from_pretrained` takes it: `old` is the one at the epoch's start, `new` that at its end.

    python benchmarks/real_policies.py OLD_FOLDER NEW_FOLDER

says what becomes of the update between two policies when both are rounded to bfloat16.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _common import ROOT, write_json
from torch import float64

from spec_rollout.rewards.builtin import last_number

_LAST_WORDS = re.compile(r"\d[\d,]*\.?\s*$|#### *-?\d")


@dataclass(frozen=True, slots=True)
class Training:
    """The epoch that lies between the two policies."""

    prompts: int = 16
    prompts_per_step: int = 4
    group: int = 8
    max_tokens: int = 128
    lr: float = 3e-6
    temperature: float = 0.5
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Policies:
    """Two folders, and what the updates between them took.

    Attributes:
        old, new: Of the policies.
        update_seconds_per_token: Of the trainer's updates, a token of a response.
        facts: Of the training, for the results file.
    """

    old: Path
    new: Path
    update_seconds_per_token: float
    facts: dict[str, Any]


def in_words(prompt: str) -> str:
    """A prompt of the demo's task, "62 +17 -8 =?", as a question."""
    start, *terms = (int(number) for number in re.findall(r"[+-]?\d+", prompt))
    told = " ".join(f"Then I {'find' if t > 0 else 'lose'} {abs(t)}." for t in terms)
    asked = "How many marbles do I have? Say what I have after each step, then the answer."
    return f"I have {start} marbles. {told} {asked}"


def questions(data: Path | None, count: int) -> list[dict[str, str]]:
    """The first rows {"question", "answer"} of a JSONL file; without one, the demo's arithmetic in
    words.

    Raises:
        ValueError: naming the file, if it has too few rows, or the row that lacks either.
    """
    if data is None:
        from spec_rollout.demo.task import training_problems

        return [
            {"question": in_words(problem.prompt), "answer": problem.answer}
            for problem in training_problems(count)
        ]
    lines = data.read_text(encoding="utf-8").splitlines()[:count]
    rows = [json.loads(line) for line in lines]
    if len(rows) < count:
        raise ValueError(f"{data.name}: expected at least {count} rows, got {len(rows)}")
    for number, row in enumerate(rows):
        if not {"question", "answer"} <= row.keys():
            raise ValueError(
                f"{data.name}, row {number}: expected a question and an answer, got {list(row)}"
            )
    return [{"question": row["question"], "answer": str(row["answer"])} for row in rows]


def prompt_ids(rows: list[dict[str, str]], model: Path) -> list[list[int]]:
    """The questions in the model's chat template, or as they are where it has none."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.chat_template is None:
        return [tokenizer(row["question"])["input_ids"] for row in rows]
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["question"]}],
            add_generation_prompt=True,
            tokenize=False,
        )
        for row in rows
    ]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def graded(prompt: str, response: str, answer: Any) -> float:
    """The reward of the training: 1 for the right number at the end; a model this small seldom
    finds it, so that an answer that ends with a number at all gets a fifth, and one of fewer words
    a little more of it."""
    right = last_number(prompt, response, answer)
    ends = bool(_LAST_WORDS.search(response.strip().rstrip(".!")))
    return 0.7 * right + 0.2 * ends + 0.1 / (1 + len(response.split()) / 50)


def model_folder(folder: Path) -> Path:
    """The model that speaks, fetched the first time (tools/real_model.py)."""
    model = folder / "model"
    if not (model / "tokenizer.json").is_file():
        import sys

        sys.path.insert(0, str(ROOT / "tools"))
        from real_model import fetch

        print(f"fetching the model into {model}", flush=True)
        fetch(model)
    return model


def prepare(model: Path, data: Path | None, training: Training, folder: Path) -> Policies:
    """The policies, trained unless `folder` has those of the same training.

    Args:
        model: Folder of the policy at the start.
        data: As in `questions`.
        folder: Where the new policy and what is known of the training are kept.
    """
    wanted = {**asdict(training), "data": None if data is None else data.name}
    note, new = folder / "training.json", folder / "new"
    known = json.loads(note.read_text()) if note.is_file() else {}
    if known.get("training") != wanted or not new.is_dir():
        known = {"training": wanted, **_train(model, data, training, folder)}
        write_json(note, known)
    return Policies(model, new, known["update_seconds_per_token"], known)


def _train(model: Path, data: Path | None, training: Training, folder: Path) -> dict[str, Any]:
    from spec_rollout.config.toml import from_dict
    from spec_rollout.train.trainer import run as train

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows = questions(data, training.prompts)
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run_dir = folder / "run"
    print(f"training an epoch of {training.prompts} prompts", flush=True)
    seen: list[Any] = []
    train(
        from_dict(
            {
                "model": {"path": str(model), "device": "cpu"},
                "data": {
                    "path": str(path),
                    "prompt_column": "question",
                    "answer_column": "answer",
                    "shuffle": False,
                },
                "rollout": {
                    "num_samples": training.group,
                    "temperature": training.temperature,
                    "max_tokens": training.max_tokens,
                    "rule": "none",
                    "reuse": False,
                },
                "reward": {
                    "functions": [f"{__name__}:graded"],
                    "folder": str(Path(__file__).parent),
                },
                "train": {
                    "prompts_per_step": training.prompts_per_step,
                    "lr": training.lr,
                    "kl_coef": 0.0,
                    "seed": training.seed,
                },
                "eval": {"at_start": False, "at_end": False},
                "checkpoint": {"every_minutes": None, "keep_last": 1},
                "log": {"run_dir": str(run_dir), "samples_per_step": 0},
            }
        ),
        on_step=seen.append,
    )
    (checkpoint,) = (run_dir / "checkpoints").glob("*/model")
    shutil.move(checkpoint, folder / "new")
    shutil.rmtree(run_dir / "checkpoints")
    steps = [row for row in seen if row["step"] > 0]
    tokens = sum(row["num_response_tokens"] for row in steps)
    return {
        "update_seconds_per_token": sum(row["train_seconds"] for row in steps) / tokens,
        "updates": len(steps),
        "rewards": [round(row["reward"], 4) for row in steps],
        "mean_response_tokens": round(tokens / sum(row["num_rollouts"] for row in steps), 1),
    }


def rounded_update(old: Path, new: Path) -> dict[str, float]:
    """The update's norm in float32 and in bfloat16, and the share of weights that change there."""
    from safetensors.torch import load_file

    count = changed = 0
    squares = {"float32": 0.0, "bfloat16": 0.0}
    before, after = (load_file(folder / "model.safetensors") for folder in (old, new))
    for name in before.keys() & after.keys():
        x, y = before[name].float(), after[name].float()
        rounded = y.bfloat16().float() - x.bfloat16().float()
        squares["float32"] += float((y - x).square().sum(dtype=float64))
        squares["bfloat16"] += float(rounded.square().sum(dtype=float64))
        changed += int(rounded.count_nonzero())
        count += x.numel()
    norms = {f"norm_{dtype}": square**0.5 for dtype, square in squares.items()}
    return {**norms, "changed_in_bfloat16": changed / count}


if __name__ == "__main__":
    import sys

    print(json.dumps(rounded_update(*map(Path, sys.argv[1:3]))))
