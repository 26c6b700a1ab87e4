"""The law of what the embedded engine generates from drafts, against its closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from laws import assert_law, p_value
from tiny_models import build, drafts_of, perturbed, with_drafts, with_keys

from spec_rollout.acceptance import AcceptanceRule, Coupled, Lenient, NoReuse, OneHot
from spec_rollout.engines import TransformersEngine
from spec_rollout.types import Drafts, RolloutRequests, SamplingParams

VOCAB = 6
PROMPT = [2, 5, 0]
SAMPLING = SamplingParams(max_tokens=2)


@pytest.fixture(scope="module")
def policies():
    old = build("llama", vocab_size=VOCAB)
    return old, perturbed(old, 0.06)


def pair_probs(model: torch.nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """p(y_0) [vocab] and p(y_1 | y_0) [vocab, vocab] after the prompt."""
    rows = torch.tensor([[*PROMPT, token] for token in range(VOCAB)])
    with torch.no_grad():
        probs = model(rows).logits[:, -2:].double().softmax(-1).numpy()
    return probs[0, 0], probs[:, 1]


def lenient_law(old: np.ndarray, new: np.ndarray, lenience: float) -> tuple[np.ndarray, float]:
    """Probability that each token is accepted, and that none is."""
    accepted = np.minimum(old, lenience * new)
    return accepted, 1.0 - accepted.sum()


def expected_pairs(rule: AcceptanceRule, old: torch.nn.Module, new: torch.nn.Module) -> np.ndarray:
    """Law of the first two tokens, drafts drawn from `old`. [vocab, vocab]."""
    (q0, q1), (p0, p1) = pair_probs(old), pair_probs(new)
    if not isinstance(rule, Lenient):  # lossless
        return p0[:, None] * p1
    lenience = np.exp(rule.log_lenience)
    first, rejected = lenient_law(q0, p0, lenience)
    law = rejected * p0[:, None] * p1  # after a rejection all is plain sampling
    for token in range(VOCAB):
        second, second_rejected = lenient_law(q1[token], p1[token], lenience)
        law[token] += first[token] * (second + second_rejected * p1[token])
    return law


def observed_pairs(
    rule: AcceptanceRule, old: torch.nn.Module, new: torch.nn.Module, batch: int
) -> np.ndarray:
    """Counts of the first two tokens. [vocab, vocab]."""
    requests = RolloutRequests(
        torch.tensor(PROMPT * batch, dtype=torch.int32),
        torch.arange(batch + 1) * len(PROMPT),
        torch.zeros(batch, dtype=torch.int64),
        Drafts.none(batch),
    )
    drawn = TransformersEngine(old, num_slots=512).rollout(
        with_keys(requests, 1), SAMPLING, NoReuse()
    )
    rollouts = TransformersEngine(new, num_slots=512).rollout(
        with_drafts(with_keys(requests, 2), drafts_of(drawn)), SAMPLING, rule
    )
    pairs = rollouts.response_ids.view(batch, 2).long().numpy()
    counts = np.zeros((VOCAB, VOCAB), dtype=np.int64)
    np.add.at(counts, (pairs[:, 0], pairs[:, 1]), 1)
    return counts


RULES = [Lenient(0.0), Lenient(0.5), Lenient(-1.0), Coupled(), OneHot()]


@pytest.mark.parametrize("rule", [Lenient(0.5), Coupled()], ids=str)
def test_law_of_two_tokens(policies, rule: AcceptanceRule) -> None:
    check(policies, rule, 6_000)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_law_of_two_tokens_at_length(policies, rule: AcceptanceRule) -> None:
    check(policies, rule, 100_000)


def check(policies: tuple, rule: AcceptanceRule, batch: int) -> None:
    counts = observed_pairs(rule, *policies, batch)
    law = expected_pairs(rule, *policies)
    assert_law(counts, law)
    # The test has the power to tell the law from its neighbours.
    plain = expected_pairs(NoReuse(), *policies)
    old = expected_pairs(NoReuse(), policies[0], policies[0])
    assert p_value(counts, old) < 1e-12
    if isinstance(rule, Lenient) and rule.log_lenience >= 0:
        assert p_value(counts, plain) < 1e-6
