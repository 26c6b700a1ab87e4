"""Every reach into vLLM's internals, in one file.

Official hooks carry most of the plugin: the `custom_class` proposer, `worker_extension_cls`,
`additional_config` and the `vllm.general_plugins` entry point. What has no official hook is
replaced here, once per process; each replacement hands over to vLLM's own code unless the engine
runs our proposer:

- `GPUModelRunner._sample`: the token at the end of a prefill and the token after a draft never
  reach a proposer, and vLLM's rejection sampler knows neither keyed noise nor stored log-probs.
- `GPUModelRunner._calc_spec_decode_metadata`: prepares a rejection sampler's indices in every
  step, with drafts or without; our sampler needs one array of them.
- `InputProcessor.process_inputs`, `EngineCore.preprocess_add_request`: a malformed request must
  fail alone, before a worker sees it.
- `SamplingParams._validate_spec_decode`, `build_logitsprocs`: vLLM refuses min_p and logit_bias
  with any speculative decoding; our sampler and its plain sampler honour them.
- `dispatch_cpu_unquantized_gemm` (CPU wheels): frees the weights after packing them, so that they
  cannot be updated.
- `expand_batch_to_tokens` (CPU wheels): writes into a copy; vLLM's own rejection sampler then
  reads uninitialised memory.

Importing this module imports vLLM; `install()` may be called any number of times.
"""

from __future__ import annotations

import functools
import operator
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from spec_rollout.engines.vllm.admission import admit
from spec_rollout.engines.vllm.wire import EXTRA_ARG

if TYPE_CHECKING:
    from spec_rollout.engines.vllm.proposer import ReuseProposer
    from spec_rollout.engines.vllm.worker.request_state import Row

PROPOSER = "spec_rollout.engines.vllm.proposer.ReuseProposer"
WORKER = "spec_rollout.engines.vllm.worker.ReuseWorker"

OLDEST = (0, 26)  # the `_sample` hook and `custom_class` have the form used here
NEWEST_TESTED = (0, 32)

_ROW = "_spec_rollout_row"
_UNSEEN = object()
_installed = False
_keep_cpu_weights = False


def check_version(version: str) -> None:
    """Refuses versions known not to work, warns of versions never tried.

    Raises:
        ImportError: if vLLM is older than the hooks this file needs.
    """
    found = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    oldest, newest = (".".join(map(str, v)) for v in (OLDEST, NEWEST_TESTED))
    if found < OLDEST:
        raise ImportError(
            f"vllm {version} is too old for spec_rollout's engine, which needs {oldest} or newer"
        )
    if found > NEWEST_TESTED:
        warnings.warn(
            f"vllm {version} is newer than what spec_rollout's engine was tested with "
            f"({oldest} to {newest}); it replaces internals of vLLM that may have changed",
            stacklevel=3,
        )


def _wrap(owner: Any, name: str, make: Callable[[Callable], Callable]) -> None:
    """Replaces `owner.name` by `make(original)`.

    Raises:
        ImportError: if there is no such thing to replace.
    """
    original = getattr(owner, name, None)
    if original is None:
        import vllm

        raise ImportError(
            f"vllm {vllm.__version__} has no {getattr(owner, '__name__', owner)}.{name}, "
            "which spec_rollout's engine replaces; use a version from "
            f"{'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST_TESTED))}"
        )
    setattr(owner, name, functools.wraps(original)(make(original)))


def install() -> None:
    """Installs the hooks in this process.

    Raises:
        ImportError: if vLLM is too old, or its internals are not what this file expects.
    """
    global _installed
    if _installed:
        return
    import vllm

    check_version(vllm.__version__)
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.input_processor import InputProcessor

    _wrap(InputProcessor, "process_inputs", _checked_inputs)
    _wrap(EngineCore, "preprocess_add_request", _checked_request)
    _wrap(SamplingParams, "_validate_spec_decode", _lenient_validation)
    # The model runner's module is heavy and sets up devices: it is hooked when a worker imports it
    # (`install_worker`).
    _installed = True


def plugin() -> None:
    """The `vllm.general_plugins` entry point: `install`, but it never stands in the way of a vLLM
    that does not fit.

    vLLM calls it in every process of every engine, ours or not.
    """
    try:
        install()
    except ImportError as error:
        warnings.warn(f"spec_rollout's vLLM plugin is off: {error}", stacklevel=2)


_worker_installed = False


