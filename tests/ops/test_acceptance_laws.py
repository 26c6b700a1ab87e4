"""Every acceptance rule against its closed-form law, by chi-square on 200,000 draws of
`verify_prefix`.

The law of a position is the law of what ends up in the rollout there: the draft token if accepted,
else the next token.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from laws import assert_law as assert_counts
from laws import assert_rate, p_value

from spec_rollout import ops
from spec_rollout.acceptance import AcceptanceRule, Coupled, Lenient, NoReuse, OneHot

DRAWS = 200_000

# (p, q): target and draft probabilities.
PAIRS = {
    "near": ([0.40, 0.25, 0.15, 0.12, 0.08], [0.30, 0.30, 0.20, 0.12, 0.08]),
    "far": ([0.70, 0.20, 0.05, 0.04, 0.01], [0.05, 0.05, 0.10, 0.20, 0.60]),
    "p(y) = 0": ([0.50, 0.50, 0.00, 0.00], [0.25, 0.25, 0.25, 0.25]),
    "q(y) tiny": ([0.40, 0.30, 0.20, 0.10], [1e-7, 0.60, 0.399, 0.0009999]),
    "disjoint": ([0.0, 0.0, 0.6, 0.4], [0.5, 0.5, 0.0, 0.0]),
    "eight": ([0.3, 0.2, 0.15, 0.1, 0.1, 0.08, 0.05, 0.02], [0.125] * 8),
    "one token": ([1.0], [1.0]),
}


def _keys(seed: int, count: int = DRAWS) -> torch.Tensor:
    return torch.randint(
        -(2**63), 2**63 - 1, (count,), generator=torch.Generator().manual_seed(seed)
    )


def _logits(probs: list[float] | torch.Tensor, rows: int) -> torch.Tensor:
    return torch.as_tensor(probs).float().log()[None].expand(rows, -1)


def assert_law(tokens: torch.Tensor, law: torch.Tensor) -> None:
    """Chi-square of the tokens' counts; impossible tokens must not occur at all."""
    law = law.double() / law.double().sum()
    assert_counts(torch.bincount(tokens.long().cpu(), minlength=len(law)), law)


def verify_one(
    probs: list[float],
    draft_ids: torch.Tensor,
    rule: AcceptanceRule,
    keys: torch.Tensor,
    draft_logprobs: torch.Tensor | None = None,
    position: int = 0,
    device: str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor]:
    """One-token drafts: (what the rollout holds at that position, accepted), each [draws]."""
    draws = len(keys)
    cu = torch.arange(draws + 1, device=device)
    got = ops.verify_prefix(
        _logits(probs, draws).to(device),
        draft_ids.to(device),
        cu,
        rule=rule,
        keys=keys.to(device),
        positions=torch.full((draws,), position, device=device),
        draft_logprobs=None if draft_logprobs is None else draft_logprobs.to(device),
        cu_logits_lens=cu,
    )
    accepted = got.accepted_lens.cpu() == 1
    return torch.where(accepted, draft_ids.int(), got.next_token_ids.cpu()), accepted


def lenient_law(p: torch.Tensor, q: torch.Tensor, rule: Lenient) -> torch.Tensor:
    """q a + (1 - sum q a) p with a_v the probability that v is accepted; min(q, l p) = q a at scale
    1."""
    assert not isinstance(rule.tolerance, str)
    ratio = torch.where(q > 0, p / q, math.inf) * math.exp(rule.log_lenience + rule.tolerance)
    accept = ratio.pow(rule.scale).clamp(max=1.0)
    accept = torch.where((p > rule.min_target_prob) & (p > 0), accept, 0.0)
    if rule.log_lenience == math.inf:
        accept = torch.ones_like(p)
    kept = q * accept
    return kept + (1 - kept.sum()) * p


