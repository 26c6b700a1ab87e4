"""Prompts that come in pieces: each piece is a request with a draft of its own, or none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from v2_samples import drafted, metrics_of, params, random_prompts, streamed

from spec_rollout.acceptance import AcceptanceRule, Coupled, Lenient

PIECES = random_prompts([9, 4, 6], seed=12)


@pytest.fixture(scope="module")
def plain(stock: Any) -> list[list[int]]:
    return streamed(stock, [(p, params(60 + i)) for i, p in enumerate(PIECES)])


def reused(
    llm: Any, drafts: list[list[int] | None], rules: list[AcceptanceRule]
) -> list[list[int]]:
    """The pieces with drafts; None: without a key."""
    sampling = [params(60 + i) for i in range(len(PIECES))]
    given = [
        p
        if d is None
        else drafted(p, d, r, logprobs=np.full(len(d), -0.1, np.float32) if d else None)
        for p, d, r in zip(sampling, drafts, rules, strict=True)
    ]
    metrics_of(llm)
    return streamed(llm, list(zip(PIECES, given, strict=True)))


def test_the_draft_of_each_piece_is_followed(either: Any, plain: list[list[int]]) -> None:
    """Also after a piece without one, and after one whose draft ended early."""
    rules = [Coupled()] * 3
    for drafts, kept in (
        ([[], plain[1], plain[2]], 24),
        ([None, plain[1], plain[2]], 24),
        ([plain[0], None, plain[2]], 24),
        ([plain[0][:2], plain[1], []], 14),
    ):
        assert reused(either, drafts, rules) == plain
        metrics = metrics_of(either)
        assert metrics.num_accepted_tokens == kept
        assert metrics.num_drafts == sum(bool(d) for d in drafts)
        # Twelve of the piece that has no draft.
        assert metrics.num_engine_steps <= 12 + 12 + 3 * 2


def test_a_piece_without_a_draft_after_one_with_a_rule(either: Any, plain: list[list[int]]) -> None:
    """Its log-probs are none, which the rule of the piece before would ask for."""
    rules = [Lenient(50.0), Lenient(0.0), Coupled()]
    assert reused(either, [plain[0], [], plain[2]], rules) == plain
    assert metrics_of(either).num_accepted_tokens == 24


@pytest.mark.v2_large
@pytest.mark.parametrize("is_async", [False, True])
def test_every_piece_is_served_by_an_engine_that_proposes(
    make_llm: Any, plain: list[list[int]], is_async: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lagged = ', "lagged_tokens": 4' if is_async else ""
    monkeypatch.setenv("SPEC_ROLLOUT", f'{{"mode": "drafting"{lagged}}}')
    llm = make_llm(logprobs_mode="processed_logprobs", async_scheduling=is_async)
    pieces = [(p, params(60 + i)) for i, p in enumerate(PIECES)]
    steps = []
    for _ in range(2):
        metrics_of(llm)
        assert streamed(llm, pieces) == plain
        steps.append(metrics_of(llm).num_engine_steps)
    info = llm.collective_rpc("spec_rollout_history")[0]
    assert info["num_served"] == 2 * len(PIECES)
    assert info["num_live"] == 0
    assert steps[0] - steps[1] >= (8 if is_async else 13)