def install_worker() -> None:
    """Installs the hooks that only a worker process needs; called while its model runner is being
    built."""
    global _worker_installed
    install()
    if _worker_installed:
        return
    from vllm.v1.worker import gpu_model_runner

    _wrap(gpu_model_runner.GPUModelRunner, "_sample", _sample_hook)
    _wrap(gpu_model_runner.GPUModelRunner, "_calc_spec_decode_metadata", _metadata_hook)
    _wrap(gpu_model_runner, "build_logitsprocs", _all_logitsprocs)
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        _fix_cpu_wheels()
    _worker_installed = True


# -- Requests


def is_ours(speculative_config: Any) -> bool:
    """Whether an engine with this speculative config runs our proposer."""
    return (
        speculative_config is not None
        and speculative_config.method == "custom_class"
        and speculative_config.model == PROPOSER
    )


def _check(vllm_config: Any, request_id: str, params: Any) -> None:
    if not (getattr(params, "extra_args", None) or {}).get(EXTRA_ARG):
        return
    model_config = vllm_config.model_config
    try:
        if not is_ours(vllm_config.speculative_config):
            raise ValueError(
                f"request {request_id}: {EXTRA_ARG}: expected an engine started with "
                "spec_rollout.engines.vllm.engine_args(), got one without"
            )
        admit(
            request_id,
            params,
            vocab_size=model_config.get_vocab_size(),
            logprobs_mode=model_config.logprobs_mode,
        )
    except ValueError as error:
        raise _request_error()(str(error)) from error


@functools.cache
def _request_error() -> type[ValueError]:
    """ValueError, in the form in which vLLM's asynchronous front end takes it for the client's
    mistake.

    Of others it says that the server failed, and not why.
    """
    from vllm import exceptions

    client_error = getattr(exceptions, "VLLMClientError", None)
    if client_error is None:  # vLLM took ValueError for it
        return ValueError
    return type("ReuseRequestError", (client_error, ValueError), {"__module__": __name__})


def _checked_inputs(original: Callable) -> Callable:
    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kw: Any):
        _check(self.vllm_config, request_id, params)
        return original(self, request_id, prompt, params, *args, **kw)

    return process_inputs


def _checked_request(original: Callable) -> Callable:
    def preprocess_add_request(self: Any, request: Any):
        _check(self.vllm_config, request.request_id, request.sampling_params)
        return original(self, request)

    return preprocess_add_request


def _lenient_validation(original: Callable) -> Callable:
    def _validate_spec_decode(self: Any, speculative_config: Any) -> None:
        if not is_ours(speculative_config):
            original(self, speculative_config)

    return _validate_spec_decode


def _all_logitsprocs(original: Callable) -> Callable:
    from vllm.v1.sample.logits_processor import BUILTIN_LOGITS_PROCESSORS, LogitsProcessors

    def build_logitsprocs(
        vllm_config: Any, device: Any, is_pin_memory: bool, is_pooling_model: bool, custom: Any = ()
    ) -> Any:
        if custom or is_pooling_model or not is_ours(vllm_config.speculative_config):
            return original(vllm_config, device, is_pin_memory, is_pooling_model, custom)
        # Requests without a key go through vLLM's plain sampler, one logits row each, as without
        # speculation.
        return LogitsProcessors(
            make(vllm_config, device, is_pin_memory) for make in BUILTIN_LOGITS_PROCESSORS
        )

    return build_logitsprocs


# -- Sampling


def _sample_hook(original: Callable) -> Callable:
    from spec_rollout.engines.vllm.proposer import ReuseProposer
    from spec_rollout.engines.vllm.worker.groups import Known

    def _sample(self: Any, logits: Any, spec_decode_metadata: Any, *args: Any, **kw: Any):
        proposer = getattr(self, "drafter", None)
        if not isinstance(proposer, ReuseProposer):
            return original(self, logits, spec_decode_metadata, *args, **kw)
        # vLLM replaces drafts by zeros near the model's length, unless the drafter is known to stop
        # in time; ours does.
        self.effective_drafter_max_model_len = self.max_model_len + self.num_spec_tokens + 1
        rows = _rows(self, proposer)
        proposer.sampler.count(int(self.query_start_loc.np[len(rows)]), logits.shape[0], rows)
        if spec_decode_metadata is not None and not any(spec_decode_metadata.num_draft_tokens):
            spec_decode_metadata = None  # as without speculation: one row of logits per request
        if spec_decode_metadata is None and not any(rows):
            proposer.sampler.known = Known.of(rows)
            return original(self, logits, None, *args, **kw)
        return _sample_rows(self, proposer, rows, logits, spec_decode_metadata)

    return _sample


