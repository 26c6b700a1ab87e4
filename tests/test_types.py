from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spec_rollout.packed import cu_lens_from
from spec_rollout.types import (
    Drafts,
    FinishReason,
    RolloutRequests,
    Rollouts,
    RolloutStats,
    SamplingParams,
)


def _drafts() -> Drafts:
    return Drafts(
        token_ids=torch.tensor([1, 2, 3, 4, 5], dtype=torch.int32),
        cu_lens=torch.tensor([0, 3, 3, 5]),
        logprobs=torch.tensor([-0.1, -0.2, -0.3, -0.4, -0.5]),
        finished=torch.tensor([True, False, True]),
    )


def _requests() -> RolloutRequests:
    return RolloutRequests(
        prompt_ids=torch.tensor([7, 8, 9, 7], dtype=torch.int32),
        cu_prompt_lens=torch.tensor([0, 1, 2, 4]),
        keys=torch.tensor([1, 2, 3]),
        drafts=_drafts(),
    )


def _rollouts() -> Rollouts:
    return Rollouts(
        prompt_ids=torch.tensor([7, 8, 9], dtype=torch.int32),
        cu_prompt_lens=torch.tensor([0, 1, 3]),
        response_ids=torch.tensor([1, 2, 3, 4, 5], dtype=torch.int32),
        cu_response_lens=torch.tensor([0, 3, 5]),
        logprobs=torch.zeros(5),
        accepted_lens=torch.tensor([3, 0], dtype=torch.int32),
        finish_reasons=torch.tensor([FinishReason.STOP, FinishReason.ABORT], dtype=torch.uint8),
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_prefix_sums_start_at_zero_and_do_not_overflow(dtype: torch.dtype) -> None:
    cu = cu_lens_from(torch.tensor([200, 0, 100], dtype=dtype))
    assert cu.dtype == torch.int64
    assert cu.tolist() == [0, 200, 200, 300]
    assert cu_lens_from(torch.empty(0, dtype=dtype)).tolist() == [0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("max_tokens", 0),
    ],
)
def test_bad_sampling_params_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{field}: .*got {value}"):
        SamplingParams(**{field: value})