def test_the_law_used_here_is_the_documented_one() -> None:
    for p, q in PAIRS.values():
        p, q = torch.tensor(p).double(), torch.tensor(q).double()
        for log_lenience in (0.0, 0.5):
            overlap = torch.minimum(q, math.exp(log_lenience) * p)
            documented = overlap + (1 - overlap.sum()) * p
            torch.testing.assert_close(lenient_law(p, q, Lenient(log_lenience)), documented)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(
    "rule",
    [
        Lenient(0.0),
        Lenient(0.5),
        Lenient(-0.7),
        Lenient(math.inf),
        Lenient(0.0, min_target_prob=0.11),
        Lenient(0.3, scale=0.5),
        Lenient(0.0, scale=2.0, min_target_prob=0.045),
        Lenient(0.1, scale=0.5, tolerance=0.2),
        NoReuse(),
    ],
    ids=str,
)
def test_lenient(device, rule, pair) -> None:
    p, q = PAIRS[pair]
    draft_probs = torch.tensor(q)
    drafts = torch.multinomial(
        draft_probs, DRAWS, replacement=True, generator=torch.Generator().manual_seed(11)
    )
    tokens, accepted = verify_one(
        p, drafts, rule, _keys(12), draft_probs.log()[drafts], device=device
    )
    p, q = torch.tensor(p).double(), draft_probs.double()
    if isinstance(rule, NoReuse):
        assert not accepted.any()
        assert_law(tokens, p)
        return
    law = lenient_law(p, q, rule)
    if rule.log_lenience == math.inf:
        assert accepted.all()  # even what the target cannot produce: full reuse
    assert_law(tokens, law)


def test_lenient_at_lenience_one_is_biased(device) -> None:
    """The documented bias is there: the test above would not pass for an unbiased rule."""
    p, q = (torch.tensor(v) for v in PAIRS["far"])
    law = lenient_law(p.double(), q.double(), Lenient(0.0))
    assert 0.5 * float((law - p).abs().sum()) > 0.05


@pytest.mark.parametrize("pair", PAIRS)
def test_coupled_gives_the_target_law_under_any_draft(device, pair) -> None:
    p, q = PAIRS[pair]
    keys = _keys(21)
    for draft_probs in (
        torch.tensor(q),
        torch.nn.functional.one_hot(torch.tensor(len(p) - 1), len(p)).float(),
    ):
        drafts = torch.multinomial(
            draft_probs, DRAWS, replacement=True, generator=torch.Generator().manual_seed(22)
        )
        tokens, _ = verify_one(p, drafts, Coupled(), keys, device=device)
        assert_law(tokens, torch.tensor(p))


@pytest.mark.parametrize("pair", PAIRS)
def test_coupled_over_epochs_of_the_same_noise(device, pair) -> None:
    """Each epoch's marginal law is that epoch's target, though the draft was drawn with the very
    same noise."""
    p, q = PAIRS[pair]
    keys = _keys(31)
    tokens = ops.sample_tokens(
        _logits(q, DRAWS).to(device),
        keys=keys.to(device),
        positions=torch.full((DRAWS,), 5, device=device),
    ).token_ids.cpu()
    assert_law(tokens, torch.tensor(q))
    for step in (0.3, 0.7, 1.0):
        moved = [(1 - step) * b + step * a for a, b in zip(p, q, strict=True)]
        tokens, accepted = verify_one(moved, tokens, Coupled(), keys, position=5, device=device)
        assert_law(tokens, torch.tensor(moved))
    if pair == "near":
        assert float(accepted.float().mean()) > 0.9  # replay accepts far more than sum min(p, q)


def test_coupled_with_a_bonus_has_the_boosted_law(device) -> None:
    p, bonus, drafted = torch.tensor(PAIRS["near"][0]), 0.8, 2
    tokens, _ = verify_one(
        p.tolist(), torch.full((DRAWS,), drafted), Coupled(bonus), _keys(41), device=device
    )
    boosted = p.clone()
    boosted[drafted] *= math.exp(bonus)
    assert_law(tokens, boosted)


