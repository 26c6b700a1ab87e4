"""A tiny language model and a task it can learn by reinforcement in minutes on a CPU."""

from __future__ import annotations

from pathlib import Path


def model_dir() -> Path:
    """Folder of the shipped checkpoint (Hugging Face layout: config, weights, tokenizer)."""
    return Path(__file__).parent / "assets" / "model"
