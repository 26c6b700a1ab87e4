"""Wrong values for every argument of every op: the call works, or one ValueError names the
argument, and nothing is written."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from spec_rollout import ops
from spec_rollout.acceptance import Lenient

_IDS, _CU, _TABLE = (
    torch.zeros(1, dtype=torch.int64),
    torch.tensor([0, 1]),
    torch.zeros(1, 1).long(),
)
_LOGITS, _FLOATS = torch.zeros(2, 8), torch.zeros(1)
_RANGES = dict.fromkeys(("src_rows", "src_starts", "dst_rows", "dst_starts", "lens"), _IDS)
_CACHES = {"src": [torch.ones(1, 1, 4, 8)], "dst": [torch.zeros(1, 1, 4, 8)]}
_NUMBERS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
_PER_ROW = {"temperature": torch.ones(1), "top_k": _IDS, "top_p": torch.ones(1)}
_PARTS = {
    "prompt_ids": _IDS, "cu_prompt_lens": _CU, "prefix_ids": _IDS, "cu_prefix_lens": _CU,
    "accepted_lens": _IDS, "continuation_ids": _IDS, "cu_continuation_lens": _CU,
    "prefix_logprobs": _FLOATS, "continuation_logprobs": _FLOATS, "pad_token_id": 0,
}  # fmt: skip
_LIMITS = {"max_prompt_len": 2, "max_response_len": 2}
CALLS: dict[str, dict[str, Any]] = {
    "token_logprobs": {"logits": _LOGITS[:1], "token_ids": _IDS, "temperature": 1.0, "impl": "native"},
    "token_logprobs, per row": {"logits": _LOGITS[:1], "token_ids": _IDS, "temperature": torch.ones(1)},
    "sample_tokens": {"logits": _LOGITS[:1], "keys": _IDS, "positions": _IDS, **_NUMBERS},
    "sample_tokens, per row": {"logits": _LOGITS[:1], "keys": _IDS, "positions": _IDS, **_PER_ROW},
    "accept_prefix": {
        "draft_logprobs": _FLOATS, "target_logprobs": _FLOATS, "rule": Lenient(0.0), "keys": _IDS,
        "cu_draft_lens": _CU, "positions": _IDS,
    },
    "accept_prefix, padded": {
        "draft_logprobs": _FLOATS[None], "target_logprobs": _FLOATS[None], "rule": Lenient(0.0),
        "keys": _IDS, "draft_lens": _IDS,
    },
    "verify_prefix": {
        "logits": _LOGITS, "draft_ids": _IDS, "cu_draft_lens": _CU, "rule": Lenient(0.0),
        "keys": _IDS, "positions": _IDS, "draft_logprobs": _FLOATS,
        "cu_logits_lens": torch.tensor([0, 2]), **_NUMBERS, "impl": "native",
    },
    "splice_kv": {**_CACHES, **_RANGES},
    "splice_kv, paged": {**_CACHES, **_RANGES, "src_block_table": _TABLE, "dst_block_table": _TABLE},
    "assemble": _PARTS,
    "assemble, packed": {**_PARTS, "layout": "packed", **_LIMITS},
    "assemble, right": {**_PARTS, "layout": "right", **_LIMITS},
    "assemble, left": {**_PARTS, "layout": "left", "max_prompt_len": 2},
    "assemble, split": {**_PARTS, "layout": "split", **_LIMITS, "out": None},
}  # fmt: skip
CASES = [(call, name) for call, arguments in CALLS.items() for name in arguments]


class _Raises:
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


class _Plain(torch.Tensor):
    pass


class _Refuses(torch.Tensor):
    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
        raise KeyError("not for you")


class _WithoutData(torch.Tensor):
    @staticmethod
    def __new__(cls, like: torch.Tensor) -> _WithoutData:
        return torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype)  # type: ignore[attr-defined]

    @classmethod
    def __torch_dispatch__(cls, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("no data")


def _no_tensors() -> dict[str, Any]:
    return {
        "None": None, "a list": [0], "a tuple": (0,), "an empty list": [], "a word": "word",
        "a word in Greek": "λ", "bytes": b"x", "one": 1, "minus one": -1, "true": True,
        "a fraction": 2.5, "NaN": math.nan, "infinity": math.inf, "-infinity": -math.inf,
        "beyond int64": 2**63, "below int64": -(2**63) - 1, "beyond float64": 10**400,
        "an object": object(), "a number without end": 1j, "one that raises": _Raises(),
        "integers of numpy": np.zeros(1, np.int64), "floats of numpy": np.zeros((2, 8), np.float32),
        "objects of numpy": np.array([None]), "words of numpy": np.array(["a"]),
        "a float of numpy": np.float32(0.5), "an integer of numpy": np.int64(1),
        "NaN of numpy": np.float64("nan"), "truth of numpy": np.True_, "a dict": {}, "a function": len,
        "a dtype": torch.float32, "a class": torch.Tensor, "a rule's class": Lenient,
        "an iterator": iter([torch.zeros(1, 1, 4, 8)]),
    }  # fmt: skip


def _tensors_of_another_kind(good: torch.Tensor) -> dict[str, Any]:
    """What no op can read, whatever the argument."""
    return {
        "sparse": good.to_sparse(),
        "sparse rows": good.reshape(1, -1).to_sparse_csr(),
        "nested": torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)]),
        "jagged": torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)], layout=torch.jagged),
        "of another library's layout": torch.zeros(1).to_mkldnn(),
        "without memory": good.to("meta"),
        "a subclass that raises": good.as_subclass(_Refuses),
        "a subclass without data": _WithoutData(good),
    }


def _tensors(good: torch.Tensor) -> dict[str, Any]:
    """Right for some arguments and wrong for others."""
    floats = good.float()
    return {
        "a subclass": good.as_subclass(_Plain),
        "a parameter": torch.nn.Parameter(floats),
        "quantised": torch.quantize_per_tensor(floats, 1.0, 0, torch.qint8),
        "of eight bits": floats.to(torch.float8_e4m3fn),
        "bool": good.bool(), "uint8": good.to(torch.uint8), "float64": good.double(),
        "int16": good.short(), "complex": good.to(torch.complex64),
        "conjugate": good.to(torch.complex64).conj(),
        "negative": torch.complex(good.double(), good.double()).conj().imag,
        "strided": torch.stack([good, good], -1)[..., 0],
        "expanded": good[:1].expand(7, *good.shape[1:]),
        "one dimension more": good[None], "forty dimensions": torch.zeros([1] * 40),
        "no dimension": torch.tensor(1.0), "an integer": torch.tensor(1), "empty": torch.empty(0),
        "twice as long": torch.cat([good, good]), "shorter": good[:0],
        "NaN": torch.full_like(floats, math.nan), "negative values": torch.full_like(good, -5),
        "huge values": floats * 1e38 if good.is_floating_point() else torch.full_like(good, 2**62),
    }  # fmt: skip


def _bag(good: Any) -> Iterator[tuple[str, Any, bool]]:
    """(what it is, value, whether it is wrong for every tensor argument)."""
    tensor = good[0] if isinstance(good, list) else good
    if not isinstance(tensor, torch.Tensor):
        tensor = _FLOATS
    for what, value in _no_tensors().items():
        yield what, value, False
        yield f"a list of {what}", [value], False
    for what, value in _tensors_of_another_kind(tensor).items():
        yield what, value, True
        yield f"a list of {what}", [value], True
    for what, value in _tensors(tensor).items():
        yield what, value, False
        yield f"a list of {what}", [value], False


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("call", "name"), CASES)
def test_a_wrong_value_is_named(call: str, name: str) -> None:
    op: Callable[..., Any] = getattr(ops, call.partition(",")[0])
    good = CALLS[call]
    op(**good)
    untouched = {"dst": [torch.zeros(1, 1, 4, 8)]} if "dst" in good else {}
    refused = 0
    for what, value, unreadable in _bag(good[name]):
        arguments = {**good, **untouched, name: value}
        try:
            op(**arguments)
        except ValueError as error:
            message = str(error)
        else:
            assert not unreadable, what
            continue  # what fits is written
        names, separator, expected = message.partition(":")
        assert separator, (what, message)
        assert "expected" in expected, (what, message)
        assert "\n" not in message, (what, message)
        # Two arguments that do not go together may be told by the other's name.
        assert set(names.split(", ")) <= set(good) | {"cu_draft_lens", "draft_lens", "layout"}, (
            what,
            message,
        )
        told_by_another = isinstance(value, torch.Tensor | list) or value is None or value == {}
        assert name in names or (told_by_another and not unreadable), (what, message)
        refused += 1
        if untouched:
            assert not untouched["dst"][0].any(), what
    assert refused > 20


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"top_k": math.inf}, "top_k: expected an integer, got inf"),
        ({"top_k": 2.5}, "top_k: expected an integer, got 2.5"),
        ({"top_k": True}, "top_k: expected an integer, got True"),
        ({"top_k": "ten"}, "top_k: expected an integer, got 'ten'"),
        ({"top_k": 2**63}, f"top_k: expected an integer of 64 bits, got {2**63}"),
        ({"top_k": -1}, "top_k: expected 0 (off) or more, got -1"),
        ({"top_p": "half"}, "top_p: expected a number, got 'half'"),
        ({"top_p": math.nan}, "top_p: expected 0 < value <= 1, got nan"),
        ({"temperature": "hot"}, "temperature: expected a number, got 'hot'"),
        ({"temperature": True}, "temperature: expected a number, got True"),
        ({"temperature": 10**400}, "temperature: expected a number within float64, got an int of 1329 bits"),
        ({"logits": None}, "logits: expected a torch.Tensor, got None"),
        ({"logits": np.zeros((1, 8))}, "logits: expected a torch.Tensor, got ndarray"),
        ({"logits": _LOGITS[:1].to_sparse()}, "logits: expected a dense tensor (torch.strided), got layout torch.sparse_coo"),
        ({"keys": _IDS.to("meta")}, "keys: expected a CPU or CUDA tensor, got device meta"),
        ({"positions": [0]}, "positions: expected a torch.Tensor, got list"),
    ],
)  # fmt: skip
def test_what_was_expected_and_what_came_is_said(argument: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        ops.sample_tokens(**{**CALLS["sample_tokens"], **argument})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("call", "argument", "message"),
    [
        ("verify_prefix", {"rule": Lenient}, "rule: expected an acceptance rule such as Lenient(0.0), got the class Lenient"),
        ("accept_prefix", {"rule": None}, "rule: expected an acceptance rule such as Lenient(0.0), got None"),
        ("assemble", {"pad_token_id": 0.5}, "pad_token_id: expected an integer, got 0.5"),
        ("assemble", {"prompt_ids": torch.zeros(3)}, "prompt_ids: expected int32 or int64, got float32"),
        ("assemble, split", {"max_prompt_len": 2**60}, f"max_prompt_len: expected a length below 2**48, got {2**60}"),
        ("assemble, split", {"out": (1, 2)}, "out: expected a result of an earlier call (Assembled), got tuple"),
        ("splice_kv", {"dst": [None]}, "dst: expected a sequence of tensors, got at index 0 not a torch.Tensor, got None"),
    ],
)  # fmt: skip
def test_of_other_ops_too(call: str, argument: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        getattr(ops, call.partition(",")[0])(**{**CALLS[call], **argument})
    assert str(caught.value) == message


def test_caches_may_come_from_iterators() -> None:
    src, dst = [torch.ones(1, 1, 4, 8)], [torch.zeros(1, 1, 4, 8)]
    one = torch.ones(1, dtype=torch.int64)
    ops.splice_kv(iter(src), iter(dst), **{**_RANGES, "lens": one})  # type: ignore[arg-type]
    assert dst[0][0, 0].sum(-1).tolist() == [8.0, 0.0, 0.0, 0.0]


def test_what_no_argument_is_to_blame_for_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise MemoryError("nothing left")

    module = sys.modules["spec_rollout.ops.sample_tokens"]
    monkeypatch.setattr(module, "_sample_tokens", fails)
    with pytest.raises(MemoryError, match="nothing left"):
        ops.sample_tokens(**CALLS["sample_tokens"])


def test_a_device_that_is_none() -> None:
    with pytest.raises(ValueError, match="device: expected a CPU or CUDA device, got 'disk'"):
        ops.check_status("disk")
