"""Gradients, which no op gives: a call that asks for one is refused by the argument's name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_arguments import CALLS

from spec_rollout import ops

# Every argument of which a result is a differentiable function.
DIFFERENTIABLE = [
    ("token_logprobs", "logits"),
    ("token_logprobs, per row", "temperature"),
    ("sample_tokens", "logits"),
    ("sample_tokens, per row", "temperature"),
    ("verify_prefix", "logits"),
    ("verify_prefix", "temperature"),
    ("splice_kv", "src"),
    ("splice_kv", "dst"),
    ("assemble", "prefix_logprobs"),
    ("assemble", "continuation_logprobs"),
    ("assemble, split", "prefix_logprobs"),
    ("assemble, split", "continuation_logprobs"),
]


def _requiring(value: Any) -> Any:
    if isinstance(value, list):
        return [tensor.clone().requires_grad_() for tensor in value]
    value = value if isinstance(value, torch.Tensor) else torch.ones(1)
    return value.clone().requires_grad_()


def _call(call: str, **changed: Any) -> Any:
    return getattr(ops, call.partition(",")[0])(**{**CALLS[call], **changed})


@pytest.mark.parametrize(("call", "name"), DIFFERENTIABLE)
def test_a_gradient_is_refused(call: str, name: str) -> None:
    value = _requiring(CALLS[call][name])
    op = call.partition(",")[0]
    message = (
        rf"^{name}: expected .* requires no gradient, .* {op} has no derivative; detach\(\) it"
    )
    with pytest.raises(ValueError, match=message):
        _call(call, **{name: value})
    # What autograd made of such a tensor requires one as well.
    made = [tensor * 1 for tensor in value] if isinstance(value, list) else value * 1
    with pytest.raises(ValueError, match=message):
        _call(call, **{name: made})
    listed = isinstance(value, list)
    parameters = [torch.nn.Parameter(tensor.detach()) for tensor in (value if listed else [value])]
    parameter = parameters if listed else parameters[0]
    with pytest.raises(ValueError, match=message):
        _call(call, **{name: parameter})
    for quiet in (torch.no_grad(), torch.inference_mode()):
        with quiet:
            _call(call, **{name: value})
            _call(call, **{name: parameter})


def test_a_gradient_is_refused_by_every_implementation() -> None:
    for call in ("token_logprobs", "verify_prefix"):
        with pytest.raises(ValueError, match=r"logits: expected .* requires no gradient"):
            _call(call, logits=_requiring(CALLS[call]["logits"]), impl="triton")


def test_a_gradient_is_refused_where_the_result_is_given() -> None:
    given = _call("assemble, split")
    log_probs = _requiring(CALLS["assemble"]["prefix_logprobs"])
    with pytest.raises(ValueError, match=r"prefix_logprobs: expected .* no gradient"):
        _call("assemble, split", out=given, prefix_logprobs=log_probs)


def test_a_gradient_is_refused_in_compiled_code() -> None:
    ids = torch.tensor([1, 2])

    def scores(logits: torch.Tensor) -> torch.Tensor:
        return ops.token_logprobs(logits * 2, ids)

    compiled = torch.compile(scores, backend="aot_eager")
    with pytest.raises(ValueError, match=r"logits: expected .* no gradient"):
        compiled(torch.randn(2, 5, requires_grad=True))


def test_only_decisions_are_made_of_other_log_probs() -> None:
    """Lengths and tokens have no gradient that could be missing."""
    for call, names in (
        ("accept_prefix", ("draft_logprobs", "target_logprobs")),
        ("verify_prefix", ("draft_logprobs",)),
    ):
        for name in names:
            _call(call, **{name: _requiring(CALLS[call][name])})
