"""Models with a state instead of a KV cache: Mamba, linear attention, short convolutions.

Where a draft is rejected, vLLM has to take the state back to the last token that was kept. With
vLLM 0.32 on a CPU it does not: log-probs are off by nats as soon as the engine speculates, whatever
the proposer. On a GPU it has not been tried with this plugin. So these models are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from spec_rollout.engines.vllm.compat.identity import check_pipeline, is_ours, mark_noise


def check_state(model_config: Any) -> None:
    """Refuses a model of which a part of the past is not in a KV cache.

    Raises:
        ValueError: naming the type of the model, the version of vLLM and the reason.
    """
    if not (
        model_config.is_hybrid or model_config.is_attention_free or model_config.has_inner_state
    ):
        return
    import vllm

    raise ValueError(
        f"model: expected one whose layers all have a KV cache, got {model_config.model!r} of type "
        f"{model_config.hf_config.model_type!r}, which keeps a recurrent state: vLLM "
        f"{vllm.__version__} is not known to take rejected drafts back out of it (with 0.32 on "
        "CPUs log-probs are wrong by nats; not tried on GPUs)"
    )


def checked_config(original: Callable) -> Callable:
    """`EngineArgs.create_engine_config`, which every engine is made from."""

    def create_engine_config(
        self: Any, usage_context: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        config = original(self, usage_context, *args, **kwargs)
        if is_ours(config.speculative_config):
            check_state(config.model_config)
            check_pipeline(config.parallel_config)
            mark_noise(config, usage_context)
        return config

    return create_engine_config
