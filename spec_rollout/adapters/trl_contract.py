"""What `spec_rollout.adapters.trl` uses of TRL, which changes: names, checks, and how it is read.

Every attribute of a trainer or of its vLLM that the adapter touches is in one of the lists here.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from spec_rollout.types import SamplingParams

TESTED_VERSIONS = ("1.16.0",)
# Module -> names in it that are used.
CONTRACT: Mapping[str, tuple[str, ...]] = {
    "trl.trainer.grpo_trainer": (
        "GRPOTrainer._generate_single_turn",
        "GRPOTrainer._log_metric",
        "GRPOTrainer._tokenize_prompts",
    ),
    "trl.generation.vllm_client": ("VLLMClient.generate", "VLLMClient.get_server_info"),
    "trl.generation.vllm_generation": (
        "VLLMGeneration.generate",
        "VLLMGeneration.sync_weights",
    ),
}
# What a trainer has, and its `vllm_generation`.
TRAINER_ATTRIBUTES = (
    "accelerator",
    "args",
    "eos_token_ids",
    "max_completion_length",
    "min_p",
    "model",
    "repetition_penalty",
    "rollout_func",
    "state",
    "temperature",
    "top_k",
    "top_p",
    "use_vllm",
    "vllm_mode",
)
GENERATION_ATTRIBUTES = (
    "enable_sleep_mode",
    "generation_kwargs",
    "mode",
    "structured_outputs_regex",
    "tensor_parallel_size",
)
# The module whose `LLM` TRL builds a colocated engine with, letting no arguments through.
_ENGINE_MODULE = "trl.generation.vllm_generation"


def check_trl() -> str:
    """The version of the installed TRL.

    Raises:
        ImportError: if there is none, or it lacks a name that this adapter uses.
    """
    tested = f"this adapter was tested with TRL {', '.join(TESTED_VERSIONS)}"
    try:
        version = metadata.version("trl")
    except metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            f"trl: expected it installed ({tested}), got none", name="trl"
        ) from None
    for module, names in CONTRACT.items():
        for name in names:
            try:
                found: Any = importlib.import_module(module)
                for part in name.split("."):
                    found = getattr(found, part)
            except (ImportError, AttributeError) as error:
                raise ImportError(
                    f"trl: expected {module}.{name} ({tested}), got TRL {version} without it "
                    f"({error})"
                ) from error
    if version not in TESTED_VERSIONS:
        warnings.warn(f"{tested}; the installed one is {version}", stacklevel=4)
    return version


VERSION = check_trl()


def gather_objects(value: Any) -> list[Any]:
    from accelerate.utils import gather_object

    gathered: list[Any] = gather_object([value])
    return gathered


def broadcast_object(value: Any) -> Any:
    """That of the main process, in every process. Collective."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value], from_process=0)[0]


def is_server(trainer: Any) -> bool:
    return bool(trainer.use_vllm) and trainer.vllm_mode == "server"


def is_sharded(trainer: Any) -> bool:
    """Whether to read all weights is a call of several ranks together."""
    if trainer.accelerator.num_processes == 1:
        return False
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return bool(
        getattr(trainer, "is_fsdp_enabled", False)
        or (plugin is not None and plugin.zero_stage == 3)
    )


def sampling(trainer: Any) -> SamplingParams:
    return SamplingParams(
        temperature=trainer.temperature,
        top_k=max(0, trainer.top_k or 0),
        top_p=trainer.top_p,
        max_tokens=trainer.max_completion_length,
        stop_token_ids=tuple(trainer.eos_token_ids),
    )


def check_trainer(trainer: Any) -> None:
    """Raises for a trainer that this adapter does not serve."""
    for name in TRAINER_ATTRIBUTES:
        if not hasattr(trainer, name):
            raise ValueError(
                f"trainer: expected a GRPOTrainer as in TRL {', '.join(TESTED_VERSIONS)}, got one "
                f"of TRL {VERSION} without {name}"
            )
    if is_server(trainer):
        return
    if trainer.repetition_penalty != 1.0:
        raise ValueError(f"repetition_penalty: expected 1.0, got {trainer.repetition_penalty}")
    if trainer.min_p:
        raise ValueError(f"min_p: expected None or 0, got {trainer.min_p}")
    if trainer.args.generation_kwargs:
        raise ValueError(
            "generation_kwargs: expected none with SpecRollout, got "
            f"{', '.join(trainer.args.generation_kwargs)}"
        )
    if not trainer.use_vllm:
        for name in ("is_fsdp_enabled", "is_deepspeed_enabled"):
            if getattr(trainer, name, False):
                raise ValueError(
                    f"{name}: expected False with the embedded engine, which needs the whole model "
                    "on each rank, got True; use_vllm=True serves sharded models"
                )
        return
    generation = trainer.vllm_generation
    for name in GENERATION_ATTRIBUTES:
        if not hasattr(generation, name):
            raise ValueError(
                f"trainer: expected vLLM as in TRL {', '.join(TESTED_VERSIONS)}, got that of TRL "
                f"{VERSION} without {name}"
            )
    if generation.tensor_parallel_size > 1:
        raise ValueError(
            "vllm_tensor_parallel_size: expected 1 with SpecRollout and a colocated vLLM, got "
            f"{generation.tensor_parallel_size}"
        )
    if generation.structured_outputs_regex is not None:
        raise ValueError("vllm_structured_outputs_regex: expected None with SpecRollout, got one")


def plug_into_engines(num_speculative_tokens: int, *, drafting: bool) -> None:
    """Engines that TRL builds from now on run the plugin; without vLLM there are none.

    Args:
        num_speculative_tokens: See `engine_args`.
        drafting: They are to propose from a history.
    """
    module = importlib.import_module(_ENGINE_MODULE)
    original = getattr(module, "LLM", None)
    if original is None:
        return
    original = getattr(original, "spec_rollout_original", original)

    def plugged(*args: Any, **kwargs: Any) -> Any:
        from spec_rollout.engines.vllm import engine_args
        from spec_rollout.engines.vllm.options import V2_METHOD

        plugin = engine_args(num_speculative_tokens, logprobs_mode=None)
        if drafting and plugin["speculative_config"]["method"] == V2_METHOD:
            plugin["async_scheduling"] = False  # a history wants it so, as in `VLLMEngine`
        return original(*args, **{**plugin, **kwargs})

    plugged.spec_rollout_original = original  # type: ignore[attr-defined]  # a function's own mark
    module.LLM = plugged  # type: ignore[attr-defined]  # which TRL imported by name
