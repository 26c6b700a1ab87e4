"""Prompts with more samples than a suffix index holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spec_rollout.drafting import HistoryDrafter
from spec_rollout.drafting.groups import MAX_ROWS, split_large_groups
from spec_rollout.packed import cu_lens_from
from spec_rollout.types import History


def sizes(row_groups: torch.Tensor, request_groups: torch.Tensor) -> list[int]:
    return torch.bincount(torch.cat([row_groups, request_groups])).tolist()


def test_groups_that_fit_stay_as_they_are() -> None:
    rows, requests = torch.tensor([0, 0, 2]), torch.tensor([2, 0, 1])
    assert split_large_groups(rows, requests, 3) == (rows, requests)


def test_a_large_group_is_divided_among_new_ones_in_turn() -> None:
    rows, requests = torch.tensor([1, 0, 1, 1, 1]), torch.tensor([1, 1, 1, 0])
    new_rows, new_requests = split_large_groups(rows, requests, 4)
    assert new_rows.tolist() == [1, 0, 2, 1, 2]
    assert new_requests.tolist() == [1, 2, 1, 0]
    assert rows.tolist() == [1, 0, 1, 1, 1]  # the caller's


@pytest.mark.parametrize("seed", range(20))
def test_no_group_is_larger_than_allowed_and_none_is_mixed_with_another(seed: int) -> None:
    random = np.random.default_rng(seed)
    limit = int(random.integers(2, 9))
    rows = torch.from_numpy(random.integers(0, 4, random.integers(0, 40)))
    requests = torch.from_numpy(random.integers(0, 4, random.integers(1, 40)))
    new_rows, new_requests = split_large_groups(rows, requests, limit)
    assert max(sizes(new_rows, new_requests)) <= limit
    old = torch.cat([rows, requests])
    new = torch.cat([new_rows, new_requests])
    for group in new.unique():
        assert old[new == group].unique().numel() == 1


def test_requests_meet_history_of_their_prompt_however_many_samples_it_has() -> None:
    samples = (
        MAX_ROWS // 2 + 5
    )  # history and live requests of one prompt: more than one index holds
    text = torch.arange(5, 25, dtype=torch.int32)
    history = History(
        text.repeat(samples),
        cu_lens_from(torch.full((samples,), text.numel())),
        torch.zeros(samples, dtype=torch.int64),
        torch.zeros(samples, dtype=torch.int64),
    )
    drafter = HistoryDrafter(history)
    requests = np.arange(samples)
    drafter.extend(requests, np.tile(text[:6].numpy(), samples), np.full(samples, 6))
    proposals = drafter.propose(requests, np.full(samples, 4), 0.1, max_total=4 * samples)
    assert (proposals.lens > 0).all()
    firsts = np.cumsum(proposals.lens) - proposals.lens
    assert (proposals.token_ids[firsts] == text[6].item()).all()
