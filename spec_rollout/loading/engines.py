"""The rollout engine that a config names."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

import torch

from spec_rollout.config.sections import ConfigError, ModelConfig, RolloutConfig, VLLMConfig
from spec_rollout.engines import TransformersEngine
from spec_rollout.engines.base import RolloutEngine
from spec_rollout.engines.transformers.forward import MASKED_ATTENTION
from spec_rollout.extras import install_command
from spec_rollout.loading.policy import Policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from spec_rollout.engines.vllm import VLLMEngine

_GIB = 1 << 30
_LARGEST_BLOCK = 128  # of vLLM's KV cache on a CPU, in tokens
# Read by vLLM when it is imported. In this process, weights are handed over as they are instead of
# being copied through a pipe.
_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}


def check_engine(config: RolloutConfig, attention: str) -> None:
    """Checks what can be checked before anything is loaded.

    Args:
        config: Which engine.
        attention: `ModelConfig.attention`.

    Raises:
        ConfigError: if the engine's library is not installed, or it cannot work with the attention.
    """
    if config.engine == "transformers" and attention not in MASKED_ATTENTION:
        named = " or ".join(f'"{name}"' for name in MASKED_ATTENTION)
        raise ConfigError(
            f'model.attention: expected {named} with rollout.engine "transformers" (rows of '
            f'different lengths need a mask), got "{attention}"'
        )
    if config.engine == "vllm" and find_spec("vllm") is None:
        raise ConfigError(
            "rollout.engine: expected vllm to be installed for the engine vllm "
            f"({install_command('vllm')}; without a GPU see docs/vllm.md), found no module vllm"
        )


def make_engine(
    config: RolloutConfig,
    vllm: VLLMConfig,
    model: ModelConfig,
    policy: Policy,
    *,
    longest_prompt: int,
) -> RolloutEngine:
    """An engine with the policy's weights.

    Args:
        config, vllm: Which engine, and its settings.
        model: Where the policy was loaded from, and its dtype; vLLM loads the same folder.
        policy: The engine transformers shares its model.
        longest_prompt: Most prompt tokens there will be; with `config.max_tokens` it bounds what
            vLLM prepares for.

    Raises:
        ConfigError: naming the key, if the engine cannot be set up like this.
    """
    if config.engine == "vllm" and vllm.sleep and not torch.cuda.is_available():
        raise ConfigError("vllm.sleep: expected false without a GPU, got true")
    try:
        if config.engine == "vllm":
            max_model_len = config.max_model_len or longest_prompt + config.max_tokens
            return _vllm_engine(config, vllm, model, policy.model.config, max_model_len)
        return TransformersEngine(
            policy.model,
            num_slots=config.num_slots,
            max_verify_tokens=config.max_verify_tokens,
            verify_chunk=config.verify_chunk,
            max_model_len=config.max_model_len,
            batch_invariant=config.batch_invariant,
            check_model=config.check_model,
        )
    except (ImportError, ValueError) as error:
        raise ConfigError(f"rollout.engine: {error}") from error


def without_weights(policy: Policy) -> Policy:
    """The policy for an engine that has its own copy of the weights, when nothing is trained."""
    model: torch.nn.Module = policy.model  # whose `to` transformers annotates for devices alone
    return replace(policy, model=cast("PreTrainedModel", model.to("meta")))


def _kv_bytes(model_config: Any, dtype: torch.dtype, num_tokens: int) -> int:
    """Memory that keys and values of so many tokens take."""
    config = model_config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * config.num_hidden_layers * kv_heads * head_dim * dtype.itemsize * num_tokens


def _vllm_engine(
    config: RolloutConfig,
    vllm: VLLMConfig,
    model: ModelConfig,
    model_config: Any,
    max_model_len: int,
) -> VLLMEngine:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from spec_rollout.engines.vllm import VLLMEngine
    from spec_rollout.engines.vllm.client.two_pass import check_two_pass

    if vllm.strategy == "two_pass":
        check_two_pass(config.sampling(), config.acceptance())
    on_gpu = torch.cuda.is_available()
    dtype = vllm.dtype or model.dtype
    kv_bytes = None if vllm.kv_cache_gib is None else int(vllm.kv_cache_gib * _GIB)
    if kv_bytes is None and not on_gpu:
        # Otherwise vLLM takes most of the machine's memory. With room for a partly used block per
        # rollout.
        num_tokens = (config.num_slots + 1) * (max_model_len + _LARGEST_BLOCK)
        kv_bytes = min(4 * _GIB, _kv_bytes(model_config, getattr(torch, dtype), num_tokens))
    llm_args: dict[str, Any] = {
        "dtype": dtype,
        "enable_sleep_mode": vllm.sleep,
        "max_model_len": max_model_len,
        "max_num_seqs": config.num_slots,
        "gpu_memory_utilization": vllm.gpu_memory_utilization,
        "use_tqdm_on_load": False,
        "enforce_eager": not on_gpu if vllm.enforce_eager is None else vllm.enforce_eager,
    }
    if kv_bytes is not None:
        llm_args["kv_cache_memory_bytes"] = kv_bytes
    if vllm.max_num_batched_tokens is not None:
        llm_args["max_num_batched_tokens"] = vllm.max_num_batched_tokens
    return VLLMEngine(
        model.path,
        strategy=vllm.strategy,
        num_speculative_tokens=vllm.num_speculative_tokens,
        first_chunk=vllm.first_chunk,
        llm_args=llm_args,
    )