def _metadata_hook(original: Callable) -> Callable:
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

    from spec_rollout.engines.vllm.proposer import ReuseProposer
    from spec_rollout.engines.vllm.worker.verify import to_device

    def _calc_spec_decode_metadata(
        self: Any, num_draft_tokens: np.ndarray, cu_num_scheduled_tokens: np.ndarray, *args: Any
    ):
        if not isinstance(getattr(self, "drafter", None), ReuseProposer):
            return original(self, num_draft_tokens, cu_num_scheduled_tokens, *args)
        num_reqs = num_draft_tokens.size
        if num_draft_tokens.any():
            # Of each request the rows of its last token and of its draft.
            counts = num_draft_tokens + 1
            ends = np.cumsum(counts)
            rows = np.arange(ends[-1]) + np.repeat(
                cu_num_scheduled_tokens[:num_reqs] - ends, counts
            )
            logits_indices = to_device(rows.astype(np.int32), self.device)
        else:  # as without speculation
            logits_indices = self.query_start_loc.gpu[1 : num_reqs + 1] - 1
        return SpecDecodeMetadata(
            draft_token_ids=None,
            num_draft_tokens=num_draft_tokens.tolist(),
            cu_num_draft_tokens=None,
            cu_num_sampled_tokens=None,
            target_logits_indices=None,
            bonus_logits_indices=None,
            logits_indices=logits_indices,
        )

    return _calc_spec_decode_metadata


def _rows(runner: Any, proposer: ReuseProposer) -> list[Row | None]:
    """Our state of each request of the batch, made when it is first seen; None for requests without
    a key."""
    requests = runner.requests
    states = [requests[r] for r in runner.input_batch.req_ids]
    known_states, known_rows = proposer.last_batch
    if len(states) == len(known_states) and all(map(operator.is_, states, known_states)):
        return known_rows
    rows = [getattr(state, _ROW, _UNSEEN) for state in states]
    if _UNSEEN in rows:
        for i, state in enumerate(states):
            if rows[i] is _UNSEEN:
                rows[i] = _new_row(runner, proposer, state)
                # On vLLM's own record, which lives exactly as long as the request.
                setattr(state, _ROW, rows[i])
    proposer.last_batch = (states, rows)
    return rows


def _new_row(runner: Any, proposer: ReuseProposer, state: Any) -> Row | None:
    from spec_rollout.engines.vllm.worker.masks import LogitMasks
    from spec_rollout.engines.vllm.worker.request_state import Row

    params = state.sampling_params
    request = admit(state.req_id, params) if params is not None else None
    if request is None:
        return None
    room = runner.max_model_len - state.num_prompt_tokens
    stops = set(params.stop_token_ids or ())
    if not params.ignore_eos and getattr(params, "eos_token_id", None) is not None:
        stops.add(params.eos_token_id)
    row = Row(
        request,
        prompt_len=state.num_prompt_tokens,
        max_response_len=room if params.max_tokens is None else min(params.max_tokens, room),
        stop_token_ids=frozenset(stops),
        first_chunk=proposer.first_chunk,
        masks=LogitMasks.of(params, runner.device),
        history_id=proposer.history_id(request.collect_id),
        can_follow=proposer.can_follow(request.collect_id),
    )
    proposer.added(row)
    return row


def _sample_rows(
    runner: Any, proposer: ReuseProposer, rows: list[Row | None], logits: Any, metadata: Any
) -> Any:
    from vllm.v1.outputs import LogprobsTensors, SamplerOutput

    from spec_rollout.engines.vllm.worker.logprobs import SampledLogprobs
    from spec_rollout.engines.vllm.worker.sampler import Step

    batch = runner.input_batch
    sampling = batch.sampling_metadata
    temperature = 0.0 if sampling.temperature is None else sampling.temperature
    top_k = 0 if sampling.top_k is None else sampling.top_k
    top_p = 1.0 if sampling.top_p is None else sampling.top_p
    logprobs = None
    if sampling.max_num_logprobs is not None:
        num_top = sampling.max_num_logprobs
        logprobs = SampledLogprobs(
            logits.shape[-1] if num_top < 0 else num_top,
            raw=runner.sampler.logprobs_mode == "raw_logprobs",
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            make=LogprobsTensors,
        )
    num_reqs = len(rows)
    tokens, logprobs_tensors = proposer.sampler(
        Step(
            rows=rows,
            lens=batch.num_tokens_no_spec[:num_reqs].astype("int64"),
            scheduled=None if metadata is None else batch.spec_token_ids[:num_reqs],
            discard=runner.discard_request_mask.np[:num_reqs],
            logits=logits,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            sample_stock=lambda rows_: runner.sampler(logits=rows_, sampling_metadata=sampling),
            logprobs=logprobs,
        )
    )
    return SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=logprobs_tensors)