def coupled_law(p: list[float], q: list[float], bonus: float) -> torch.Tensor:
    """Law of `Coupled` with a bonus where the draft was drawn from q under the same noise.

    With e_v the exponential of the noise, j is drafted where e_j / q_j is the least of all e_v /
    q_v. It stays where e_j / (p_j e^bonus) is at most every other e_v / p_v. It makes room for k
    where e_k / p_k is at most that and every other; r is e_j / e_k.
    """
    num = len(p)
    law = torch.zeros(num, dtype=torch.float64)
    boost = math.exp(bonus)

    def over(a: float, b: float) -> float:
        return a / b if b > 0 else math.inf

    for j in range(num):
        if q[j] == 0:
            continue
        others = [v for v in range(num) if v != j]
        if p[j] > 0:
            law[j] += 1 / (1 + sum(max(q[v] / q[j], p[v] / (p[j] * boost)) for v in others))
        for k in others:
            low, high = over(p[j] * boost, p[k]), over(q[j], q[k])
            if p[k] == 0 or low >= high:
                continue
            rest = [(q[v] / q[j], p[v] / p[k]) for v in others if v != k]
            turns = [over(b, a) for a, b in rest]
            ends = sorted({low, high, *(t for t in turns if low < t < high)})
            for start, end in itertools.pairwise(ends):
                middle = start + 1 if end == math.inf else (start + end) / 2
                slope = 1 + sum(a for a, b in rest if a * middle > b)
                base = 1 + sum(b for a, b in rest if a * middle <= b)
                law[k] += (1 / (base + slope * start) - 1 / (base + slope * end)) / slope
    return law


BONUSES = (0.0, 0.05, 0.3, 1.0)


@pytest.mark.parametrize("pair", PAIRS)
def test_the_law_of_a_coupled_draft_and_its_bound(pair) -> None:
    """The closed form is a law, p without a tolerance and q without bounds; the documented bounds
    hold."""
    p, q = PAIRS[pair]
    target = torch.tensor(p).double()
    torch.testing.assert_close(coupled_law(p, q, 0.0), target, atol=1e-7, rtol=0)
    if min(p) > 0:
        draft = torch.tensor(q).double()
        torch.testing.assert_close(coupled_law(p, q, 40.0), draft, atol=1e-6, rtol=0)
    for bonus in BONUSES:
        law = coupled_law(p, q, bonus)
        assert abs(float(law.sum()) - 1.0) < 1e-6
        distance = 0.5 * float((law - target).abs().sum())
        boost = math.exp(bonus)
        near_ties = target * (1 - target) * (boost - 1) / (target + (1 - target) * boost)
        assert distance <= float(near_ties.sum()) + 1e-6
        assert float(near_ties.sum()) <= 1 - math.exp(-bonus) + 1e-6


@pytest.mark.parametrize("tolerance", BONUSES[1:])
@pytest.mark.parametrize("pair", ["near", "far", "p(y) = 0", "eight"])
def test_coupled_with_a_tolerance_has_its_law(device, pair, tolerance) -> None:
    p, q = PAIRS[pair]
    keys = _keys(61)
    drafts = ops.sample_tokens(
        _logits(q, DRAWS).to(device),
        keys=keys.to(device),
        positions=torch.full((DRAWS,), 5, device=device),
    ).token_ids.cpu()
    rule = Coupled(tolerance=tolerance)
    tokens, _ = verify_one(p, drafts, rule, keys, position=5, device=device)
    assert_law(tokens, coupled_law(p, q, tolerance))
    if pair in ("near", "eight"):  # the test can tell it from the law without a tolerance
        counts = torch.bincount(tokens.long(), minlength=len(p))
        assert p_value(counts, torch.tensor(p).double()) < 1e-6


@pytest.mark.parametrize("pair", PAIRS)
def test_a_lenient_tolerance_moves_the_law_by_no_more_than_its_bound(pair) -> None:
    p, q = (torch.tensor(values).double() for values in PAIRS[pair])
    for scale in (0.5, 1.0, 2.0):
        for tolerance in (0.01, 0.2, 1.0):
            with_it = lenient_law(p, q, Lenient(0.1, scale, tolerance=tolerance))
            without = lenient_law(p, q, Lenient(0.1, scale))
            distance = 0.5 * float((with_it - without).abs().sum())
            assert distance <= 1 - math.exp(-scale * tolerance) + 1e-9


