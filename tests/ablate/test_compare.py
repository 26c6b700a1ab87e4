from __future__ import annotations

from pathlib import Path

import torch

from spec_rollout.ablate.compare import ResponseLog, compare_responses
from spec_rollout.packed import cu_lens_from
from spec_rollout.types import Rollouts


def save(path: Path, *steps: list[list[int]]) -> Path:
    """A log of one batch of responses per step."""
    log = ResponseLog()
    for number, responses in enumerate(steps, start=1):
        batch = len(responses)
        cu_lens = cu_lens_from(torch.tensor([len(r) for r in responses]))
        tokens = [token for response in responses for token in response]
        log.add(
            number,
            Rollouts(
                prompt_ids=torch.zeros(batch, dtype=torch.int32),
                cu_prompt_lens=torch.arange(batch + 1),
                response_ids=torch.tensor(tokens, dtype=torch.int32),
                cu_response_lens=cu_lens,
                logprobs=torch.zeros(len(tokens)),
                accepted_lens=torch.zeros(batch, dtype=torch.int32),
                finish_reasons=torch.zeros(batch, dtype=torch.uint8),
            ),
        )
    log.save(path)
    return path


def test_equal_runs_are_identical(tmp_path: Path) -> None:
    steps = [[[1, 2], [3]], [[4, 5, 6], []]]
    one, other = save(tmp_path / "a.npz", *steps), save(tmp_path / "b.npz", *steps)
    expected = {"total": 4, "identical": 4, "first_difference": None}
    assert compare_responses(one, other) == expected


def test_the_first_differing_token_is_found(tmp_path: Path) -> None:
    one = save(tmp_path / "a.npz", [[1, 2], [3]], [[4, 5, 6], [7, 8]])
    other = save(tmp_path / "b.npz", [[1, 2], [3]], [[4, 5, 9], [7, 0]])
    assert compare_responses(one, other) == {
        "total": 4,
        "identical": 2,
        "first_difference": {"rollout": 2, "step": 2, "position": 2},
    }


def test_a_prefix_differs_where_it_ends(tmp_path: Path) -> None:
    one, other = save(tmp_path / "a.npz", [[1, 2, 3]]), save(tmp_path / "b.npz", [[1, 2]])
    assert compare_responses(one, other)["first_difference"]["position"] == 2


def test_equal_tokens_of_another_step_or_split_do_not_count(tmp_path: Path) -> None:
    one = save(tmp_path / "a.npz", [[1], [2]])
    assert compare_responses(one, save(tmp_path / "b.npz", [[1]], [[2]]))["identical"] == 1
    assert compare_responses(one, save(tmp_path / "c.npz", [[], [1, 2]]))["identical"] == 0


def test_a_missing_rollout_is_a_difference(tmp_path: Path) -> None:
    one, other = save(tmp_path / "a.npz", [[1], [2]]), save(tmp_path / "b.npz", [[1]])
    assert compare_responses(one, other) == {
        "total": 2,
        "identical": 1,
        "first_difference": {"rollout": 1, "step": None, "position": None},
    }
    nothing = save(tmp_path / "c.npz")
    assert compare_responses(nothing, nothing)["total"] == 0
    assert compare_responses(one, nothing)["identical"] == 0
