"""Tokens that are kept for later come out as they went in."""

from __future__ import annotations

import numpy as np
import torch

from spec_rollout.engines.vllm.worker.late_tokens import LateTokens


def add(late: LateTokens, slots: list[int], tokens: list[int], logprobs: list[float]) -> None:
    ids = torch.tensor(tokens, dtype=torch.int32)
    late.add(np.array(slots, np.int64), ids, torch.tensor(logprobs))


def test_tokens_come_out_by_request_in_their_order() -> None:
    late = LateTokens()
    add(late, [3, 1], [30, 10], [-3.0, -1.0])
    add(late, [1, 3], [11, 31], [-1.1, -3.1])
    add(late, [0, 1], [0, 12], [-0.5, -1.2])
    assert len(late) == 3
    requests, lens, tokens, logprobs = late.take()
    assert requests.tolist() == [0, 1, 3]
    assert lens.tolist() == [1, 3, 2]
    assert tokens.tolist() == [0, 10, 11, 12, 30, 31]
    np.testing.assert_array_equal(logprobs, np.float32([-0.5, -1.0, -1.1, -1.2, -3.0, -3.1]))
    assert not late
    add(late, [1], [13], [-1.3])
    found = late.take()
    assert [part.tolist() for part in found[:3]] == [[1], [1], [13]]
    assert found[3][0] == np.float32(-1.3)
    assert [part.dtype for part in found] == [np.int64, np.int64, np.int32, np.float32]


def test_there_is_room_for_so_many_steps() -> None:
    late = LateTokens()
    steps = 0
    while not late.is_full:
        add(late, [2, 0], [steps, 100 + steps], [-float(steps), 0.0])
        steps += 1
    requests, lens, tokens, logprobs = late.take()
    assert requests.tolist() == [0, 2]
    assert lens.tolist() == [steps, steps]
    assert tokens.tolist() == [*range(100, 100 + steps), *range(steps)]
    assert logprobs[steps:].tolist() == [-float(i) for i in range(steps)]
    assert not late.is_full


def test_nothing_comes_of_nothing() -> None:
    found = LateTokens().take()
    assert [part.size for part in found] == [0, 0, 0, 0]
    assert [part.dtype for part in found] == [np.int64, np.int64, np.int32, np.float32]
