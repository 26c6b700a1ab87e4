"""The names that a model's weights have inside what trainers wrap around it."""

from __future__ import annotations

import re

# Of torch.compile, of DataParallel and DistributedDataParallel, of peft.
_PREFIXES = ("_orig_mod.", "module.", "base_model.model.")
# What peft puts between a layer's name and its weight.
_INFIXES = re.compile(r"\.base_layer(?=\.)|\.modules_to_save\.[^.]+(?=\.)")
_ADAPTER = re.compile(r"\.lora_|\.lora_embedding_|\.lora_magnitude_vector")


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