def test_greedy_and_the_borders_of_sampling_params_are_allowed() -> None:
    SamplingParams(temperature=0.0, top_k=0, top_p=1.0, max_tokens=1)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"token_ids": torch.arange(5)}, "token_ids: expected int32, got torch.int64"),
        ({"token_ids": torch.zeros(4, dtype=torch.int32)}, r"token_ids: expected shape \[5\]"),
        ({"token_ids": torch.zeros(5, 1, dtype=torch.int32)}, r"token_ids: .*got \[5, 1\]"),
        ({"cu_lens": torch.tensor([0, 3, 5])}, r"cu_lens: expected int64 of shape \[4\]"),
        ({"cu_lens": torch.tensor([0, 3, 3, 5], dtype=torch.int32)}, "cu_lens: .*int32"),
        ({"cu_lens": torch.tensor([0, 4, 3, 5])}, "cu_lens: expected non-decreasing values from 0"),
        ({"cu_lens": torch.tensor([1, 3, 3, 5])}, "cu_lens: expected non-decreasing values from 0"),
        ({"logprobs": torch.zeros(4)}, r"logprobs: expected float32 of shape \[5\].*\[4\]"),
        ({"logprobs": torch.zeros(5, dtype=torch.float64)}, "logprobs: .*float64"),
        ({"behaviour_logprobs": torch.zeros(4)}, r"behaviour_logprobs: .* \[5\], got .*\[4\]"),
        ({"ages": torch.zeros(5)}, r"ages: expected int16 of shape \[5\], got torch.float32"),
        ({"finished": torch.zeros(3, dtype=torch.uint8)}, "finished: expected bool.*uint8"),
        ({"finished": torch.zeros(3, 1, dtype=torch.bool)}, r"finished: .*\[3, 1\]"),
    ],
)
def test_bad_drafts_are_refused(change: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        replace(_drafts(), **change)


def test_no_drafts_is_a_batch_of_misses() -> None:
    drafts = Drafts.none(3)
    assert drafts.lens.tolist() == [0, 0, 0]
    assert drafts.finished.tolist() == [False] * 3
    assert drafts.logprobs is not None
    assert replace(_drafts(), logprobs=None).lens.tolist() == [3, 0, 2]


def test_cutting_drafts_keeps_prefixes_and_unfinishes_what_was_cut() -> None:
    drafts = _drafts()
    cut = drafts.cut_to(torch.tensor([2, 0, 2], dtype=torch.int32))
    assert cut.token_ids.tolist() == [1, 2, 4, 5]
    assert torch.equal(cut.logprobs, torch.tensor([-0.1, -0.2, -0.4, -0.5]))
    assert cut.cu_lens.tolist() == [0, 2, 2, 4]
    assert cut.finished.tolist() == [False, False, True]
    assert drafts.cut_to(drafts.lens) is drafts
    ages = torch.tensor([5, 4, 3, 2, 1], dtype=torch.int16)
    known = replace(drafts, behaviour_logprobs=-ages.float(), ages=ages).cut_to(cut.lens)
    assert known.behaviour_logprobs.tolist() == [-5.0, -4.0, -2.0, -1.0]
    assert known.ages.tolist() == [5, 4, 2, 1]
    none = drafts.cut_to(torch.tensor([0, 0, 0]))
    assert none.token_ids.numel() == none.logprobs.numel() == 0
    assert not none.finished.any()
    assert replace(drafts, logprobs=None).cut_to(torch.tensor([1, 0, 0])).logprobs is None
    assert Drafts.none(0).cut_to(torch.empty(0, dtype=torch.int64)).lens.numel() == 0


@pytest.mark.parametrize("lens", [[4, 0, 2], [-1, 0, 2], [3, 0], [[3, 0, 2]]])
def test_bad_cuts_are_refused(lens: list) -> None:
    with pytest.raises(ValueError, match="lens: expected 3 lengths from 0 to the draft's own"):
        _drafts().cut_to(torch.tensor(lens))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"prompt_ids": torch.arange(4)}, "prompt_ids: expected int32"),
        ({"cu_prompt_lens": torch.tensor([0, 1, 1, 4])}, "prompt_ids: .*row 1 has none"),
        ({"cu_prompt_lens": torch.tensor([0, 1, 4])}, r"cu_prompt_lens: .*shape \[4\]"),
        ({"keys": torch.tensor([1, 2, 3], dtype=torch.int32)}, "keys: expected int64"),
        ({"drafts": Drafts.none(2)}, "drafts: expected 3 rows, got 2"),
    ],
)
def test_bad_requests_are_refused(change: dict, match: str) -> None:
    assert _requests().batch == 3
    with pytest.raises(ValueError, match=match):
        replace(_requests(), **change)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"prompt_ids": torch.arange(3)}, "prompt_ids: expected int32"),
        ({"cu_prompt_lens": torch.tensor([0, 3])}, r"cu_prompt_lens: .*shape \[3\]"),
        ({"response_ids": torch.arange(5)}, "response_ids: expected int32"),
        ({"cu_response_lens": torch.tensor([0, 3, 4])}, r"response_ids: expected shape \[4\]"),
        ({"logprobs": torch.zeros(4)}, r"logprobs: .*\[5\].*\[4\]"),
        ({"logprobs": torch.zeros(5, dtype=torch.bfloat16)}, "logprobs: .*bfloat16"),
        ({"accepted_lens": torch.tensor([3, 0])}, "accepted_lens: expected torch.int32"),
        (
            {"accepted_lens": torch.tensor([3, 3], dtype=torch.int32)},
            "accepted_lens: expected 0 <= accepted length <= response length",
        ),
        ({"accepted_lens": torch.tensor([-1, 0], dtype=torch.int32)}, "accepted_lens: .*0 <="),
        ({"finish_reasons": torch.tensor([0, 1])}, "finish_reasons: expected torch.uint8"),
        ({"finish_reasons": torch.tensor([0], dtype=torch.uint8)}, r"finish_reasons: .*\[1\]"),
        ({"finish_reasons": torch.tensor([0, 3], dtype=torch.uint8)}, "finish_reasons: .*got 3"),
    ],
)
def test_bad_rollouts_are_refused(change: dict, match: str) -> None:
    rollouts = _rollouts()
    assert (rollouts.batch, rollouts.response_lens.tolist()) == (2, [3, 2])
    assert rollouts.prompt_lens.tolist() == [1, 2]
    with pytest.raises(ValueError, match=match):
        replace(rollouts, **change)


def test_stats_add_up_field_by_field() -> None:
    one = RolloutStats(num_rollouts=2, num_reused_tokens=30, rollout_seconds=0.5)
    two = RolloutStats(num_rollouts=3, num_reused_tokens=10, num_response_tokens=80, num_drafts=4)
    both = one + two
    assert both == RolloutStats(
        num_rollouts=5,
        num_reused_tokens=40,
        num_response_tokens=80,
        num_drafts=4,
        rollout_seconds=0.5,
    )
    assert both.reused_fraction == 0.5
    assert both.mean_accepted_len == 10
    assert RolloutStats(num_rollouts=4, num_fully_reused=1).fully_reused_fraction == 0.25


def test_fractions_of_nothing_are_zero() -> None:
    stats = RolloutStats()
    assert stats.reused_fraction == stats.fully_reused_fraction == stats.mean_accepted_len == 0
