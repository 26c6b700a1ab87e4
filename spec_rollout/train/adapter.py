"""LoRA, through peft: small matrices are trained beside the frozen weights of the policy.

peft's layers are put into the model itself, which stays the class that it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spec_rollout.config.sections import ConfigError, ModelConfig
from spec_rollout.engines.weight_names import is_adapter, merged_name
from spec_rollout.extras import install_command
from spec_rollout.train.state import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "adapter.safetensors"  # of a checkpoint
_NAME = "default"  # of the only adapter, as peft calls it


def check_peft(config: ModelConfig) -> None:
    """Raises ConfigError, before anything is loaded, if LoRA is asked for without peft."""
    if config.lora_rank is not None and find_spec("peft") is None:
        raise ConfigError(
            f"model.lora_rank: expected peft to be installed ({install_command('peft')}), found no "
            "module peft"
        )


def fingerprint(model: torch.nn.Module) -> str:
    """Of a model's weights: their names, types, shapes and bits. To be called before an adapter is
    added."""

    def digest(item: tuple[str, torch.Tensor]) -> bytes:
        name, tensor = item
        about = f"{name} {tensor.dtype} {list(tensor.shape)}\n"
        found = hashlib.sha256(about.encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return found.digest()

    with ThreadPoolExecutor(4) as pool:
        digests = pool.map(digest, sorted(model.state_dict().items()))
        return hashlib.sha256(b"".join(digests)).hexdigest()[:32]


def add_adapter(model: PreTrainedModel, config: ModelConfig) -> None:
    """Puts an adapter in float32 that changes nothing yet into a model, and freezes the rest.

    Raises:
        ConfigError: if the model has no layer of `config.lora_targets`.
    """
    import peft

    targets: Any = list(config.lora_targets)
    alpha: Any = config.lora_alpha or 2 * (config.lora_rank or 0)  # peft's type says int
    lora = peft.LoraConfig(
        r=config.lora_rank or 0,
        lora_alpha=alpha,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
    )
    try:
        peft.inject_adapter_in_model(lora, model, _NAME)
    except ValueError as error:
        raise ConfigError(
            "model.lora_targets: expected names of linear layers of the model, got "
            f"{config.lora_targets!r} ({str(error).splitlines()[0]})"
        ) from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))
        if is_adapter(name):
            parameter.data = parameter.data.float()


def has_adapter(model: torch.nn.Module) -> bool:
    """Whether `add_adapter` was called with the model."""
    return any(is_adapter(name) for name, _ in model.named_parameters())


@torch.no_grad()
def merged(
    model: torch.nn.Module, device: torch.device | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights that a model with its adapter amounts to, by the names it has without.

    Those of layers with an adapter are made anew; merging in place and back would change the
    frozen ones by a rounding each time. The others are the model's own tensors.

    Args:
        model: See `add_adapter`.
        device: Where the tensors go, one by one: for who keeps them all, beside the frozen ones.
            One that has two names (tied weights) stays one. None leaves them with the model.
    """
    layers = dict(model.named_modules())
    moved: dict[torch.Tensor, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if is_adapter(name):
            continue
        stem, _, leaf = name.rpartition(".base_layer.")
        layer: Any = layers.get(stem)
        if leaf == "weight" and layer is not None:
            tensor = (tensor.float() + layer.get_delta_weight(_NAME).float()).to(tensor.dtype)
            tensor = tensor if device is None else tensor.to(device)
        elif device is not None:
            if tensor not in moved:
                moved[tensor] = tensor.to(device)
            tensor = moved[tensor]
        yield merged_name(name), tensor.detach()


def engine_weights(model: torch.nn.Module, engine: str) -> Iterable[tuple[str, torch.Tensor]]:
    """A policy's weights as its rollout engine knows them: the embedded one shares the model."""
    if engine == "vllm" and has_adapter(model):
        return merged(model)
    return model.named_parameters()


def save_adapter(folder: Path, model: torch.nn.Module) -> None:
    """Writes the adapter's own tensors."""
    from safetensors.torch import save_file

    save_file(
        {n: p.detach().contiguous() for n, p in model.named_parameters() if is_adapter(n)},
        folder / ADAPTER,
    )


def load_adapter(folder: Path, model: torch.nn.Module) -> None:
    """Reads what `save_adapter` wrote.

    Raises:
        CheckpointError: if it is missing, or of another model or rank; nothing is changed then.
    """
    from safetensors.torch import load_file

    path = folder / ADAPTER
    expected = f"{path}: expected the adapter of this run's model and model.lora_rank"
    if not path.is_file():
        raise CheckpointError(f"{expected}, found none")
    saved = load_file(path)
    own = {name: p for name, p in model.named_parameters() if is_adapter(name)}
    for name in sorted(saved.keys() | own.keys()):
        shapes = [list(d[name].shape) if name in d else None for d in (own, saved)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(f"{expected}: {name} of {shapes[0]}, got {shapes[1]}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(saved[name])
