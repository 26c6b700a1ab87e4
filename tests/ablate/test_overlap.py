"""ROUGE-1 of consecutive epochs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spec_rollout.ablate.overlap import ResponseFiles, rouge1
from spec_rollout.packed import cu_lens_from
from spec_rollout.types import Rollouts


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("The cat.", "the, CAT!", 1.0),
        ("a b c d", "d c x", 2 * 2 / 7),  # order does not count
        ("a a a b", "a b b", 2 * 2 / 7),  # each word as often as both have it
        ("a", "b", 0.0),
        ("", "a", 0.0),
        ("...", "", 1.0),
        ("два три", "три", 2 / 3),
    ],
)
def test_rouge1(one: str, other: str, expected: float) -> None:
    assert rouge1(one, other) == rouge1(other, one) == pytest.approx(expected)


def rollouts(rows: list[tuple[list[int], list[int]]]) -> Rollouts:
    """(prompt, response) each."""
    prompts, responses = zip(*rows, strict=True)
    ids = [token for response in responses for token in response]
    return Rollouts(
        prompt_ids=torch.tensor([t for p in prompts for t in p], dtype=torch.int32),
        cu_prompt_lens=cu_lens_from(torch.tensor([len(p) for p in prompts])),
        response_ids=torch.tensor(ids, dtype=torch.int32),
        cu_response_lens=cu_lens_from(torch.tensor([len(r) for r in responses])),
        logprobs=torch.zeros(len(ids)),
        accepted_lens=torch.zeros(len(rows), dtype=torch.int32),
        finish_reasons=torch.zeros(len(rows), dtype=torch.uint8),
    )


def words(rows: list[list[int]]) -> list[str]:
    return [" ".join(f"w{token}" for token in row) for row in rows]


def test_samples_are_compared_with_themselves_in_the_epoch_before(tmp_path: Path) -> None:
    files = ResponseFiles(tmp_path / "responses")
    p, q = [1], [1, 2]
    files.add(1, rollouts([(p, [1, 2]), (p, [3, 4])]))
    files.add(1, rollouts([(p, [9]), (p, [9])]))  # of other prompts drawn in the same step
    files.add(2, rollouts([(q, [5]), (q, [])]))
    # The next epoch has another order; one sample is the same, one shares half, two nothing.
    files.add(3, rollouts([(q, [6]), (q, [7])]))
    files = ResponseFiles(tmp_path / "responses")  # the run was ended and gone on with
    files.add(4, rollouts([(p, [1, 2]), (p, [4, 5])]))
    overlaps = files.overlaps({1: 0, 2: 0, 3: 1, 4: 1}, words)
    assert overlaps == {1: pytest.approx((1 + 0.5 + 0 + 0) / 4)}
    files.remove()
    assert list(tmp_path.iterdir()) == []
    files.remove()
