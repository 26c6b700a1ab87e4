"""Which requests may carry a draft; a bad one fails alone, before the engine sees it."""

from __future__ import annotations

from typing import Any

from spec_rollout.checks import of_kind
from spec_rollout.engines.vllm.wire import EXTRA_ARG, ReuseRequest, SampleName, parse

# Attribute of vLLM's SamplingParams -> the value that means "off". What is on changes the
# distribution in a way that depends on the tokens drawn so far (or on a sampler of its own), which
# a draft under test cannot follow.
_MUST_BE_OFF = {
    "n": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "structured_outputs": None,
    "guided_decoding": None,
    "bad_words": None,
    "logits_processors": None,
    "thinking_token_budget": None,
    "logprob_token_ids": None,
}
# Model Runner V2 counts the draft tokens under test in what depends on the tokens drawn so far.
_MAY_BE_ON_V2 = {
    "n",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "bad_words",
}


# Attribute of vLLM's SamplingParams: what was parsed, and what of it. Every request comes by three
# times: at the front end, at the engine right after it, and some time later in the worker. That may
# all be in one process. Between the first two it is copied, without this attribute.
_PARSED = "_spec_rollout_parsed"
_last_parsed: tuple[Any, Any] = (None, None)


def _parsed(params: Any, data: Any) -> ReuseRequest | SampleName:
    global _last_parsed
    known = getattr(params, _PARSED, _last_parsed)
    if known[0] is not data:
        known = data, parse(data)
    if isinstance(data, (bytes, str)):  # what cannot change
        setattr(params, _PARSED, known)
        _last_parsed = known
    return known[1]


def _not_raw(params: Any) -> str | None:
    """Why the log-probs of a request's sampling distribution are not those of the logits; None if
    they are."""
    if params.temperature not in (0.0, 1.0):
        return f"temperature {params.temperature}"
    off: dict[str, Any] = {
        "logit_bias": None,
        "allowed_token_ids": None,
        "min_tokens": 0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "bad_words": None,
    }
    if params.temperature > 0.0:  # greedy decoding has no filters
        off |= {"top_p": 1.0, "min_p": 0.0}
        if params.top_k > 0:
            return f"top_k {params.top_k}"
    for name, value in off.items():
        given = getattr(params, name, value)
        if given != value and given:
            return f"{name} {given}"
    return None


def reuse_data(params: Any) -> Any:
    """What a request has in `extra_args["spec_rollout"]`; None if it has nothing there.

    Args:
        params: vLLM's SamplingParams.

    Raises:
        ValueError: if its `extra_args` are no dict.
    """
    extra_args = getattr(params, "extra_args", None)
    if extra_args is None:
        return None
    return of_kind("extra_args", extra_args, dict, "a dict or None").get(EXTRA_ARG)


def response_limits(params: Any, room: int) -> tuple[int, frozenset[int]]:
    """Most tokens of a response, and the tokens that end it.

    Args:
        params: vLLM's SamplingParams.
        room: Tokens that the model's length leaves for the response.
    """
    stops = set(params.stop_token_ids or ())
    if not params.ignore_eos and getattr(params, "eos_token_id", None) is not None:
        stops.add(params.eos_token_id)
    return room if params.max_tokens is None else min(params.max_tokens, room), frozenset(stops)


def why_not_ours(
    params: Any, logprobs_mode: str | None = None, *, on_v2: bool = False
) -> str | None:
    """The parameter because of which our sampler cannot draw a request's tokens, and its value.

    Args:
        params: vLLM's SamplingParams.
        logprobs_mode: The engine's, where known.
        on_v2: The engine runs vLLM's Model Runner V2, whose own sampler draws.

    Returns:
        "name: expected ..., got ...", or None if it can.
    """
    for name, off in _MUST_BE_OFF.items():
        if on_v2 and name in _MAY_BE_ON_V2:
            continue
        value = getattr(params, name, off)
        # An empty list is none; but a thinking budget of 0 is one.
        is_none = off is None and not value and value != 0
        if value != off and not is_none:
            return f"{name}: expected {off} together with {EXTRA_ARG}, got {value}"
    if on_v2 and params.n != 1 and params.seed is None and params.temperature > 0.0:
        return f"seed: expected a number together with {EXTRA_ARG} and n {params.n}, got None"
    if params.logprobs is not None and logprobs_mode in ("raw_logits", "processed_logits"):
        return (
            "logprobs: expected an engine with logprobs_mode raw_logprobs or processed_logprobs "
            f"together with {EXTRA_ARG}, got {logprobs_mode}"
        )
    return None


def admit(
    request_id: str,
    params: Any,
    *,
    vocab_size: int | None = None,
    logprobs_mode: str | None = None,
    on_v2: bool = False,
) -> ReuseRequest | SampleName | None:
    """The reuse parameters of a request, checked; None if it has none.

    Args:
        request_id: Named in errors.
        params: vLLM's SamplingParams.
        vocab_size: Upper bound of the draft's ids, where known.
        logprobs_mode: The engine's, where known.
        on_v2: As in `why_not_ours`.

    Raises:
        ValueError: naming the request, the parameter, what was expected and what came.
    """
    try:
        data = reuse_data(params)
        if data is None:
            return None
        request = _parsed(params, data)
        if isinstance(request, SampleName):
            # What our sampler cannot draw goes to vLLM's; but several responses are no one sample.
            if getattr(params, "n", 1) != 1:
                raise ValueError(
                    f"n: expected 1 for a request that names its sample, got {params.n}"
                )
            return request
        if reason := why_not_ours(params, logprobs_mode, on_v2=on_v2):
            raise ValueError(reason)
        ids = request.draft_ids
        if vocab_size is not None and ids.size and int(ids.max()) >= vocab_size:
            raise ValueError(
                f"draft_ids: expected token ids below {vocab_size}, got {int(ids.max())}"
            )
        if (
            params.logprobs is not None
            and logprobs_mode == "raw_logprobs"
            and request.rule.needs_draft_logprobs
            and (reason := _not_raw(params))
        ):
            raise ValueError(
                f"logprobs: expected an engine with logprobs_mode processed_logprobs for {reason}, "
                f"as {request.rule} reads those of the sampling distribution, got raw_logprobs"
            )
    except ValueError as error:
        raise ValueError(f"request {request_id}: {error}") from error
    return request
