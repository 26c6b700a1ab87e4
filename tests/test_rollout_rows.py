"""Rows with identities of their own: what a row draws and finds does not depend on its company."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from markov_engine import MarkovEngine

from spec_rollout.acceptance import AcceptanceRule, Coupled, Lenient
from spec_rollout.engines.base import RolloutEngine
from spec_rollout.rollout import RolloutSession
from spec_rollout.types import Rollouts, SamplingParams

VOCAB = 6
SAMPLING = SamplingParams(max_tokens=9, stop_token_ids=(5,))
PROMPTS = [[0, 1], [2], [3, 3, 1]]
SAMPLES = 4


def session(rule: AcceptanceRule) -> RolloutSession:
    logits = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(3))
    return RolloutSession(MarkovEngine(logits), rule, seed=11)


def rows_of(rollouts: Rollouts) -> list[tuple[list[int], int]]:
    parts = rollouts.response_ids.split(rollouts.response_lens.tolist())
    accepted = rollouts.accepted_lens.tolist()
    return [(part.tolist(), n) for part, n in zip(parts, accepted, strict=True)]


def all_rows() -> list[tuple[list[int], int]]:
    return [(prompt, sample) for prompt in PROMPTS for sample in range(SAMPLES)]


def drift(a_session: RolloutSession) -> None:
    engine = a_session.engine
    assert isinstance(engine, MarkovEngine)
    generator = torch.Generator().manual_seed(4)
    engine.update_weights(
        [("logits", engine.logits + 0.4 * torch.randn(VOCAB, VOCAB, generator=generator))]
    )


@pytest.mark.parametrize("rule", [Coupled(), Lenient(0.5)], ids=["coupled", "lenient"])
def test_rows_in_any_order_and_over_several_calls_are_those_of_whole_groups(
    rule: AcceptanceRule,
) -> None:
    whole, rows = session(rule), session(rule)
    order = np.random.default_rng(0).permutation(len(all_rows()))
    shares = [order[:5], order[5:6], order[6:]]  # as three ranks might get them
    for epoch in range(2):
        expected = rows_of(whole.rollout(PROMPTS, SAMPLES, SAMPLING, step=2 * epoch, epoch=epoch))
        got: dict[int, tuple[list[int], int]] = {}
        for share in shares:
            mine = [all_rows()[i] for i in share]
            rollouts = rows.rollout_rows(
                [list(prompt) for prompt, _ in mine],
                [sample for _, sample in mine],
                SAMPLING,
                step=2 * epoch,
                epoch=epoch,
            )
            got.update(zip(share.tolist(), rows_of(rollouts), strict=True))
        assert [got[i] for i in range(len(expected))] == expected
        if epoch == 1:
            assert sum(accepted for _, accepted in expected) > 0
        drift(whole)
        drift(rows)


def test_a_group_given_as_one_list_many_times_is_that_group() -> None:
    prompt = [1, 2, 3]
    shared = session(Coupled()).rollout_rows([prompt] * 3, range(3), SAMPLING, step=0, epoch=0)
    copies = session(Coupled()).rollout_rows(
        [list(prompt) for _ in range(3)], torch.arange(3), SAMPLING, step=0, epoch=0
    )
    assert rows_of(shared) == rows_of(copies)
    assert len({tuple(ids) for ids, _ in rows_of(shared)}) > 1


def test_sample_ids_far_apart_are_kept_apart_in_noise_and_cache() -> None:
    a_session = session(Coupled())
    ids = [0, 2**40, 7]
    first = a_session.rollout_rows([[1]] * 3, ids, SAMPLING, step=0, epoch=0)
    again = a_session.rollout_rows([[1]] * 3, ids[::-1], SAMPLING, step=1, epoch=1)
    assert again.stats.num_drafts == 3
    assert [ids for ids, _ in rows_of(again)] == [ids for ids, _ in rows_of(first)][::-1]


def test_user_keys_keep_equal_prompts_apart() -> None:
    a_session = session(Coupled())
    rollouts = a_session.rollout_rows(
        [[1]] * 8, [0] * 8, SAMPLING, step=0, epoch=0, user_keys=list("abcdefgh")
    )
    assert len({tuple(ids) for ids, _ in rows_of(rollouts)}) > 1
    assert a_session.cache.stats.num_groups == 8


@pytest.mark.parametrize(
    ("prompts", "sample_ids", "message"),
    [
        ([[1], [1]], [0], r"sample_ids: expected 2 integers, one per row of prompts, got int64"),
        ([[1], [1]], [0.0, 1.0], r"sample_ids: expected 2 integers.*got float64 of shape \[2\]"),
        ([[1], [1]], [0, -1], r"sample_ids: expected 0 <= .*-1"),
        ([[1]], [2**63], r"sample_ids: expected 0 <= "),
        ([[1], [2], [1]], [4, 4, 4], r"sample_ids: expected another one .*got 4 in rows 0 and 2"),
        ([], [], r"prompts: expected at least one, got none"),
        ([[1], []], [0, 1], r"prompts\[1\]: expected at least one token, got none"),
        ([[1], [2**40]], [0, 1], r"prompts\[1\]: "),
    ],
)
def test_bad_rows_are_refused_before_anything_is_generated(prompts, sample_ids, message) -> None:
    a_session = session(Coupled())
    with pytest.raises(ValueError, match=message):
        a_session.rollout_rows(prompts, sample_ids, SAMPLING, step=0, epoch=0)
    assert isinstance(a_session.engine, MarkovEngine)
    assert a_session.engine.num_calls == 0
    assert a_session.cache.stats.num_groups == 0


def test_the_engine_keeps_the_whole_promise() -> None:
    assert isinstance(session(Coupled()).engine, RolloutEngine)
