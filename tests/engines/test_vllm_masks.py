"""Restrictions of requests' vocabularies: all rows of a batch at once are as each by itself."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from spec_rollout.acceptance import Coupled
from spec_rollout.engines.vllm.wire import ReuseRequest
from spec_rollout.engines.vllm.worker import masks as masks_module
from spec_rollout.engines.vllm.worker.logprobs import SampledLogprobs
from spec_rollout.engines.vllm.worker.masks import BatchMasks, LogitMasks
from spec_rollout.engines.vllm.worker.request_state import Row
from spec_rollout.engines.vllm.worker.sampler import ReuseSampler
from spec_rollout.engines.vllm.worker.sampling.base import Step

VOCAB = 97
EOS = 3


def params(**changes: Any) -> Any:
    """What `LogitMasks` reads of vLLM's SamplingParams."""
    plain = {
        "temperature": 0.7,
        "min_p": 0.0,
        "logit_bias": None,
        "allowed_token_ids": None,
        "min_tokens": 0,
        "all_stop_token_ids": {EOS},
    }
    return SimpleNamespace(**{**plain, **changes})


KINDS: dict[str, dict[str, Any]] = {
    "none": {},
    "min_p": {"min_p": 0.3},
    "bias": {"logit_bias": {5: 4.0, EOS: -100.0, 96: 0.3}},
    "min_tokens": {"min_tokens": 6, "all_stop_token_ids": {EOS, 50, 51}},
    "allowed": {"allowed_token_ids": [7, 5, EOS, 60, 61, 5]},
    "all": {
        "temperature": 1.3,
        "min_p": 0.1,
        "logit_bias": {5: 3.0, EOS: 60.0, 8: 90.0},
        "min_tokens": 4,
        "allowed_token_ids": [*range(EOS, 8), *range(20, 60)],
    },
    "no stop tokens": {"min_tokens": 9, "all_stop_token_ids": set()},
}


def restricted(row: torch.Tensor, one: Any, position: int) -> torch.Tensor:
    """The plain definition, for one row of logits. [vocab]."""
    x = row.clone()
    if one.allowed_token_ids:
        x[[token for token in range(VOCAB) if token not in one.allowed_token_ids]] = -math.inf
    for token, value in (one.logit_bias or {}).items():
        x[token] += value
    if position < one.min_tokens:
        x[sorted(one.all_stop_token_ids)] = -math.inf
    if one.min_p > 0:
        floor = x.max().float() + one.temperature * math.log(one.min_p)
        x[x < floor.to(x.dtype)] = -math.inf
    return x


def check(
    masks: BatchMasks,
    batch: list[Any],
    num_rows: list[int],
    positions: list[int],
    dtype: torch.dtype = torch.float32,
) -> None:
    generator = torch.Generator().manual_seed(sum(num_rows) + sum(positions))
    logits = (3 * torch.randn(sum(num_rows), VOCAB, generator=generator)).to(dtype)
    owners = [(r, i) for r, n in enumerate(num_rows) for i in range(n)]
    expected = torch.stack(
        [
            row if batch[r] is None else restricted(row, batch[r], positions[r] + i)
            for row, (r, i) in zip(logits, owners, strict=True)
        ]
    )
    counts = np.array(num_rows, np.int64)
    where = np.array(positions, np.int64)
    assert masks.restrict(where) or torch.equal(expected, logits)
    masks.apply(logits, np.cumsum(counts) - counts, counts, where)
    assert torch.equal(logits, expected)


def masks_of(batch: list[Any]) -> BatchMasks:
    masks = BatchMasks.of([None if one is None else LogitMasks.of(one) for one in batch])
    assert masks is not None
    return masks


