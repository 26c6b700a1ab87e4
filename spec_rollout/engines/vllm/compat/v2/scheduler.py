"""Asynchronous scheduling on V2: draft tokens for those requests that have a draft to follow.

And, where proposals are made a step late, a fixed number for the others. vLLM's own scheduler plans
as many as there can be for every request in every step.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from spec_rollout.engines.vllm.admission import admit, response_limits, why_not_ours
from spec_rollout.engines.vllm.compat.switch_on import configured_options
from spec_rollout.engines.vllm.options import first_chunk
from spec_rollout.engines.vllm.wire import ReuseRequest
from spec_rollout.engines.vllm.worker.v2.plan import Plan

_PLAN = "_spec_rollout_plan"
_UNSEEN = object()


class ReuseScheduler(AsyncScheduler):
    """vLLM's asynchronous scheduler with a `Plan` for each request that has a draft."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._first_chunk = first_chunk(self.vllm_config.additional_config)
        options = configured_options(self.vllm_config.additional_config)
        self._lagged_tokens = 0 if options is None or not options.is_on else options.lagged_tokens

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        super()._update_after_schedule(scheduler_output)
        for request_id in scheduler_output.num_scheduled_tokens:
            request = self.requests[request_id]
            if not request.spec_token_ids:
                continue
            plan: Any = getattr(request, _PLAN, _UNSEEN)
            if plan is _UNSEEN:
                plan = self._plan(request)
                # On vLLM's own record, which lives exactly as long as the request.
                setattr(request, _PLAN, plan)
            count = 0
            if isinstance(plan, Plan):
                count = plan.next(
                    request.output_token_ids,
                    request.num_output_placeholders,
                    len(request.spec_token_ids),
                )
            elif plan is not None:
                count = plan
            request.spec_token_ids = self._spec_token_placeholders[:count]

    def _update_request_as_session(self, session: Any, update: Any) -> None:
        super()._update_request_as_session(session, update)
        # The next piece of a streamed prompt has a draft of its own, or none.
        vars(session).pop(_PLAN, None)

    def _plan(self, request: Any) -> Plan | int | None:
        """What is planned for a request: as its draft goes, always the same number, or nothing."""
        params = request.sampling_params
        reuse = None if params is None else admit(request.request_id, params, on_v2=True)
        if not isinstance(reuse, ReuseRequest):
            is_served = params is not None and why_not_ours(params, on_v2=True) is None
            return self._lagged_tokens if is_served else None
        if not reuse.rule.uses_drafts:
            return None
        most, stops = response_limits(params, self.max_model_len - request.num_prompt_tokens)
        return Plan(
            reuse.draft_ids,
            max_response_len=most,
            stop_token_ids=stops,
            first_chunk=self._first_chunk,
        )
