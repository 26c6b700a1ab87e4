"""The Hugging Face model inside what trainers wrap around it."""

from __future__ import annotations

from typing import Any

import torch


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
