"""Models with a recurrent state, pipelines and asynchronous scheduling are refused before anything
is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm_samples import LLM_ARGS, VOCAB, make_model

_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
MODELS: dict[str, dict[str, Any]] = {
    "falcon_h1": {},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "mamba": {},
}


def _offline(model: str, **args: Any) -> Any:
    from spec_rollout.engines.vllm import VLLMEngine

    return VLLMEngine(model, llm_args={**LLM_ARGS, **args})


def _served(model: str, **args: Any) -> Any:
    """What `vllm serve` makes of its arguments before it starts a process."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    from spec_rollout.engines.vllm import engine_args

    return AsyncEngineArgs(model, **engine_args(), **args).create_engine_config()


def _without_front_end(model: str, is_async: bool = False, **args: Any) -> Any:
    """The worker's own check, where the caller's process has no plugin."""
    from vllm.engine.arg_utils import EngineArgs

    from spec_rollout.engines.vllm import engine_args
    from spec_rollout.engines.vllm.proposer import ReuseProposer

    config = EngineArgs(model, skip_tokenizer_init=True, **args).create_engine_config()
    config.speculative_config = SimpleNamespace(**engine_args()["speculative_config"])
    config.scheduler_config.async_scheduling = is_async
    return ReuseProposer(config)


@pytest.mark.parametrize("make", [_offline, _served, _without_front_end])
@pytest.mark.parametrize("model_type", MODELS)
def test_a_model_with_a_recurrent_state_is_refused(
    vllm_installed: None, tmp_path: Path, model_type: str, make: Callable[[str], Any]
) -> None:
    import vllm
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **_SHAPE, **MODELS[model_type])
    config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    config.save_pretrained(tmp_path)  # no weights: refused before they would be read
    message = f"model: expected .* KV cache, got .*'{model_type}'.* vLLM {vllm.__version__} is not"
    with pytest.raises(ValueError, match=message):
        make(str(tmp_path))


@pytest.mark.parametrize("make", [_offline, _served, _without_front_end])
def test_a_pipeline_is_refused(
    vllm_installed: None, tmp_path: Path, make: Callable[..., Any]
) -> None:
    make_model(tmp_path)
    with pytest.raises(ValueError, match=r"pipeline_parallel_size: expected 1 .*, got 2"):
        make(str(tmp_path), pipeline_parallel_size=2)


def test_asynchronous_scheduling_is_refused(vllm_installed: None, tmp_path: Path) -> None:
    """Should a vLLM leave it on: those so far turn it off for a speculative method of ours."""
    make_model(tmp_path)
    with pytest.raises(ValueError, match=r"async_scheduling: expected False .*, got True"):
        _without_front_end(str(tmp_path), is_async=True)


def test_other_models_are_not(vllm_installed: None, tmp_path: Path) -> None:
    make_model(tmp_path)
    assert _served(str(tmp_path)).speculative_config is not None
