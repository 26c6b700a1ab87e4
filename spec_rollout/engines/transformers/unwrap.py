"""The Hugging Face model inside what trainers wrap around it, and the names of its weights."""

from __future__ import annotations

import re
from typing import Any

import torch

# Of torch.compile, of DataParallel and DistributedDataParallel, of peft.
_PREFIXES = ("_orig_mod.", "module.", "base_model.model.")
# What peft puts between a layer's name and its weight.
_INFIXES = re.compile(r"\.base_layer(?=\.)|\.modules_to_save\.[^.]+(?=\.)")
_ADAPTER = re.compile(r"\.lora_|\.lora_embedding_|\.lora_magnitude_vector")


def unwrap(model: Any) -> Any:
    """The model itself; peft's layers stay in it, so that its adapter takes part.

    Raises:
        ValueError: for a peft method that changes inputs instead of layers (prompt and prefix
            tuning): a forward of the inner model would leave it out.
    """
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), torch.nn.Module):
            model = inner
        elif isinstance(model, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            for name, config in model.peft_config.items():
                if getattr(config, "is_prompt_learning", False):
                    raise ValueError(
                        "model: expected a peft method that changes layers (LoRA and the like), "
                        f"got {config.peft_type} in adapter {name!r}, which adds to the input"
                    )
            model = model.get_base_model()
        else:
            return model


def plain_name(name: str) -> str:
    """A weight's name in the unwrapped model."""
    while True:
        for prefix in _PREFIXES:
            if name.startswith(prefix):
                name = name.removeprefix(prefix)
                break
        else:
            return name.replace("._orig_mod.", ".")


def merged_name(name: str) -> str:
    """The name that a weight has where peft's layers are not."""
    return _INFIXES.sub("", name)


def is_adapter(name: str) -> bool:
    """Whether a weight is part of an adapter rather than of the model."""
    return _ADAPTER.search(f".{name}") is not None
