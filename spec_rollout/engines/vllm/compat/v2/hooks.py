"""Puts the plugin into the model runner of a worker on V2, once per process.

- `init_speculator`: our speculator in the place of that of `ngram_gpu`.
- `ModelState.custom_sampler`: our samplers, which take over the state of vLLM's own.
- `GPUModelRunner.__init__`: synchronous scheduling is told how many tokens were proposed.
- `GPUModelRunner.add_requests`, `load_model`, `add_lora`: what requests are proposed from history
  depends on their prompts; and which sample each is, on when the weights changed. A request whose
  prompt comes in pieces is another one with each of them.
- `GPUModelRunner._remove_request`, `finish_requests`: who is gone for good, and who was preempted.
- `GPUModelRunner.prepare_inputs`, `_set_active_loras`: adapters of the output head, row by row.
- `GPUModelRunner._dummy_sampler_run`: the profile of memory sees steps that verify.
- `compile_or_warm_up_model` of a worker (`start`): vLLM's warm-up is nobody's request.

Each hands over to vLLM's own code unless the engine is set up for the plugin.
"""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Callable
from typing import Any

from spec_rollout.drafting import NoiseLaw
from spec_rollout.engines.vllm.admission import admit
from spec_rollout.engines.vllm.compat.cpu_wheels import keep_cpu_weights
from spec_rollout.engines.vllm.compat.identity import WORKER, has_peers, is_v2, noise_source
from spec_rollout.engines.vllm.compat.sampling import arrival
from spec_rollout.engines.vllm.compat.switch_on import configured_options
from spec_rollout.engines.vllm.compat.v2.adapters import counting_rows, naming_each_row
from spec_rollout.engines.vllm.compat.v2.config import TABLE, table_of
from spec_rollout.engines.vllm.compat.v2.handler import CountingHandler
from spec_rollout.engines.vllm.compat.v2.sampler import samplers
from spec_rollout.engines.vllm.compat.v2.speculator import ReuseSpeculator
from spec_rollout.engines.vllm.compat.v2.warm_up import profiled_verification
from spec_rollout.engines.vllm.compat.versions import replace
from spec_rollout.engines.vllm.compat.watching import (
    attach_calls,
    log,
    watch_weights,
    watched_adapters,
)
from spec_rollout.engines.vllm.options import first_chunk
from spec_rollout.engines.vllm.wire import ReuseRequest
from spec_rollout.engines.vllm.worker.engine_side import EngineSide
from spec_rollout.engines.vllm.worker.v2.lagged import LaggedProposals
from spec_rollout.engines.vllm.worker.v2.proposals import Proposals
from spec_rollout.engines.vllm.worker.v2.table import DraftTable


@functools.cache
def install_worker() -> None:
    """Installs the hooks of a worker process; called before its model runner is built."""
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu import model_runner
    from vllm.v1.worker.gpu.model_states.interface import ModelState

    from spec_rollout.engines.vllm.compat import cpu_wheels

    runner = model_runner.GPUModelRunner
    replace(model_runner, "init_speculator", _speculator)
    replace(ModelState, "custom_sampler", _samplers)
    replace(runner, "__init__", _counting)
    replace(runner, "load_model", _watched)
    replace(runner, "add_lora", watched_adapters(_side))
    replace(runner, "add_requests", _arriving)
    replace(runner, "_remove_request", _leaving)
    replace(runner, "finish_requests", _over)
    replace(runner, "prepare_inputs", counting_rows)
    replace(runner, "_set_active_loras", naming_each_row)
    replace(runner, "_dummy_sampler_run", profiled_verification)
    if current_platform.is_cpu():
        cpu_wheels.fix()
    keep_cpu_weights()
    attach_calls(pkgutil.resolve_name(WORKER))  # by name, as vLLM does: it imports `compat`


def _speculator(original: Callable) -> Callable:
    def init_speculator(vllm_config: Any, device: Any, req_states: Any) -> Any:
        if not is_v2(vllm_config):
            return original(vllm_config, device, req_states)
        most = vllm_config.speculative_config.num_speculative_tokens
        # An asynchronous scheduler plans the chunks.
        is_async = vllm_config.scheduler_config.async_scheduling
        table = DraftTable(
            req_states.max_num_reqs,
            req_states.max_model_len,
            first_chunk=most if is_async else first_chunk(vllm_config.additional_config),
            max_chunk=most,
            device=device,
        )
        table.proposals = _proposals(vllm_config, table, req_states.max_num_reqs)
        # Where the samplers find it, which are given the request states, too.
        setattr(req_states, TABLE, table)
        return ReuseSpeculator(table, req_states)

    return init_speculator


