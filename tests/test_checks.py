"""Wrong values for every argument of what the package makes and is called with: it works, or one
ValueError names the argument, what was expected and what came."""

from __future__ import annotations

import decimal
import fractions
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from markov_engine import MarkovEngine
from torch._subclasses import FakeTensorMode

import spec_rollout as sr
from spec_rollout.checks import integer, items, real, shown


def _int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


_DRAFTS = {
    "token_ids": _int32(1, 2), "cu_lens": torch.tensor([0, 2]), "logprobs": torch.zeros(2),
    "finished": torch.tensor([True]),
}  # fmt: skip
_HISTORY = {
    "token_ids": _int32(1, 2), "cu_lens": torch.tensor([0, 2]), "row_groups": torch.tensor([0]),
    "request_groups": torch.tensor([0]), "logprobs": torch.zeros(2),
}  # fmt: skip
_REQUESTS = {
    "prompt_ids": _int32(1), "cu_prompt_lens": torch.tensor([0, 1]), "keys": torch.tensor([1]),
    "drafts": sr.Drafts(**_DRAFTS), "history": sr.History(**_HISTORY),
}  # fmt: skip
_ROLLOUTS = {
    "prompt_ids": _int32(1), "cu_prompt_lens": torch.tensor([0, 1]), "response_ids": _int32(1, 2),
    "cu_response_lens": torch.tensor([0, 2]), "logprobs": torch.zeros(2),
    "accepted_lens": _int32(1), "finish_reasons": torch.zeros(1, dtype=torch.uint8),
    "policy_version": 0, "stats": sr.RolloutStats(),
    "running": torch.zeros(1, 2, dtype=torch.float64),
}  # fmt: skip
_KEYED = {"prompt_keys": [bytes(16)], "sample_ids": [0]}
_CALL = {"sampling": sr.SamplingParams(max_tokens=2), "step": 0, "user_keys": ["a"]}


def _session(**given: Any) -> sr.RolloutSession:
    return sr.RolloutSession(
        **{"engine": MarkovEngine(torch.zeros(4, 4)), "rule": sr.NoReuse(), **given}
    )


_CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "Lenient": (sr.Lenient, {"log_lenience": 0.0, "scale": 1.0, "min_target_prob": 0.0}),
    "Coupled": (sr.Coupled, {"log_lenience": 0.0}),
    "RandomReuse": (sr.RandomReuse, {"prob": 0.5}),
    "Schedule": (sr.Schedule, {"rule": sr.Lenient(), "start_log_lenience": 0.0, "num_steps": 2}),
    "Schedule.at": (sr.Schedule(sr.Lenient(), 1.0, 5).at, {"step": 1}),
    "SamplingParams": (
        sr.SamplingParams,
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_tokens": 2, "stop_token_ids": (1,)},
    ),
    "Drafts": (sr.Drafts, _DRAFTS),
    "Drafts.none": (sr.Drafts.none, {"batch": 1}),
    "Drafts.cut_to": (sr.Drafts(**_DRAFTS).cut_to, {"lens": torch.tensor([1])}),
    "History": (sr.History, _HISTORY),
    "RolloutRequests": (sr.RolloutRequests, _REQUESTS),
    "Rollouts": (sr.Rollouts, _ROLLOUTS),
    "prompt_key": (sr.prompt_key, {"prompt_ids": [1], "user_key": "a"}),
    "noise_keys": (sr.noise_keys, {"seed": 0, "noise_epoch": 0, **_KEYED}),
    "RolloutCache": (sr.RolloutCache, {"max_bytes": 1}),
    "RolloutCache.lookup": (sr.RolloutCache().lookup, {**_KEYED, "max_tokens": 2}),
    "RolloutCache.store": (
        sr.RolloutCache().store,
        {**_KEYED, "rollouts": sr.Rollouts(**_ROLLOUTS), "trainer_logprobs": torch.zeros(2)},
    ),
    "RolloutSession": (
        _session,
        {"engine": MarkovEngine(torch.zeros(4, 4)), "rule": sr.NoReuse(), "cache": None, "seed": 0,
         "refresh_epochs": None, "noise_offset": 0},
    ),
    "RolloutSession.rollout": (
        _session().rollout,
        {**_CALL, "prompts": [[1]], "num_samples": 1, "epoch": 0},
    ),
    "RolloutSession.rollout_rows": (
        _session().rollout_rows,
        {**_CALL, "prompts": [[1]], "sample_ids": [0], "epoch": 0},
    ),
    "RolloutSession.evaluate": (_session().evaluate, {**_CALL, "prompts": [[1]], "num_samples": 1}),
    "ReuseRequest": (
        sr.ReuseRequest,
        {"key": 1, "rule": sr.Lenient(), "draft_ids": np.zeros(1, np.int32),
         "draft_logprobs": np.zeros(1, np.float32), "first_position": 0, "collect_id": -1},
    ),
    "extra_args": (sr.extra_args, {"request": sr.ReuseRequest(1, sr.Lenient())}),
}  # fmt: skip
_CASES = [(call, name) for call, (_, good) in _CALLS.items() for name in good]


