"""Requests are checked where they enter an engine, and keep what speculation would take away."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

from spec_rollout.engines.vllm.admission import admit
from spec_rollout.engines.vllm.compat.identity import is_ours, is_v2
from spec_rollout.engines.vllm.compat.switch_on import configured_options
from spec_rollout.engines.vllm.compat.v2 import config as v2_config
from spec_rollout.engines.vllm.options import VARIABLE
from spec_rollout.engines.vllm.wire import EXTRA_ARG, SALT_ARG, SampleName


def checked_inputs(original: Callable) -> Callable:
    """For `InputProcessor.process_inputs`: checks in the front end."""

    def process_inputs(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kw: Any
    ) -> Any:
        _check(self.vllm_config, request_id, params)
        return original(self, request_id, prompt, params, *args, **kw)

    return process_inputs


def checked_request(original: Callable) -> Callable:
    """For `EngineCore.preprocess_add_request`: checks where the front end does not know us."""

    def preprocess_add_request(self: Any, request: Any) -> Any:
        _check(self.vllm_config, request.request_id, request.sampling_params)
        _carry_salt(request)
        if is_v2(self.vllm_config):
            v2_config.carry_seed(request)
        return original(self, request)

    return preprocess_add_request


def lenient_validation(original: Callable) -> Callable:
    """For `SamplingParams._validate_spec_decode`: min_p and logit_bias are allowed."""

    def _validate_spec_decode(self: Any, speculative_config: Any) -> None:
        if not is_ours(speculative_config) and not v2_config.is_marked(speculative_config):
            original(self, speculative_config)

    return _validate_spec_decode


def all_logitsprocs(original: Callable) -> Callable:
    """For `build_logitsprocs`: all of vLLM's own, for requests without a key.

    They go through vLLM's plain sampler, one logits row each, as without speculation.
    """
    from vllm.v1.sample.logits_processor import BUILTIN_LOGITS_PROCESSORS, LogitsProcessors

    def build_logitsprocs(
        vllm_config: Any, device: Any, is_pin_memory: bool, is_pooling_model: bool, custom: Any = ()
    ) -> Any:
        if custom or is_pooling_model or not is_ours(vllm_config.speculative_config):
            return original(vllm_config, device, is_pin_memory, is_pooling_model, custom)
        return LogitsProcessors(
            make(vllm_config, device, is_pin_memory) for make in BUILTIN_LOGITS_PROCESSORS
        )

    return build_logitsprocs


def _carry_salt(request: Any) -> None:
    """Puts the `cache_salt` of a request where workers see it: histories must not cross it."""
    salt, params = getattr(request, "cache_salt", None), request.sampling_params
    if salt and params is not None:
        params = copy.copy(params)
        params.extra_args = {**(params.extra_args or {}), SALT_ARG: salt}
        request.sampling_params = params


def _check(vllm_config: Any, request_id: str, params: Any) -> None:
    extra_args = getattr(params, "extra_args", None)
    if extra_args is None:
        return
    on_v2 = is_v2(vllm_config)
    ours = on_v2 or is_ours(vllm_config.speculative_config)
    if isinstance(extra_args, dict):
        if extra_args.get(EXTRA_ARG) is None:
            return
    elif not ours:
        return  # vLLM's business
    model_config = vllm_config.model_config
    try:
        if not ours:
            raise ValueError(
                f"request {request_id}: {EXTRA_ARG}: expected an engine started with "
                "spec_rollout.engines.vllm.engine_args(), got one without"
            )
        request = admit(
            request_id,
            params,
            vocab_size=model_config.get_vocab_size(),
            logprobs_mode=model_config.logprobs_mode,
            on_v2=on_v2,
        )
        options = configured_options(vllm_config.additional_config)
        if isinstance(request, SampleName) and (options is None or not options.is_on):
            raise ValueError(
                f"request {request_id}: {EXTRA_ARG}: a sample's index: expected an engine that "
                f"remembers samples ({VARIABLE}=coupled or lenient when it was started), got one "
                "that does not"
            )
    except ValueError as error:
        raise _request_error()(str(error)) from error


@functools.cache
def _request_error() -> type[ValueError]:
    """ValueError, of a kind that vLLM's asynchronous front end takes for the client's mistake.

    Of other errors it says that the server failed, and not why.
    """
    from vllm import exceptions

    client_error = getattr(exceptions, "VLLMClientError", None)
    if client_error is None:  # this vLLM takes any ValueError for it
        return ValueError
    return type("ReuseRequestError", (client_error, ValueError), {"__module__": __name__})
