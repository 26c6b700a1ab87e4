"""The request format: what goes in comes out, and nothing else does."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spec_rollout.acceptance import Coupled, Lenient, NoReuse, OneHot, RandomReuse
from spec_rollout.engines.vllm.wire import EXTRA_ARG, ReuseRequest, decode, encode, extra_args

RULES = [Lenient(0.5, 2.0, 0.01), Lenient(math.inf), Coupled(), Coupled(0.3), OneHot()]


@given(
    ids=st.lists(st.integers(0, 2**31 - 1), max_size=40),
    key=st.integers(-(2**63), 2**63 - 1),
    rule=st.sampled_from(RULES),
    first_position=st.integers(0, 2**31 - 1),
    collect_id=st.integers(-1, 2**31 - 1),
)
@settings(max_examples=200, deadline=None)
def test_round_trip(
    ids: list[int], key: int, rule: object, first_position: int, collect_id: int
) -> None:
    draft = np.array(ids, np.int32)
    logprobs = -np.arange(draft.size, dtype=np.float32)
    request = ReuseRequest(key, rule, draft, logprobs, first_position, collect_id)
    found = decode(encode(request))
    assert (found.key, found.rule) == (key, rule)
    assert (found.first_position, found.collect_id) == (first_position, collect_id)
    np.testing.assert_array_equal(found.draft_ids, draft)
    np.testing.assert_array_equal(found.draft_logprobs, logprobs)


def test_baselines_travel_as_their_token_test() -> None:
    assert decode(encode(ReuseRequest(1, RandomReuse(0.5)))).rule == Lenient(math.inf)
    assert decode(encode(ReuseRequest(1, NoReuse()))).rule == Lenient(-math.inf)


def test_size_is_bytes_per_token_not_objects() -> None:
    n = 10_000
    request = ReuseRequest(1, Lenient(), np.zeros(n, np.int32), np.zeros(n, np.float32))
    assert len(extra_args(request)[EXTRA_ARG]) < 8 * n + 100


@given(data=st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_bytes_decode_or_raise_value_error(data: bytes) -> None:
    for message in (data, b"sr\x01" + data):
        with pytest.raises(ValueError, match=EXTRA_ARG):
            decode(message)


@given(flip=st.integers(0, 8 * 100 - 1))
@settings(max_examples=300, deadline=None)
def test_flipped_bits_never_crash(flip: int) -> None:
    good = bytearray(
        encode(ReuseRequest(7, Lenient(0.1), np.arange(5, dtype=np.int32), np.zeros(5, np.float32)))
    )
    good[flip // 8 % len(good)] ^= 1 << (flip % 8)
    with contextlib.suppress(ValueError):  # a flip in the ids is another valid message
        decode(bytes(good))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"draft_ids": np.zeros(2, np.int64)}, "draft_ids: expected int32"),
        ({"draft_ids": np.array([-1], np.int32)}, "draft_ids: expected token ids >= 0, got -1"),
        ({"draft_ids": np.zeros(2, np.int32)}, "draft_logprobs: expected an array"),
        (
            {"draft_ids": np.zeros(2, np.int32), "draft_logprobs": np.zeros(3, np.float32)},
            "draft_logprobs: expected float32 of shape",
        ),
        (
            {"draft_ids": np.zeros(1, np.int32), "draft_logprobs": np.array([np.nan], np.float32)},
            "draft_logprobs: expected numbers, got NaN",
        ),
        ({"first_position": -1}, "first_position: expected 0"),
        ({"collect_id": -2}, "collect_id: expected -1"),
        ({"key": 2**63}, "key: expected an integer of 64 bits"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else None,
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReuseRequest(**{"key": 1, "rule": Lenient(), **arguments})


def test_what_was_parsed_is_known_where_the_request_comes_by_again(monkeypatch) -> None:
    from types import SimpleNamespace

    from spec_rollout.engines.vllm import admission

    calls = []
    parse = admission.parse
    monkeypatch.setattr(admission, "parse", lambda data: calls.append(data) or parse(data))
    off = {"n": 1, "temperature": 1.0, "logprobs": None}
    first, second = (encode(ReuseRequest(key, Coupled())) for key in (1, 2))
    params = SimpleNamespace(extra_args={"spec_rollout": first}, **off)
    assert [admission.admit("r", params, vocab_size=8).key for _ in range(3)] == [1, 1, 1]
    assert len(calls) == 1
    # vLLM copies the parameters, and not what was written on them.
    copied = SimpleNamespace(extra_args={"spec_rollout": first}, **off)
    assert admission.admit("r", copied).key == 1
    assert len(calls) == 1
    params.extra_args = {"spec_rollout": second}
    assert admission.admit("r", params).key == 2
    # What else the request asks for is looked at every time.
    params.presence_penalty = 0.5
    with pytest.raises(ValueError, match="presence_penalty"):
        admission.admit("r", params)
    name = {"sample": 3}
    named = SimpleNamespace(extra_args={"spec_rollout": name}, **off)
    assert admission.admit("r", named).sample == 3
    name["sample"] = 4  # a mapping may change
    assert admission.admit("r", named).sample == 4
