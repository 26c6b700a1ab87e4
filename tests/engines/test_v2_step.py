"""What is proposed behind a step whose tokens the host did not know."""

from __future__ import annotations

import numpy as np
import torch

from spec_rollout.engines.vllm.worker.v2.step import (
    GivenTokens,
    StepState,
    continued,
    packed_tokens,
)

PROMPT = [40, 41, 42]


def after(responses: list[list[int]], num_given: list[int]) -> StepState:
    """A step that gave the last so many tokens of each response; slots are in another order."""
    n = len(responses)
    slots = np.arange(n)[::-1].copy()
    token_ids = torch.zeros(n, 16, dtype=torch.int32)
    lens = torch.zeros(n, dtype=torch.int32)
    for slot, response in zip(slots.tolist(), responses, strict=True):
        row = [*PROMPT, *response]
        token_ids[slot, : len(row)] = torch.tensor(row)
        lens[slot] = len(row)
    return StepState(
        slots=slots,
        device_slots=torch.from_numpy(slots).int(),
        num_scheduled=np.array([max(g - 1, 0) for g in num_given]),
        num_tokens=n,
        num_logits=n,
        num_sampled=torch.tensor(num_given, dtype=torch.int32),
        total_lens=lens,
        prompt_lens=torch.full((n,), len(PROMPT), dtype=torch.int32),
        token_ids=token_ids,
    )


def guesses(*each: tuple[int, list[int]]) -> np.ndarray:
    rows = np.zeros((len(each), 2 + 5), np.int32)
    for row, (first, tokens) in zip(rows, each, strict=True):
        row[: 2 + len(tokens)] = [first, len(tokens), *tokens]
    return rows


def test_a_guess_counts_where_it_was_right_about_the_step_under_way() -> None:
    step = after(
        [[1, 2, 3], [1, 2, 3], [1, 9, 3], [1, 2], [1, 2, 3], [1, 2, 3], [1]],
        [2, 2, 2, 1, 2, 2, 0],
    )
    given = guesses(
        (1, [2, 3, 4, 5, 6]),  # right about 2 and 3: 4 and 5 are proposed, of at most two
        (1, [2, 7, 4, 5, 6]),
        (1, [2, 3, 4, 5, 6]),
        (1, [2, 3]),  # of a step that gave one token: one is left
        (1, [2]),  # too short to say anything of 3
        (0, []),
        (1, [2, 3]),  # given nothing: its prefill goes on
    )
    counts = torch.zeros(7, dtype=torch.int32)
    filler = torch.full((7, 3), 99)
    out = continued(step, given, filler, counts, most=2)
    assert counts.flip(0).tolist() == [2, 0, 0, 1, 0, 0, 0]
    assert out[0].tolist() == [4, 5, 99]
    assert out[3].tolist() == [3, 99, 99]
    assert (out[[1, 2, 4, 5, 6]] == 99).all()


def test_a_draft_of_its_own_comes_first() -> None:
    step = after([[1, 2]], [1])
    counts = torch.tensor([1], dtype=torch.int32)
    proposed = torch.tensor([[8, 2]])
    out = continued(step, guesses((1, [2, 3, 4])), proposed, counts, most=2)
    assert out.tolist() == [[8, 2]]
    assert counts.tolist() == [1]


def test_what_a_step_gave_is_packed() -> None:
    step = after([[1, 2, 3], [7]], [2, 1])
    logprobs = torch.tensor([[-0.5, -9.0, -9.0], [-1.0, -2.0, -9.0]])  # by slot
    packed = packed_tokens(step, torch.tensor([3, 4], dtype=torch.int32), logprobs)
    found = GivenTokens.unpacked(packed.numpy())
    assert found.given.tolist() == [2, 1]
    assert found.indices.tolist() == [3, 1]
    assert found.own.tolist() == [4, 3]
    assert found.tokens[0].tolist() == [2, 3]
    assert found.tokens[1, 0] == 7
    assert found.logprobs[0].tolist() == [-1.0, -2.0]
    assert found.logprobs[1, 0] == -0.5