@pytest.mark.parametrize("pair", PAIRS)
def test_one_hot_gives_the_target_law_under_any_draft(device, pair) -> None:
    p, _ = PAIRS[pair]
    for drafted in range(len(p)):
        keys = _keys(51 + drafted)
        tokens, accepted = verify_one(
            p, torch.full((DRAWS,), drafted), OneHot(), keys, device=device
        )
        assert_law(tokens, torch.tensor(p))
        assert_rate(accepted, p[drafted])


@pytest.mark.parametrize("rule", [Coupled(), OneHot()], ids=str)
def test_two_positions_are_jointly_right(device, rule) -> None:
    """Lossless rules: the pair of tokens at two positions has the product law, so neither noise nor
    decision leaks."""
    first, second = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    draws, keys = DRAWS, _keys(61).to(device)
    draft = torch.tensor([0, 2], device=device)
    logits = torch.stack([first, second, second]).log().repeat(draws, 1).to(device)
    got = ops.verify_prefix(
        logits,
        draft.repeat(draws),
        torch.arange(draws + 1, device=device) * 2,
        rule=rule,
        keys=keys,
    )
    accepted, following = got.accepted_lens, got.next_token_ids
    # Where the first token was replaced, the second is sampled as the engine would: at its own
    # position.
    resumed = ops.sample_tokens(
        second.log()[None].expand(draws, -1).to(device),
        keys=keys,
        positions=torch.ones(draws, dtype=torch.int64, device=device),
    ).token_ids
    token0 = torch.where(accepted >= 1, draft[0], following)
    token1 = torch.where(accepted == 2, draft[1], torch.where(accepted == 1, following, resumed))
    assert_law(token0 * 3 + token1, torch.outer(first, second).flatten())
    # The bonus token after two accepted ones is a plain draw too.
    assert_law(following[accepted == 2], second)


def test_the_replacement_does_not_know_why_it_was_drawn(device) -> None:
    """Lenient: given a rejection the next token has the full target law, whatever the threshold
    was."""
    p = PAIRS["near"][0]
    for draft_prob in (0.5, 0.9):  # rejects often, and nearly always
        drafts = torch.full((DRAWS,), 3)
        tokens, accepted = verify_one(
            p,
            drafts,
            Lenient(0.0),
            _keys(71),
            torch.full((DRAWS,), math.log(draft_prob)),
            device=device,
        )
        assert_rate(accepted, p[3] / draft_prob)
        assert_law(tokens[~accepted], torch.tensor(p))


@pytest.mark.slow
def test_laws_hold_under_temperature_and_filters(device) -> None:
    """q is of the sampling distribution too: a draft drawn with the same filters and accepted at p
    = q is lossless."""
    weights = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
    sampling = {"temperature": 0.8, "top_k": 4, "top_p": 0.9}
    kept = weights[:3].double().pow(1 / 0.8)
    law = torch.cat([kept / kept.sum(), torch.zeros(2).double()])
    logits = _logits(weights, DRAWS).to(device)
    old = ops.sample_tokens(
        logits,
        keys=_keys(81).to(device),
        positions=torch.zeros(DRAWS, dtype=torch.int64, device=device),
        **sampling,
    )
    assert_law(old.token_ids, law)
    cu = torch.arange(DRAWS + 1, device=device)
    for rule in (Lenient(0.0), Lenient(-1.0), Coupled(), OneHot()):
        got = ops.verify_prefix(
            logits,
            old.token_ids,
            cu,
            rule=rule,
            keys=_keys(82).to(device),
            draft_logprobs=old.logprobs,
            cu_logits_lens=cu,
            **sampling,
        )
        assert_law(torch.where(got.accepted_lens == 1, old.token_ids, got.next_token_ids), law)
