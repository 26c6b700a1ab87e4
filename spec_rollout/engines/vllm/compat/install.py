"""Puts the hooks into a process, once.

- `InputProcessor.process_inputs`, `EngineCore.preprocess_add_request`: a malformed request must
  fail alone, before a worker sees it.
- `EngineArgs.create_engine_config`: models that vLLM gets wrong when it speculates, and pipelines.
- `SamplingParams._validate_spec_decode`, `build_logitsprocs`: vLLM refuses min_p and logit_bias
  with any speculative decoding; our sampler and vLLM's plain one honour them.
- `EngineArgs.create_speculative_config`: the variable SPEC_ROLLOUT reaches engines that others
  build (`switch_on`).
- `GPUModelRunner._sample`: the token at the end of a prefill and the token after a draft never
  reach a proposer, and vLLM's rejection sampler knows neither keyed noise nor stored log-probs.
- `GPUModelRunner._calc_spec_decode_metadata`: prepares a rejection sampler's indices; our sampler
  needs one array of them.
- `GPUModelRunner._prepare_inputs`, `GPUModelRunner.take_draft_token_ids`: a step without drafts
  takes the host no more than without speculation. (CUDA graphs are another matter: vLLM's are sized
  for steps in which every request has all the draft tokens it can have, docs/vllm.md.)
- `GPUModelRunner._update_streaming_request`: a request whose prompt comes in pieces has other
  parameters with each of them.
- `GPUModelRunner._update_states`, only where engines share rollouts: what a request generated is
  known to others once it is over, also where no request comes after it.
- `GPUModelRunner.add_lora`: an adapter that comes anew is a change of weights.
- `_support_torch_compile`: transformers' classes, which a trainer in this process has models of.
- `EngineArgs.create_engine_config`, `WorkerBase.__init__`: engines on Model Runner V2 (`v2`), which
  construct no proposer that could install hooks.
- On CPUs, defects of the wheels (`cpu_wheels`).
"""

from __future__ import annotations

import functools
import warnings

from spec_rollout.engines.vllm.compat.versions import check_version, replace, require_vllm


@functools.cache
def install() -> None:
    """Installs the hooks that every process of an engine needs; may be called any number of times.

    Raises:
        ImportError: if vLLM is too old, or its internals are not what this package expects.
    """
    vllm = require_vllm("spec_rollout's plugin")
    check_version(vllm.__version__)
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.worker_base import WorkerBase

    from spec_rollout.engines.vllm.compat import recurrent, requests, switch_on
    from spec_rollout.engines.vllm.compat.v2 import config as v2_config
    from spec_rollout.engines.vllm.compat.v2 import start as v2_start

    replace(EngineArgs, "create_engine_config", recurrent.checked_config)
    replace(EngineArgs, "create_engine_config", v2_config.checked_config)
    replace(WorkerBase, "__init__", v2_start.hooked_worker)
    replace(InputProcessor, "process_inputs", requests.checked_inputs)
    replace(EngineCore, "preprocess_add_request", requests.checked_request)
    replace(SamplingParams, "_validate_spec_decode", requests.lenient_validation)
    replace(EngineArgs, "create_speculative_config", switch_on.speculative_config)
    # The model runner's module is heavy and sets up devices: it is hooked when a worker imports it
    # (`install_worker`).


@functools.cache
def install_worker() -> None:
    """Installs the hooks of a worker process; called while its model runner is being built."""
    install()
    from vllm.compilation import decorators
    from vllm.platforms import current_platform
    from vllm.v1.worker import gpu_model_runner

    from spec_rollout.engines.vllm.compat import (
        cpu_wheels,
        requests,
        sampling,
        shared_classes,
        watching,
    )

    replace(decorators, "_support_torch_compile", shared_classes.only_vllms)
    runner = gpu_model_runner.GPUModelRunner
    replace(runner, "_sample", sampling.sample)
    replace(runner, "_prepare_inputs", sampling.plain_inputs)
    replace(runner, "_calc_spec_decode_metadata", sampling.few_indices)
    replace(runner, "take_draft_token_ids", sampling.drafts_if_any)
    if hasattr(runner, "_update_streaming_request"):  # the oldest versions may not stream prompts
        replace(runner, "_update_streaming_request", sampling.chunk_by_chunk)
    replace(runner, "add_lora", watching.watched_adapters(sampling.side_of))
    replace(gpu_model_runner, "build_logitsprocs", requests.all_logitsprocs)
    if current_platform.is_cpu():
        cpu_wheels.fix()


@functools.cache
def install_sharing() -> None:
    """Installs what a worker needs that shares rollouts with other engines, and no other does."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from spec_rollout.engines.vllm.compat import sampling

    replace(GPUModelRunner, "_update_states", sampling.let_go)


def plugin() -> None:
    """The `vllm.general_plugins` entry point: `install`, with a warning where vLLM does not fit.

    vLLM calls it in every process of every engine, ours or not, so it must not raise.
    """
    try:
        install()
    except ImportError as error:
        warnings.warn(f"spec_rollout's vLLM plugin is off: {error}", stacklevel=2)