def _proposals(config: Any, table: DraftTable, num_slots: int) -> Proposals | None:
    options = configured_options(config.additional_config)
    lagged_tokens = 0 if options is None or not options.is_on else options.lagged_tokens
    if config.scheduler_config.async_scheduling and not lagged_tokens:
        return None
    is_float64 = getattr(config.model_config, "use_fp64_gumbel", False)
    args: dict[str, Any] = {
        "max_chunk": table.max_chunk,
        "token_budget": config.scheduler_config.max_num_batched_tokens,
        "noise": NoiseLaw.VLLM64 if is_float64 else NoiseLaw.VLLM,
        "device": table.device,
        "metrics": lambda: table.metrics,
    }
    if lagged_tokens:
        proposals: Proposals = LaggedProposals(num_slots, num_planned=lagged_tokens, **args)
    else:
        proposals = Proposals(num_slots, **args)
    if options is not None and options.is_on:
        side = EngineSide(
            options,
            logprobs_mode=config.model_config.logprobs_mode,
            on_v2=True,
            has_peers=has_peers(config.parallel_config),
            **noise_source(config),
        )
        proposals.serve_by_itself(side, table.first_chunk, log)
    return proposals


def _samplers(original: Callable) -> Callable:
    def custom_sampler(self: Any, sampler: Any) -> Any:
        table = getattr(sampler.req_states, TABLE, None)
        if table is None:
            return original(self, sampler)
        return samplers(sampler, table, self.vllm_config, self.device)

    return custom_sampler


def _counting(original: Callable) -> Callable:
    def __init__(self: Any, vllm_config: Any, device: Any) -> None:
        original(self, vllm_config, device)
        table = table_of(self)
        if table is not None and not vllm_config.scheduler_config.async_scheduling:
            self.draft_tokens_handler = CountingHandler(device, table)

    return __init__


def _live(runner: Any) -> Any:
    table = table_of(runner)
    return None if table is None or table.proposals is None else table.proposals.live


def _side(runner: Any) -> EngineSide | None:
    live = _live(runner)
    return None if live is None else live.side


def _watched(original: Callable) -> Callable:
    def load_model(self: Any, *args: Any, **kw: Any) -> None:
        original(self, *args, **kw)
        if (live := _live(self)) is not None:
            watch_weights(self.get_model(), live.side)

    return load_model


def _arriving(original: Callable) -> Callable:
    def add_requests(self: Any, scheduler_output: Any) -> None:
        table = table_of(self)
        proposals = None if table is None else table.proposals
        if table is not None:
            # vLLM has the next piece of a streamed prompt take a new slot, by the same id. It has
            # other parameters, and the response begins anew: it is none that was preempted.
            known = self.req_states.req_id_to_index
            again = [n.req_id for n in scheduler_output.scheduled_new_reqs if n.req_id in known]
            for request_id in again:
                self._remove_request(request_id)
            if again:
                table.over(again)
        if table is not None and table.is_warming_up:
            proposals = None
        if proposals is not None and proposals.live is not None:
            for new in scheduler_output.scheduled_new_reqs:
                params = new.sampling_params
                name = None if params is None else admit(new.req_id, params, on_v2=True)
                if params is not None and not isinstance(name, ReuseRequest):
                    proposals.arrive(new.req_id, arrival(new, params, name))
        original(self, scheduler_output)

    return add_requests


def _leaving(original: Callable) -> Callable:
    def _remove_request(self: Any, req_id: str) -> bool:
        table = table_of(self)
        slot = self.req_states.req_id_to_index.get(req_id)
        if table is not None and slot is not None:
            table.leave(slot)
        return original(self, req_id)

    return _remove_request


def _over(original: Callable) -> Callable:
    def finish_requests(self: Any, scheduler_output: Any) -> None:
        original(self, scheduler_output)
        table = table_of(self)
        if table is not None:
            table.over(scheduler_output.finished_req_ids)

    return finish_requests
