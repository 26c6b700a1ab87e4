"""Our sampler in the place of vLLM's rejection sampler, inside its model runner."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from spec_rollout.engines.vllm.admission import admit, response_limits
from spec_rollout.engines.vllm.wire import SALT_ARG, ReuseRequest, SampleName
from spec_rollout.engines.vllm.worker.chunks import ChunkProposer
from spec_rollout.engines.vllm.worker.engine_side import Arrival, EngineSide
from spec_rollout.engines.vllm.worker.logprobs import SampledLogprobs
from spec_rollout.engines.vllm.worker.masks import LogitMasks
from spec_rollout.engines.vllm.worker.request_state import Row
from spec_rollout.engines.vllm.worker.sampling.base import Step
from spec_rollout.engines.vllm.worker.transfer import to_device

_ROW = "_spec_rollout_row"
_UNSEEN = object()


def sample(original: Callable) -> Callable:
    """For `GPUModelRunner._sample`: requests with a key are ours, in every step."""

    def _sample(self: Any, logits: Any, spec_decode_metadata: Any, *args: Any, **kw: Any) -> Any:
        proposer = getattr(self, "drafter", None)
        if not isinstance(proposer, ChunkProposer):
            return original(self, logits, spec_decode_metadata, *args, **kw)
        # vLLM replaces drafts by zeros near the model's length, unless the drafter is known to stop
        # in time; ours does.
        self.effective_drafter_max_model_len = self.max_model_len + self.num_spec_tokens + 1
        budgets = getattr(self.input_batch, "thinking_budget_state_holder", None)
        if budgets is not None:
            # Of speculation it expects as many rows of logits as a request has draft tokens, and
            # would force the end of thinking on another request. vLLM's sampler gets one row here.
            budgets.in_spec_mode = False
        rows = _rows(self, proposer)
        num_tokens = int(self.query_start_loc.np[len(rows)])
        proposer.sampler.times.count(num_tokens, logits.shape[0], rows)
        if spec_decode_metadata is None and not any(rows):
            proposer.sampler.leave(rows)
            return original(self, logits, None, *args, **kw)
        return _sample_rows(self, proposer, rows, logits, spec_decode_metadata)

    return _sample


def plain_inputs(original: Callable) -> Callable:
    """For `GPUModelRunner._prepare_inputs`: without drafts, as without speculation."""

    def _prepare_inputs(self: Any, scheduler_output: Any, *args: Any, **kw: Any) -> Any:
        if scheduler_output.scheduled_spec_decode_tokens or not isinstance(
            getattr(self, "drafter", None), ChunkProposer
        ):
            return original(self, scheduler_output, *args, **kw)
        config, self.speculative_config = self.speculative_config, None
        try:
            return original(self, scheduler_output, *args, **kw)
        finally:
            self.speculative_config = config

    return _prepare_inputs


def let_go(original: Callable) -> Callable:
    """For `GPUModelRunner._update_states`: requests that are over leave at once, for others.

    An engine that has nothing more to do makes one more step for that, in which nothing is sampled.
    """

    def _update_states(self: Any, scheduler_output: Any, *args: Any, **kw: Any) -> Any:
        result = original(self, scheduler_output, *args, **kw)
        proposer = getattr(self, "drafter", None)
        if (
            scheduler_output.finished_req_ids
            and isinstance(proposer, ChunkProposer)
            and proposer.live is not None
            and proposer.live.history.is_shared
        ):
            sweep(self, proposer)
        return result

    return _update_states


def chunk_by_chunk(original: Callable) -> Callable:
    """For `GPUModelRunner._update_streaming_request`: the next chunk of a streamed prompt.

    vLLM changes its record of the request in place. Prompt and parameters are others, so our state
    of it is made anew, as that of a request that comes now.
    """

    def _update_streaming_request(self: Any, *args: Any, **kw: Any) -> Any:
        state = original(self, *args, **kw)
        proposer = getattr(self, "drafter", None)
        if isinstance(proposer, ChunkProposer):
            vars(state).pop(_ROW, None)
            proposer.last_batch = ([], [])  # which has the same record
        return state

    return _update_streaming_request


def drafts_if_any(original: Callable) -> Callable:
    """For `GPUModelRunner.take_draft_token_ids`: where there are none, there is nothing to take.

    The scheduler dropped those of the step before when it scheduled them, and would otherwise go
    through all requests to find nothing.
    """

    def take_draft_token_ids(self: Any) -> Any:
        if isinstance(getattr(self, "drafter", None), ChunkProposer):
            drafts = self._draft_token_ids
            if isinstance(drafts, list) and not any(drafts):
                return None
        return original(self)

    return take_draft_token_ids


def few_indices(original: Callable) -> Callable:
    """For `GPUModelRunner._calc_spec_decode_metadata`: only the one array that we need."""

    def _calc_spec_decode_metadata(
        self: Any, num_draft_tokens: np.ndarray, cu_num_scheduled_tokens: np.ndarray, *args: Any
    ) -> Any:
        if not isinstance(getattr(self, "drafter", None), ChunkProposer):
            return original(self, num_draft_tokens, cu_num_scheduled_tokens, *args)
        num_reqs = num_draft_tokens.size
        # Of each request the rows of its last token and of its draft.
        counts = num_draft_tokens + 1
        ends = np.cumsum(counts)
        rows = np.arange(ends[-1]) + np.repeat(cu_num_scheduled_tokens[:num_reqs] - ends, counts)
        logits_indices = to_device(rows.astype(np.int32), self.device)
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


def side_of(runner: Any) -> EngineSide | None:
    """What decides about the requests that an engine serves by itself; None if it serves none."""
    proposer = getattr(runner, "drafter", None)
    live = proposer.live if isinstance(proposer, ChunkProposer) else None
    return None if live is None else live.side


def _rows(runner: Any, proposer: ChunkProposer) -> list[Row | None]:
    """Our state of each request of the batch, made when it is first seen.

    None for requests without a key. The list is the same object as long as the batch is the same.
    """
    requests = runner.requests
    states = [requests[r] for r in runner.input_batch.req_ids]
    known_states, known_rows = proposer.last_batch
    if len(states) == len(known_states) and all(map(operator.is_, states, known_states)):
        return known_rows
    sweep(runner, proposer)
    rows: list[Any] = [getattr(state, _ROW, _UNSEEN) for state in states]
    if _UNSEEN in rows:
        for i, state in enumerate(states):
            if rows[i] is _UNSEEN:
                rows[i] = _new_row(runner, proposer, state)
                # On vLLM's own record, which lives exactly as long as the request.
                setattr(state, _ROW, rows[i])
                if rows[i] is not None:
                    # A draw of ours needs none, and vLLM fails on those of CPUs where the prompt of
                    # a request with a seed is computed in chunks.
                    state.generator = None
                    runner.input_batch.generators.pop(i, None)
    proposer.last_batch = (states, rows)
    return rows


def sweep(runner: Any, proposer: ChunkProposer) -> None:
    """Lets go of requests that the model runner has no more."""
    if proposer.live is not None:
        requests = runner.requests
        proposer.live.sweep(lambda request_id: getattr(requests.get(request_id), _ROW, None))


def _new_row(runner: Any, proposer: ChunkProposer, state: Any) -> Row | None:
    params = state.sampling_params
    request = admit(state.req_id, params) if params is not None else None
    # In a rollout call proposals are from the call's history, which knows the call's requests only.
    if not isinstance(request, ReuseRequest) and (proposer.live is None or proposer.in_call):
        return None
    room = runner.max_model_len - state.num_prompt_tokens
    most, stops = response_limits(params, room)
    known = {
        "prompt_len": state.num_prompt_tokens,
        "max_response_len": most,
        "stop_token_ids": stops,
        "masks": LogitMasks.of(params),
    }
    if isinstance(request, ReuseRequest):
        return proposer.new_row(request, **known)
    assert proposer.live is not None
    return proposer.live.serve(state.req_id, arrival(state, params, request), **known)


def arrival(state: Any, params: Any, name: SampleName | None) -> Arrival:
    """What decides about a request that nobody announced.

    Args:
        state: vLLM's record of it, either model runner's.
        params: Its sampling parameters.
        name: What it calls itself, or None.
    """
    is_tokens = state.prompt_token_ids is not None and state.prompt_embeds is None
    decides = [str((params.extra_args or {}).get(SALT_ARG, ""))]
    if state.lora_request is not None:
        decides.append(f"lora {state.lora_request.lora_int_id}")
    decides += [f"{feature.modality} {feature.identifier}" for feature in state.mm_features]
    return Arrival(state.prompt_token_ids if is_tokens else None, params, "\0".join(decides), name)


def _sample_rows(
    runner: Any, proposer: ChunkProposer, rows: list[Row | None], logits: Any, metadata: Any
) -> Any:
    batch = runner.input_batch
    sampling = batch.sampling_metadata
    temperature = 0.0 if sampling.temperature is None else sampling.temperature
    top_k = 0 if sampling.top_k is None else sampling.top_k
    top_p = 1.0 if sampling.top_p is None else sampling.top_p
    logprobs = None
    # Of requests that want those of tokens they name, which vLLM's sampler draws for. vLLM counts
    # them apart.
    token_ids = getattr(sampling, "logprob_token_ids", None) or {}
    if sampling.max_num_logprobs is not None or token_ids:
        num_top = sampling.max_num_logprobs or 0
        num_top = logits.shape[-1] if num_top < 0 else num_top
        logprobs = SampledLogprobs(
            num_top,
            num_columns=max([num_top, *map(len, token_ids.values())]),
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
            sample_stock=lambda rows_: runner.sampler(
                logits=rows_,  # one of each request, as if none had a draft
                sampling_metadata=dataclasses.replace(sampling, spec_token_ids=[]),
            ),
            logprobs=logprobs,
        )
    )
    return SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=logprobs_tensors)
