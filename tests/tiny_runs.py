"""A real but tiny model, its tokenizer and its data, on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from spec_rollout.config.sections import RunConfig
from spec_rollout.config.toml import from_dict


def save_tiny_model(folder: Path, *, seed: int = 0, tie: bool = True) -> Path:
    """A randomly initialised two-layer Qwen3 with the demo's character tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from spec_rollout.demo.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=128,
            tie_word_embeddings=tie,
            initializer_range=0.15,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def write_rows(tmp_path: Path):
    """Writes rows (objects, or raw lines as strings) to a .jsonl file."""

    def write(rows, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write


def count_digits(prompt: str, response: str, answer: str) -> float:
    """A reward a random model can climb at once: the share of digits."""
    return sum(c.isdigit() for c in response) / max(1, len(response))


@pytest.fixture
def make_config(tmp_path: Path, model_dir: Path, write_rows):
    """A run of a few seconds; sections are updated by keyword arguments."""

    def make(**sections) -> RunConfig:
        rows = [
            {"prompt": f"{a} {b} =?\n", "answer": str(a + b)} for a in range(3) for b in range(2)
        ]
        base = {
            "model": {"path": str(model_dir), "device": "cpu"},
            "data": {"path": str(write_rows(rows, "train.jsonl"))},
            "rollout": {"num_samples": 4, "max_tokens": 12, "num_slots": 8},
            "reward": {"functions": [f"{__name__}:count_digits"]},
            "train": {"prompts_per_step": 3, "epochs": 3, "lr": 3e-3, "kl_coef": 0.0, "seed": 7},
            "eval": {"num_train_prompts": 4, "num_samples": 2, "correct_at": 0.5},
            "log": {"run_dir": str(tmp_path / "run"), "progress": "off"},
        }
        for name, values in sections.items():
            base.setdefault(name, {}).update(values)
        return from_dict(base)

    return make
