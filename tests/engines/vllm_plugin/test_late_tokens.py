"""Tokens that are kept for later come out as they went in."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spec_rollout.engines.vllm.worker.late_tokens import LateTokens


def slots(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def test_tokens_come_out_by_request_in_their_order() -> None:
    late = LateTokens(4)
    late.add(slots(3, 1), np.int32([30, 10]), torch.tensor([-3.0, -1.0]))
    late.add(slots(1, 3), np.int32([11, 31]), None)
    late.add(slots(0, 1), np.int32([0, 12]), torch.tensor([-0.5, -1.2]))
    assert len(late) == 3
    requests, lens, tokens, logprobs = late.take()
    assert requests.tolist() == [0, 1, 3]
    assert lens.tolist() == [1, 3, 2]
    assert tokens.tolist() == [0, 10, 11, 12, 30, 31]
    np.testing.assert_array_equal(logprobs, np.float32([-0.5, -1.0, np.nan, -1.2, -3.0, np.nan]))
    assert not late
    late.add(slots(1), np.int32([13]), torch.tensor([-1.3]))
    found = late.take()
    assert [part.tolist() for part in found[:3]] == [[1], [1], [13]]
    assert found[3][0] == np.float32(-1.3)


def test_there_is_room_for_so_many_steps_and_for_more_requests() -> None:
    late = LateTokens(1)
    late.grow(3)
    steps = 0
    while not late.is_full:
        late.add(slots(2, 0), np.int32([steps, 100 + steps]), None)
        steps += 1
    requests, lens, tokens, logprobs = late.take()
    assert requests.tolist() == [0, 2]
    assert lens.tolist() == [steps, steps]
    assert tokens.tolist() == [*range(100, 100 + steps), *range(steps)]
    assert np.isnan(logprobs).all()
    assert not late.is_full


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_comes_of_nothing(count: int) -> None:
    found = LateTokens(count).take()
    assert [part.size for part in found] == [0, 0, 0, 0]
