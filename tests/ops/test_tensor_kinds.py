"""Tensors whose values are not simply those in their memory: refused by name, or given to the
dispatcher, which knows what they stand for."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from test_arguments import CALLS, CASES

from spec_rollout import ops
from spec_rollout.acceptance import Coupled

_TENSORS = [
    (call, name)
    for call, name in CASES
    if isinstance(CALLS[call][name], torch.Tensor | list) and "out" not in name
]


def _negative(tensor: torch.Tensor) -> torch.Tensor:
    return torch._neg_view(tensor)


@pytest.mark.parametrize(("call", "name"), _TENSORS)
def test_a_negative_view_is_refused_by_name(call: str, name: str) -> None:
    good = CALLS[call][name]
    bad = [_negative(good[0])] if isinstance(good, list) else _negative(good)
    with pytest.raises(ValueError, match=rf"^{name}.*: expected .* through neg; resolve_neg\(\)"):
        getattr(ops, call.partition(",")[0])(**{**CALLS[call], name: bad})


def test_an_imaginary_part_of_a_conjugate_is_negative_too() -> None:
    logprobs = torch.complex(torch.zeros(1), torch.full((1,), -0.5)).conj().imag
    assert logprobs.is_neg()
    with pytest.raises(ValueError, match=r"draft_logprobs: expected .*resolve_neg"):
        ops.accept_prefix(**{**CALLS["accept_prefix"], "draft_logprobs": logprobs})


@pytest.mark.parametrize(
    "tensor", [torch.zeros(1, 8), torch.randn(3, 8)[1:2], torch.zeros(2, 8).data[:1]]
)
def test_views_of_views_and_detached_ones_are_negative_too(tensor: torch.Tensor) -> None:
    for negative in (
        _negative(tensor),
        _negative(tensor)[:],
        _negative(tensor).detach(),
        _negative(tensor).data,
    ):
        with pytest.raises(ValueError, match=r"logits: expected .*resolve_neg"):
            ops.token_logprobs(negative, torch.zeros(1, dtype=torch.int64))
    with torch.inference_mode(), pytest.raises(ValueError, match=r"logits: expected .*resolve_neg"):
        ops.token_logprobs(_negative(tensor.clone()), torch.zeros(1, dtype=torch.int64))


def test_what_was_negative_and_is_resolved_gives_its_values() -> None:
    logits, ids = torch.randn(5, 11), torch.tensor([0, 3, 10, 4, 4])
    got = ops.token_logprobs(_negative(logits).resolve_neg(), ids)
    expected = torch.log_softmax(-logits, -1)[torch.arange(5), ids]
    torch.testing.assert_close(got, expected)
    # A negative view of a negative view is none.
    again = _negative(_negative(logits))
    assert torch.equal(ops.token_logprobs(again, ids), ops.token_logprobs(logits, ids))


def test_conjugate_caches_are_refused() -> None:
    one = torch.ones(1, dtype=torch.int64)
    ranges = {
        "src_rows": one * 0,
        "src_starts": one * 0,
        "dst_rows": one * 0,
        "dst_starts": one * 0,
        "lens": one,
    }
    src, dst = torch.full((1, 1, 4, 8), 1 + 2j), torch.zeros(1, 1, 4, 8, dtype=torch.complex64)
    for name, caches in (
        ("src", {"src": [src.conj()], "dst": [dst]}),
        ("dst", {"src": [src], "dst": [dst.conj()]}),
    ):
        with pytest.raises(ValueError, match=rf"^{name}.*: expected .*resolve_conj"):
            ops.splice_kv(**caches, **ranges)
        assert not dst.any()
    ops.splice_kv([src.conj().resolve_conj()], [dst], **ranges)
    assert dst[0, 0, :, 0].tolist() == [1 - 2j, 0, 0, 0]


# 64 rows of 1,000: with an offset, beyond any page that the address of a wrapper could be in.
_LOGITS = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
_ROW_IDS = torch.arange(32)


def _scores(logits: torch.Tensor) -> torch.Tensor:
    return ops.token_logprobs(logits[32:], _ROW_IDS)


def _draws(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(ops.sample_tokens(logits[32:] * 2, keys=_ROW_IDS, positions=_ROW_IDS))


def _verified(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    draft_ids, cu = torch.arange(30), torch.tensor([0, 10, 30])
    return tuple(
        ops.verify_prefix(logits[32:], draft_ids, cu, rule=Coupled(), keys=torch.arange(2))
    )


def _accepted(logits: torch.Tensor) -> torch.Tensor:
    return ops.accept_prefix(
        logits[1, :8], logits[2, :8], rule=CALLS["accept_prefix"]["rule"],
        keys=torch.arange(2), cu_draft_lens=torch.tensor([0, 3, 8]),
    )  # fmt: skip


@pytest.mark.parametrize("called", [_scores, _draws, _verified, _accepted])
@pytest.mark.parametrize("remove", ["mutations", "mutations_and_views"])
def test_functionalised_code_gives_what_plain_code_gives(called: Any, remove: Any) -> None:
    got = torch.func.functionalize(called, remove=remove)(_LOGITS)
    expected = called(_LOGITS)
    for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (got, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore")
def test_batched_code_gives_what_plain_code_gives() -> None:
    batched = torch.func.vmap(_scores)(torch.stack([_LOGITS, -_LOGITS]))
    assert torch.equal(batched, torch.stack([_scores(_LOGITS), _scores(-_LOGITS)]))


@pytest.mark.parametrize("called", [_scores, torch.func.functionalize(_scores)])
def test_a_derivative_is_refused(called: Any) -> None:
    message = r"torch.func: expected no derivative \(grad, jvp\) around token_logprobs"
    with pytest.raises(ValueError, match=message):
        torch.func.grad(lambda logits: called(logits).sum())(_LOGITS)
    with pytest.raises(ValueError, match=message):
        torch.func.jvp(called, (_LOGITS,), (_LOGITS,))


_WRAPPERS = """
import torch
from spec_rollout import ops
wrapper = torch._to_functional_tensor(torch.randn(4, 8))
for logits in (wrapper, wrapper[1:]):
    try:
        ops.token_logprobs(logits, torch.zeros(len(logits), dtype=torch.int64))
    except ValueError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_wrapper_without_memory_is_refused() -> None:
    # What reads its address ends its process.
    ended = subprocess.run([sys.executable, "-c", _WRAPPERS], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    message = "logits: expected a tensor with memory of its own, got one without\n"
    assert ended.stdout == message * 2