@pytest.mark.parametrize("copies", [False, True], ids=["as on CPUs", "as on GPUs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kinds", [*([k] for k in KINDS if k != "none"), list(KINDS)], ids=str)
def test_all_rows_are_as_each_by_itself(
    kinds: list[str], dtype: torch.dtype, copies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masks_module, "_copies_rows", lambda device: copies)
    one_each = [params(**KINDS[kind]) for kind in kinds]
    batches = [
        one_each * 3,  # rows side by side, where every request has the same restriction
        [None, *one_each, params()],
        [one for kind in one_each for one in (kind, None)],  # rows apart
    ]
    for batch in batches:
        masks = masks_of(batch)
        n = len(batch)
        ones = [1] * n
        many = [1 + (r * 7) % 4 for r in range(n)]
        # What was put together for a step serves the next one where its rows are the same.
        for num_rows, start in (
            (ones, 0),
            (ones, 1),
            (many, 1),
            (many, 4),
            (ones, 4),
            (many[::-1], 4),
            (many, 20),
        ):
            check(masks, batch, num_rows, [start + r % 3 for r in range(n)], dtype)


def test_rows_with_nothing_left_to_choose_stay_as_they_are() -> None:
    masks = masks_of([params(min_p=0.2), None, params(min_p=0.5)])
    logits = torch.full((3, VOCAB), -math.inf)
    ones = np.ones(3, np.int64)
    masks.apply(logits, np.arange(3), ones, ones)
    assert (logits == -math.inf).all()


def test_what_has_come_to_an_end_takes_no_time() -> None:
    masks = masks_of([params(min_tokens=4), params(), params(min_tokens=6)])
    ends = [
        (positions, masks.restrict(np.array(positions)))
        for positions in ([3, 0, 9], [4, 0, 5], [4, 0, 6], [9, 9, 9])
    ]
    assert [on for _, on in ends] == [True, True, False, False]
    assert masks_of([params(min_tokens=4), params(min_p=0.1)]).restrict(np.array([9, 9]))
    assert BatchMasks.of([None, LogitMasks.of(params())]) is None


class Operations(TorchFunctionMode):
    """Counts calls of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("num_rows", [1, 3])
def test_many_requests_take_no_more_operations_than_one(num_rows: int) -> None:
    def operations(n: int) -> int:
        masks = masks_of([params(**KINDS["all"])] * n)
        counts = np.full(n, num_rows, np.int64)
        for start in range(2):  # the second time all is on the device
            with Operations() as found:
                masks.apply(
                    torch.randn(n * num_rows, VOCAB),
                    np.arange(n) * num_rows,
                    counts,
                    np.full(n, start),
                )
        return found.count

    assert 10 < operations(50) <= operations(2)


def row_of(key: int, masks: LogitMasks | None) -> Row:
    return Row(
        ReuseRequest(key, Coupled()),
        collect_id=-1,
        prompt_len=4,
        max_response_len=90,
        stop_token_ids=frozenset({EOS}),
        first_chunk=4,
        masks=masks,
    )


def step_of(rows: list[Row | None], logits: torch.Tensor, **changes: Any) -> Step:
    n = len(rows)
    step = Step(
        rows=rows,
        lens=np.full(n, 5, np.int64),
        scheduled=None,
        discard=np.zeros(n, bool),
        logits=logits.clone(),
        temperature=torch.full((n,), 0.7),
        top_k=0,
        top_p=1.0,
        sample_stock=lambda logits: pytest.fail("not asked for"),
        logprobs=None,
    )
    return replace(step, **changes)


@pytest.mark.parametrize("raw", [False, True])
def test_steps_that_test_nothing_need_no_host_with_masks_either(raw: bool) -> None:
    """They are plain draws, which stay on the device, and give the tokens of the general way."""
    rows: list[Row | None] = [
        row_of(i, LogitMasks.of(params(**kind))) for i, kind in enumerate([*KINDS.values()] * 4)
    ]
    logits = 3 * torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(0))

    def logprobs() -> SampledLogprobs:
        return SampledLogprobs(
            2,
            raw=raw,
            temperature=torch.full((len(rows),), 0.7),
            top_k=0,
            top_p=1.0,
            make=lambda *parts: parts,
        )

    plain, general = ReuseSampler(8), ReuseSampler(8)
    plain.paths, general.paths = plain.paths[:1], general.paths[-1:]
    found, found_logprobs = plain(step_of(rows, logits, logprobs=logprobs()))
    expected, expected_logprobs = general(step_of(rows, logits, logprobs=logprobs()))
    assert torch.equal(found, expected)
    for a, b in zip(found_logprobs, expected_logprobs, strict=True):
        torch.testing.assert_close(a, b)
    source = logits
    if not raw:
        each = zip(logits, [*KINDS.values()] * 4, strict=True)
        source = torch.stack([restricted(row, params(**kind), 1) / 0.7 for row, kind in each])
    wanted = source.log_softmax(-1).gather(1, found.long())[:, 0]
    torch.testing.assert_close(found_logprobs[1][:, 0], wanted)
    # A step whose drafts vLLM made up: its rows are found all the same.
    made_up = [[-1] * (i % 3) for i in range(len(rows))]
    wide = logits.repeat_interleave(torch.tensor([len(s) + 1 for s in made_up]), 0)
    again, _ = general(step_of(rows, wide, scheduled=made_up))
    assert torch.equal(again[:, 0], expected[:, 0])
