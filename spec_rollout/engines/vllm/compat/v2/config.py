"""Engines that are set up for the plugin on Model Runner V2, in every process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from spec_rollout.engines.vllm.compat.identity import is_v2, mark_noise
from spec_rollout.engines.vllm.compat.recurrent import check_state
from spec_rollout.engines.vllm.compat.switch_on import configured_options
from spec_rollout.engines.vllm.compat.watching import log
from spec_rollout.engines.vllm.options import SECTION, first_chunk
from spec_rollout.engines.vllm.wire import EXTRA_ARG, ReuseRequest, parse

if TYPE_CHECKING:
    from spec_rollout.engines.vllm.worker.v2.table import DraftTable

SCHEDULER = "spec_rollout.engines.vllm.compat.v2.scheduler.ReuseScheduler"
TABLE = "_spec_rollout_table"  # of vLLM's `RequestState`, which samplers and speculator are given
_MARK = "_spec_rollout_v2"


def checked_config(original: Callable) -> Callable:
    """For `EngineArgs.create_engine_config`: refuses what cannot be, and sets the scheduler."""

    def create_engine_config(
        self: Any, usage_context: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        config = original(self, usage_context, *args, **kwargs)
        if is_v2(config):
            _check(config)
            _fit_warm_up(config)
            mark_noise(config, usage_context)
            if config.scheduler_config.async_scheduling:
                _set_scheduler(config.scheduler_config)
            # Past the dataclass, whose fields are vLLM's.
            object.__setattr__(config.speculative_config, _MARK, True)
        return config

    return create_engine_config


def is_marked(speculative_config: Any) -> bool:
    """Whether the speculative config is that of an engine with the plugin on V2."""
    return getattr(speculative_config, _MARK, False)


def table_of(runner: Any) -> DraftTable | None:
    """The drafts of a model runner's requests; None if it is not V2's, with the plugin."""
    return getattr(getattr(runner, "req_states", None), TABLE, None)


def carry_seed(request: Any) -> None:
    """Gives a request with a noise key and no seed the key for a seed.

    Args:
        request: vLLM's, as the engine core gets it; its parameters are replaced, not changed.
    """
    params = request.sampling_params
    if params is None or params.seed is not None or not isinstance(params.extra_args, dict):
        return
    data = params.extra_args.get(EXTRA_ARG)
    if data is None:
        return
    reuse = parse(data)
    if isinstance(reuse, ReuseRequest):
        params = copy.copy(params)
        # -1 is no seed to vLLM.
        params.seed = reuse.key if reuse.key != -1 else -2
        request.sampling_params = params


def _set_scheduler(scheduling: Any) -> None:
    if scheduling.scheduler_cls is None:
        scheduling.scheduler_cls = SCHEDULER
    if scheduling.scheduler_cls == SCHEDULER:
        return
    from spec_rollout.engines.vllm.compat.v2.scheduler import ReuseScheduler

    # Any other plans all tokens that can be proposed, for every request in every step.
    found = scheduling.get_scheduler_cls()
    if not (isinstance(found, type) and issubclass(found, ReuseScheduler)):
        raise ValueError(
            "scheduler_cls: expected None or a subclass of ReuseScheduler with async_scheduling, "
            f"got {scheduling.scheduler_cls}; derive it from {SCHEDULER}, or set "
            "async_scheduling=False"
        )


def _fit_warm_up(config: Any) -> None:
    """Leaves out vLLM's warm-up where its requests are longer than the engine's may be.

    `gpu.warmup` makes them by the number of speculative tokens alone: a prompt of K + 2, and K + 1
    more in each of five steps at most. Past the model's length it would write into memory of
    others; with a prompt that is no step's there would be no request at all.
    """
    kernels = config.kernel_config
    most = config.speculative_config.num_speculative_tokens
    prompt, longest = most + 2, most + 2 + 5 * (most + 1)
    room, budget = config.model_config.max_model_len, config.scheduler_config.max_num_batched_tokens
    if not kernels.enable_jit_warmup or (longest <= room and prompt <= budget):
        return
    kernels.enable_jit_warmup = False
    found = f"max_model_len is {room}" if longest > room else f"max_num_batched_tokens is {budget}"
    log(
        f"{SECTION}: vLLM's warm-up (kernel_config.enable_jit_warmup) is left out, the first "
        f"requests compile kernels: with {most} speculative tokens its requests have a prompt of "
        f"{prompt} tokens and grow to {longest}, and {found}"
    )


def _check(config: Any) -> None:
    asked = f"{SECTION} on Model Runner V2"
    if not config.use_v2_model_runner:
        raise ValueError(
            f"{asked}: expected an engine on it, got one on Model Runner V1; set "
            "VLLM_USE_V2_MODEL_RUNNER=1 before vLLM is imported, or leave V2 out of engine_args()"
        )
    check_state(config.model_config)
    first_chunk(config.additional_config)
    budget = config.scheduler_config.max_num_batched_tokens
    most = config.speculative_config.num_speculative_tokens
    if most >= budget:
        raise ValueError(
            f"num_speculative_tokens: expected fewer than max_num_batched_tokens ({budget}), "
            f"got {most}"
        )
    parallel = config.parallel_config
    for name, wanted, got in (
        ("pipeline_parallel_size", 1, parallel.pipeline_parallel_size),
        (
            "enable_batch_sharded_sampling",
            False,
            getattr(parallel, "enable_batch_sharded_sampling", False),
        ),
        ("watermark_config", None, getattr(config, "watermark_config", None)),
    ):
        if got != wanted:
            raise ValueError(f"{asked}: {name}: expected {wanted}, got {got}")
    options = configured_options(config.additional_config)
    if options is not None and options.is_on:
        is_async = config.scheduler_config.async_scheduling
        if is_async != (options.lagged_tokens > 0):
            raise ValueError(
                f"{asked}: async_scheduling: expected {not is_async} with mode {options.mode} and "
                f"lagged_tokens {options.lagged_tokens}, got {is_async}"
            )
