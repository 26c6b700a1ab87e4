"""Requests that may take longest begin first; nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import SAMPLING, assert_same, build, drafts_of, random_requests, with_drafts

from spec_rollout.acceptance import Coupled, NoReuse
from spec_rollout.engines import TransformersEngine
from spec_rollout.engines.transformers.verify import Verifier
from spec_rollout.types import Drafts

BATCH = 24


@pytest.fixture
def admitted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Requests in the order in which engines begin them."""
    order: list[int] = []
    admit = Verifier.admit

    def noted(self: Verifier, request: int) -> None:
        order.append(request)
        admit(self, request)

    monkeypatch.setattr(Verifier, "admit", noted)
    return order


@pytest.mark.slow
def test_the_embedded_engine_begins_with_the_longest(admitted: list[int]) -> None:
    engine = TransformersEngine(build("qwen3"), num_slots=4)
    requests = random_requests(BATCH)
    plain = engine.rollout(requests, SAMPLING, NoReuse())
    lens = plain.response_lens.to(torch.int64)
    assert lens.unique().numel() > 5
    steps = {}
    for name, expected in (("longest", lens), ("shortest", 100 - lens)):
        admitted.clear()
        told = engine.rollout(replace(requests, expected_lens=expected), SAMPLING, NoReuse())
        assert_same(told, plain)
        assert torch.equal(expected[admitted], expected.sort(descending=True).values)
        steps[name] = told.stats.num_decode_steps
    assert steps["longest"] < steps["shortest"]


def test_rows_without_a_draft_come_before_those_with_one(admitted: list[int]) -> None:
    engine = TransformersEngine(build("qwen3"), num_slots=4)
    requests = random_requests(BATCH)
    plain = engine.rollout(requests, SAMPLING, NoReuse())
    lens = drafts_of(plain).lens.clone()
    lens[::2] = 0
    requests = with_drafts(requests, drafts_of(plain).cut_to(lens))
    expected = plain.response_lens.to(torch.int64)
    admitted.clear()
    told = engine.rollout(replace(requests, expected_lens=expected), SAMPLING, Coupled())
    assert_same(told, plain)
    assert all(row % 2 == 0 for row in admitted[: BATCH // 2])
    first = expected[admitted[: BATCH // 2]]
    assert torch.equal(first, first.sort(descending=True).values)


def test_the_order_of_requests() -> None:
    requests = replace(random_requests(5), expected_lens=torch.tensor([7, 9, 0, 7, 8]))
    assert requests.longest_first(torch.tensor([0, 3, 0, 0, 20])).tolist() == [0, 3, 2, 4, 1]
    unknown = random_requests(3)
    assert unknown.longest_first(torch.zeros(3, dtype=torch.int64)).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("lens", "found"),
    [
        (torch.tensor([1, 2]), r"got torch.int64 of shape \[2\]$"),
        (torch.tensor([1.0, 2.0, 3.0]), r"got torch.float32 of shape \[3\]$"),
        (torch.tensor([1, -1, 3]), "some below 0"),
        ([1, 2, 3], "got"),
    ],
)
def test_lengths_that_are_none_are_refused(lens: object, found: str) -> None:
    requests = random_requests(3)
    with pytest.raises(ValueError, match=f"expected_lens: expected .*{found}"):
        replace(requests, drafts=Drafts.none(3), expected_lens=lens)