def _bag() -> dict[str, Any]:
    return {
        "None": None, "a list": [0], "words": ["a"], "a tuple": (0,), "an empty list": [],
        "a word": "word", "a word in Greek": "λ", "a lone surrogate": "\udc80", "bytes": b"x",
        "one": 1, "minus one": -1, "true": True, "a fraction": 2.5, "NaN": math.nan,
        "infinity": math.inf, "-infinity": -math.inf, "beyond int64": 2**63,
        "beyond float64": 10**400, "below float64": -(10**400), "beyond float64 in a list": [10**400],
        "an object": object(), "a number without end": 1j, "a ratio": fractions.Fraction(1, 2),
        "a decimal": decimal.Decimal("0.5"), "a dict": {}, "a set": {1}, "an iterator": iter([1]),
        "rows of two lengths": [[1], [1, 2]], "fractions": [0.5], "a function": len,
        "integers of numpy": np.zeros(1, np.int64), "floats of numpy": np.zeros((2, 8), np.float32),
        "objects of numpy": np.array([None]), "a float of numpy": np.float32(0.5),
        "an integer of numpy": np.int64(1), "truth of numpy": np.True_, "a dtype": torch.float32,
        "a rule's class": sr.Lenient, "a rule": sr.Lenient(), "floats": torch.zeros(3),
        "an integer of torch": torch.tensor(1), "a matrix": torch.zeros(2, 2, dtype=torch.int32),
        "without values": torch.zeros(3, device="meta"), "sparse": torch.zeros(3).to_sparse(),
        "nested": torch.nested.nested_tensor([torch.zeros(1)]),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("call", "name"), _CASES)