# -- Workers and weights


def proposer_of(worker: Any) -> ReuseProposer:
    """The proposer of a vLLM worker.

    Raises:
        RuntimeError: if it has none of ours (another rank of a pipeline, or other engine
            arguments).
    """
    from spec_rollout.engines.vllm.proposer import ReuseProposer

    proposer = getattr(worker.model_runner, "drafter", None)
    if not isinstance(proposer, ReuseProposer):
        raise RuntimeError(
            f"expected a worker with {PROPOSER}, got one with {type(proposer).__name__}"
        )
    return proposer


def load_weights(worker: Any, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copies weights, named as in the checkpoint, into the worker's model in place."""
    worker.model_runner.get_model().load_weights(named_tensors)


def weights_loaded(worker: Any) -> None:
    """Packs the new weights again where the platform keeps packed copies."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        for module in worker.model_runner.get_model().modules():
            pack = getattr(module, "_spec_rollout_pack", None)
            if pack is not None:
                pack()


def is_in_process(llm: Any) -> bool:
    """Whether the engine core of an `LLM` runs in this process, so that tensors can be handed over
    as they are."""
    return hasattr(llm.llm_engine.engine_core, "engine_core")


@contextmanager
def interruptible(llm: Any, before_step: Callable[[], None] | None) -> Iterator[None]:
    """Calls `before_step` before every step of an `LLM`; an exception in the block aborts all of
    its requests.

    vLLM alone would finish them, and mix up their outputs, in the next call.
    """
    engine = llm.llm_engine
    original = engine.step

    def step() -> Any:
        before_step()
        return original()

    if before_step is not None:
        engine.step = step
    try:
        yield
    except BaseException:
        engine.abort_request(list(engine.output_processor.request_states), internal=True)
        raise
    finally:
        if before_step is not None:
            engine.step = original


# -- Defects of the CPU wheels


@contextmanager
def threads_kept() -> Iterator[None]:
    """An engine set up in the block does not disable `torch.set_num_threads` for the rest of this
    process.

    vLLM's CPU worker does, for the sake of threads it has bound to cores; it binds none in the
    caller's process.
    """
    original = torch.set_num_threads
    try:
        yield
    finally:
        torch.set_num_threads = original


def keep_cpu_weights() -> None:
    """Lets models that are loaded from now on keep the unpacked weights, too (twice the memory, CPU
    only)."""
    global _keep_cpu_weights
    _keep_cpu_weights = True


def _fix_cpu_wheels() -> None:
    from vllm.model_executor.layers import utils
    from vllm.v1.sample import rejection_sampler

    def keep_weight(original: Callable) -> Callable:
        def dispatch_cpu_unquantized_gemm(layer: Any, remove_weight: bool) -> None:
            if not _keep_cpu_weights:
                original(layer, remove_weight)
                return
            original(layer, remove_weight=False)
            # The packed copy does not see updates of the weight; not a submodule, hence past
            # nn.Module.__setattr__.
            object.__setattr__(
                layer, "_spec_rollout_pack", lambda: original(layer, remove_weight=False)
            )

        return dispatch_cpu_unquantized_gemm

    def expand(original: Callable) -> Callable:
        def expand_batch_to_tokens(
            x: torch.Tensor,
            cu_num_tokens: torch.Tensor,
            num_tokens: int,
            replace_from: int = 0,
            replace_to: int = 0,
        ) -> torch.Tensor:
            counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
            out = x.repeat_interleave(counts.long(), output_size=num_tokens)
            return torch.where(out == replace_from, replace_to, out).to(x.dtype)

        return expand_batch_to_tokens

    name = "dispatch_cpu_unquantized_gemm"
    _wrap(utils, name, keep_weight)
    for module in ("linear", "vocab_parallel_embedding"):  # where it was imported by name
        loaded = sys.modules.get(f"vllm.model_executor.layers.{module}")
        if loaded is not None and hasattr(loaded, name):
            setattr(loaded, name, getattr(utils, name))
    _wrap(rejection_sampler, "expand_batch_to_tokens", expand)
