"""Micro-batches: every token of every row once, in place, within the bound."""

from __future__ import annotations

import pytest
import torch

from spec_rollout.packed import cu_lens_from
from spec_rollout.train.batching import micro_batches, ranges
from spec_rollout.types import Rollouts


def make_rollouts(prompt_lens, response_lens, *, vocab=40, seed=0) -> Rollouts:
    generator = torch.Generator().manual_seed(seed)
    prompts, responses = torch.tensor(prompt_lens), torch.tensor(response_lens)

    def draw(lens):
        return torch.randint(3, vocab, (int(lens.sum()),), generator=generator, dtype=torch.int32)

    return Rollouts(
        prompt_ids=draw(prompts),
        cu_prompt_lens=cu_lens_from(prompts),
        response_ids=draw(responses),
        cu_response_lens=cu_lens_from(responses),
        logprobs=-torch.rand(int(responses.sum()), generator=generator),
        accepted_lens=torch.zeros(len(prompts), dtype=torch.int32),
        finish_reasons=torch.zeros(len(prompts), dtype=torch.uint8),
    )


def test_ranges():
    assert ranges(torch.tensor([5, 0, 9]), torch.tensor([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    assert (
        ranges(torch.tensor([], dtype=torch.int64), torch.tensor([], dtype=torch.int64)).tolist()
        == []
    )


def test_hand_written_rows():
    rollouts = Rollouts(
        prompt_ids=torch.tensor([1, 2, 3], dtype=torch.int32),
        cu_prompt_lens=torch.tensor([0, 2, 3]),
        response_ids=torch.tensor([10, 20, 21, 22, 23], dtype=torch.int32),
        cu_response_lens=torch.tensor([0, 1, 5]),
        logprobs=torch.zeros(5),
        accepted_lens=torch.zeros(2, dtype=torch.int32),
        finish_reasons=torch.zeros(2, dtype=torch.uint8),
    )
    (batch,) = micro_batches(rollouts, [0, 1], 100)
    # Row 1 is longer and comes first; the last response token is predicted, never fed.
    assert batch.rows.tolist() == [1, 0]
    assert batch.input_ids.tolist() == [[3, 20, 21, 22], [1, 2, 0, 0]]
    assert batch.positions.tolist() == [0, 1, 2, 3, 5]
    assert batch.token_ids.tolist() == [20, 21, 22, 23, 10]
    assert batch.token_index.tolist() == [1, 2, 3, 4, 0]
    assert batch.token_rows.tolist() == [1, 1, 1, 1, 0]


@pytest.mark.parametrize("max_tokens", [1, 17, 60, 10_000])
def test_every_token_once_and_within_the_bound(max_tokens):
    rollouts = make_rollouts([3, 1, 7, 2, 5, 4], [4, 9, 1, 2, 8, 3])
    rows = [5, 0, 1, 4, 2]  # row 3 left out
    batches = list(micro_batches(rollouts, rows, max_tokens))
    assert sorted(row for b in batches for row in b.rows.tolist()) == sorted(rows)
    index = torch.cat([b.token_index for b in batches])
    cu = rollouts.cu_response_lens
    expected = torch.cat([torch.arange(int(cu[r]), int(cu[r + 1])) for r in sorted(rows)])
    assert torch.equal(index.sort().values, expected)
    for b in batches:
        assert b.input_ids.numel() <= max_tokens or b.rows.numel() == 1
        assert torch.equal(b.token_ids, rollouts.response_ids[b.token_index].long())
        for i, row in enumerate(b.rows.tolist()):
            prompt = rollouts.prompt_ids[
                rollouts.cu_prompt_lens[row] : rollouts.cu_prompt_lens[row + 1]
            ]
            response = rollouts.response_ids[cu[row] : cu[row + 1]]
            whole = torch.cat([prompt, response]).tolist()
            assert b.input_ids[i].tolist() == whole[:-1] + [0] * (
                b.input_ids.shape[1] - len(whole) + 1
            )
            mine = b.token_rows == row
            # The token that follows each position is the one predicted there.
            columns = (b.positions[mine] - i * b.input_ids.shape[1]).tolist()
            assert (
                [whole[c + 1] for c in columns] == b.token_ids[mine].tolist() == response.tolist()
            )
    assert len(batches) == (5 if max_tokens == 1 else len(batches))


def test_no_rows():
    assert list(micro_batches(make_rollouts([1], [1]), [], 10)) == []