def test_a_wrong_value_is_named(call: str, name: str) -> None:
    made, good = _CALLS[call]
    made(**good)
    refused = 0
    for what, value in _bag().items():
        try:
            made(**{**good, name: value})
        except ValueError as error:
            message = str(error)
            assert ": expected" in message, (what, message)
            assert "\n" not in message, (what, message)
            # What has several values may be told by what does not go with it, or by the row.
            named = message.partition(": expected")[0]
            assert any(known in named for known in (*good, "prompts[")), (what, message)
            several = isinstance(value, list | tuple | dict | set | np.ndarray | torch.Tensor)
            assert name in named or several or name == "user_keys", (what, message)
            refused += 1
    assert refused > 15


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: sr.Lenient("x"), "log_lenience: expected a number, got 'x'"),
        (lambda: sr.Lenient(10**400), "log_lenience: expected a number within float64, got an int of 1329 bits"),
        (lambda: sr.Lenient(scale=None), "scale: expected a number, got None"),
        (lambda: sr.Coupled(True), "log_lenience: expected a number, got True"),
        (lambda: sr.RandomReuse([0.5]), "prob: expected a number, got list"),
        (lambda: sr.Schedule(sr.Lenient), "rule: expected an acceptance rule such as Lenient(0.0), got the class Lenient"),
        (lambda: sr.SamplingParams(max_tokens=2.5), "max_tokens: expected an integer, got 2.5"),
        (lambda: sr.SamplingParams(stop_token_ids=7), "stop_token_ids: expected a sequence, got 7"),
        (lambda: sr.SamplingParams(stop_token_ids=["a"]), "stop_token_ids: expected an integer, got 'a'"),
        (lambda: sr.Drafts.none("two"), "batch: expected an integer, got 'two'"),
        (lambda: sr.Drafts(**{**_DRAFTS, "finished": None}), "finished: expected a torch.Tensor, got None"),
        (lambda: sr.prompt_key([1], "\udc80"), "user_key: expected text that UTF-8 can hold"),
        (lambda: sr.prompt_key([1], b"x"), "user_key: expected a string, got b'x'"),
        (lambda: sr.noise_keys("seed", 0, [bytes(16)], [0]), "seed: expected an integer, got 'seed'"),
        (lambda: sr.noise_keys(0, 0, ["0123456789"], [0]), "prompt_keys: expected bytes, got '0123456789'"),
        (lambda: sr.noise_keys(0, 0, [bytes(16)], [0.5]), "sample_ids: expected a row of integers"),
        (lambda: _session(refresh_epochs="never"), "refresh_epochs: expected an integer, got 'never'"),
        (lambda: sr.RolloutCache("1 GB"), "max_bytes: expected an integer, got '1 GB'"),
        (lambda: sr.ReuseRequest(1, None), "rule: expected an acceptance rule such as Lenient(0.0), got None"),
        (lambda: sr.ReuseRequest(1, sr.OneHot(), [1]), "draft_ids: expected an array of int32, got list"),
    ],
)  # fmt: skip
def test_what_was_expected_and_what_came_is_said(made: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        made()
    assert str(caught.value).startswith(message)


def test_a_tensor_of_a_gpu_is_refused_by_name() -> None:
    with FakeTensorMode():  # no GPU is needed for these
        elsewhere = torch.zeros(2, device="cuda")
    for made, good, name in (
        (sr.Drafts, _DRAFTS, "logprobs"),
        (sr.Drafts, _DRAFTS, "token_ids"),
        (sr.History, _HISTORY, "row_groups"),
        (sr.RolloutRequests, _REQUESTS, "keys"),
        (sr.Rollouts, _ROLLOUTS, "response_ids"),
        (sr.Rollouts, _ROLLOUTS, "running"),
    ):
        with pytest.raises(
            ValueError, match=f"^{name}: expected a tensor on the CPU, got one on cuda:0$"
        ):
            made(**{**good, name: elsewhere})


def test_numbers_of_other_libraries_become_pythons_own() -> None:
    rule = sr.Lenient(np.float32(0.5), scale=fractions.Fraction(1, 4), min_target_prob=0)
    assert rule == sr.Lenient(0.5, 0.25, 0.0)
    assert [type(value) for value in rule.kernel_params[1:]] == [float] * 3
    sampling = sr.SamplingParams(
        temperature=np.float64(0.5),
        top_k=torch.tensor(3),
        max_tokens=np.int64(7),
        stop_token_ids=np.array([1, 2]),
    )
    assert sampling == sr.SamplingParams(0.5, 3, 1.0, 7, (1, 2))
    assert [type(value) for value in sampling.stop_token_ids] == [int, int]
    assert hash(sampling) == hash(sr.SamplingParams(0.5, 3, 1.0, 7, (1, 2)))


def test_what_the_checks_give() -> None:
    assert integer("n", np.int8(3)) == 3
    assert real("x", 3) == 3.0
    assert items("rows", range(3)) == [0, 1, 2]
    assert shown("a" * 100) == "str '" + "a" * 49 + "..."
    assert shown(10**50) == "an int of 167 bits"
