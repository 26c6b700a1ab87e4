"""Which engines run the plugin."""

from __future__ import annotations

import importlib
import secrets
from typing import Any

from spec_rollout.engines.vllm.options import MODEL_RUNNER, PROPOSER, V2_METHOD, section_of

_SALT = "_spec_rollout_salt"
WORKER = "spec_rollout.engines.vllm.worker.ReuseWorker"


def is_ours(speculative_config: Any) -> bool:
    """Whether an engine with this speculative config runs our proposer."""
    return (
        speculative_config is not None
        and speculative_config.method == "custom_class"
        and speculative_config.model == PROPOSER
    )


def is_v2(vllm_config: Any) -> bool:
    """Whether an engine was set up to run the plugin on vLLM's Model Runner V2."""
    speculative = vllm_config.speculative_config
    return (
        speculative is not None
        and speculative.method == V2_METHOD
        and section_of(vllm_config.additional_config).get(MODEL_RUNNER) == "v2"
    )


def check_pipeline(parallel: Any) -> None:
    """Refuses an engine whose layers are spread over a pipeline.

    Args:
        parallel: vLLM's `ParallelConfig`.

    Raises:
        ValueError: naming the setting.
    """
    if parallel.pipeline_parallel_size > 1:
        raise ValueError(
            "pipeline_parallel_size: expected 1 with the drafter of spec_rollout, got "
            f"{parallel.pipeline_parallel_size}"
        )


def check_scheduling(scheduling: Any) -> None:
    """Refuses an engine with asynchronous scheduling, on Model Runner V1.

    vLLM turns it off by itself for speculative methods that it does not know to go with it. With it
    a step's tokens would not be known where the next ones are proposed.

    Args:
        scheduling: vLLM's `SchedulerConfig`.

    Raises:
        ValueError: naming the setting.
    """
    if scheduling.async_scheduling:
        raise ValueError(
            "async_scheduling: expected False with the drafter of spec_rollout, got True; start "
            "the engine with async_scheduling=False (--no-async-scheduling)"
        )


def has_peers(parallel: Any) -> bool:
    """Whether other workers serve the same requests, as tensor-parallel ranks do.

    Args:
        parallel: vLLM's `ParallelConfig`.
    """
    return bool(parallel.world_size > 1)


def schedules_apart(parallel: Any) -> bool:
    """Whether tensor-parallel ranks have a scheduler each: all of them have to plan the same steps.

    On Model Runner V1 how much is proposed from a history depends on a rank's clock, so they would
    not. (On V2 the first rank's proposals are sent to the others.)

    Args:
        parallel: vLLM's `ParallelConfig`, or its `EngineArgs`.
    """
    return bool(
        parallel.distributed_executor_backend == "external_launcher"
        and parallel.tensor_parallel_size > 1
    )


def mark_noise(vllm_config: Any, usage_context: Any) -> None:
    """Gives a server without a seed noise of its own (`noise_salt`), where it is set up.

    An engine of `LLM` gets none: it repeats itself from run to run, as without us. Nor one whose
    ranks are set up each by itself: those of a replica have to draw alike.

    Args:
        usage_context: vLLM's; what the engine is set up for.
    """
    is_offline = usage_context is None or usage_context.name == "LLM_CLASS"
    parallel = vllm_config.parallel_config
    are_alone = parallel.distributed_executor_backend == "external_launcher"
    are_alone = are_alone or getattr(parallel, "nnodes", 1) > 1
    if not (is_offline or are_alone or vllm_config.model_config.seed):
        # Past the dataclass, whose fields are vLLM's; workers get it with the config.
        object.__setattr__(vllm_config, _SALT, secrets.randbits(63))


def noise_salt(vllm_config: Any) -> int:
    """What tells a server from others with vLLM's default seed; 0 where it was given one."""
    return getattr(vllm_config, _SALT, 0)


def noise_source(vllm_config: Any) -> dict[str, Any]:
    """What tells an engine's noise from that of others, as arguments of `EngineSide`."""
    parallel = vllm_config.parallel_config
    return {
        "engine_seed": vllm_config.model_config.seed or 0,
        # Replicas of a model without experts are engines by themselves, each with rank 0.
        "replica": getattr(parallel, "data_parallel_index", parallel.data_parallel_rank),
        "salt": noise_salt(vllm_config),
    }


def check_plugged(llm: Any) -> None:
    """Checks that an `LLM` was started with `engine_args()`.

    A worker extension of the user's own will do if it derives from ours.

    Raises:
        ValueError: naming what is missing.
    """
    engine = getattr(llm, "llm_engine", None)
    if engine is None:
        raise ValueError(f"llm: expected a vllm.LLM, got {type(llm).__name__}")
    config = engine.vllm_config
    expected = "llm: expected a vllm.LLM started with spec_rollout.engines.vllm.engine_args()"
    speculative = config.speculative_config
    if not is_ours(speculative) and not is_v2(config):
        found = None if speculative is None else f"{speculative.method} {speculative.model}"
        raise ValueError(f"{expected}, got one with speculative_config {found}")
    extension = config.parallel_config.worker_extension_cls
    if extension != WORKER and not _derives_from_ours(extension):
        raise ValueError(f"{expected}, got one with worker_extension_cls {extension or None}")


def _derives_from_ours(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    if not module:
        return False
    try:
        extension = getattr(importlib.import_module(module), attribute, None)
    except ImportError:
        return False
    return hasattr(extension, "spec_rollout_begin")
