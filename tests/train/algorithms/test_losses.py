"""The policy loss against numbers worked out by hand.

Its gradient against closed form and finite differences.
"""

from __future__ import annotations

import math

import pytest
import torch

from spec_rollout.train.algorithms.base import LossInputs, LossOutputs
from spec_rollout.train.algorithms.losses import (
    k3,
    logprobs_and_entropy,
    policy_loss,
    token_weights,
)

LN = math.log


def loss_of(logprobs, old, advantages, weights, ref_logprobs=None, **settings) -> LossOutputs:
    return policy_loss(LossInputs(logprobs, old, advantages, weights, ref_logprobs), **settings)


def tensors(*rows):
    return [torch.tensor(row) for row in rows]


def test_hand_computed_loss_and_gradient():
    # ratio 1.5, 0.5, 1.5, 0.5, 1.1 with clip range [0.8, 1.3]
    #   A = +2: min(3.0, 2.6) = 2.6   clipped, no gradient
    #   A = +2: min(1.0, 1.6) = 1.0   gradient -w A r = -w * 1.0
    #   A = -1: min(-1.5, -1.3) = -1.5  gradient w * 1.5
    #   A = -1: min(-0.5, -0.8) = -0.8  clipped, no gradient
    #   A = +1: min(1.1, 1.1) = 1.1   gradient -w * 1.1
    old = torch.log(torch.tensor([0.2, 0.2, 0.2, 0.2, 0.2]))
    new = torch.log(torch.tensor([0.3, 0.1, 0.3, 0.1, 0.22])).requires_grad_()
    advantages, weights = tensors([2.0, 2.0, -1.0, -1.0, 1.0], [0.1, 0.2, 0.3, 0.4, 0.5])
    out = loss_of(new, old, advantages, weights, clip_low=0.2, clip_high=0.3)
    expected = -(0.1 * 2.6 + 0.2 * 1.0 - 0.3 * 1.5 - 0.4 * 0.8 + 0.5 * 1.1)
    assert out.loss.item() == pytest.approx(expected, abs=1e-6)
    out.loss.backward()
    torch.testing.assert_close(
        new.grad, torch.tensor([0.0, -0.2 * 1.0, 0.3 * 1.5, 0.0, -0.5 * 1.1])
    )
    assert int(out.sums["clip_fraction"]) == 2
    # k3 of KL(old || new): r - 1 - ln r
    kl = sum(r - 1 - LN(r) for r in (1.5, 0.5, 1.5, 0.5, 1.1))
    assert float(out.sums["approx_kl"]) == pytest.approx(kl, abs=1e-5)
    assert "kl" not in out.sums  # without a reference


def test_on_policy_gradient_is_reinforce():
    logprobs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    advantages, weights = tensors([1.5, -0.5, 0.0], [0.2, 0.3, 0.5])
    out = loss_of(logprobs, logprobs.detach(), advantages, weights)
    out.loss.backward()
    torch.testing.assert_close(logprobs.grad, -weights * advantages)
    assert int(out.sums["clip_fraction"]) == 0
    assert float(out.sums["approx_kl"]) == 0.0


def test_reference_kl_hand_computed():
    # policy 0.5, reference 0.25: x = ln(0.5), e^x - 1 - x = 0.5 - 1 + ln 2; derivative by ln p: 1 -
    # e^x = 0.5.
    logprobs = torch.tensor([LN(0.5)], requires_grad=True)
    zero, one = torch.zeros(1), torch.ones(1)
    out = loss_of(
        logprobs, logprobs.detach(), zero, one, ref_logprobs=torch.tensor([LN(0.25)]), kl_coef=0.1
    )
    assert out.loss.item() == pytest.approx(0.1 * (LN(2) - 0.5), abs=1e-7)
    assert float(out.sums["kl"]) == pytest.approx(LN(2) - 0.5, abs=1e-7)
    out.loss.backward()
    assert float(logprobs.grad) == pytest.approx(0.1 * 0.5, abs=1e-7)


def test_gradient_by_finite_differences():
    generator = torch.Generator().manual_seed(3)

    def draw(n):
        return torch.randn(n, generator=generator, dtype=torch.float64)

    # Ratios e^(0.15 z) straddle the clip range; none within 1e-3 of an edge, where the loss has a
    # kink.
    old, ref, advantages = -2 + draw(40), -2 + draw(40), draw(40)
    new = old + 0.15 * draw(40)
    ratio = (new - old).exp()
    assert float(torch.minimum((ratio - 0.8).abs(), (ratio - 1.28).abs()).min()) > 1e-3
    assert 0 < int(((ratio < 0.8) | (ratio > 1.28)).sum()) < 40
    weights = torch.rand(40, generator=generator, dtype=torch.float64)

    def loss(values):
        settings = {"clip_low": 0.2, "clip_high": 0.28, "ref_logprobs": ref, "kl_coef": 0.3}
        return loss_of(values, old, advantages, weights, **settings).loss

    assert torch.autograd.gradcheck(loss, (new.clone().requires_grad_(),), eps=1e-6, atol=1e-7)


def test_extreme_ratios_stay_finite():
    old = torch.tensor([-500.0, -0.1, -500.0])
    new = torch.tensor([-0.1, -500.0, -0.1], requires_grad=True)
    out = loss_of(new, old, torch.tensor([1.0, 1.0, -1.0]), torch.ones(3))
    out.loss.backward()
    assert math.isfinite(out.loss.item())
    assert bool(torch.isfinite(new.grad).all())


def test_token_weights_hand_computed():
    lens = torch.tensor([1, 3])
    torch.testing.assert_close(token_weights(lens, "token_mean", 9), torch.tensor([0.25, 0.25]))
    torch.testing.assert_close(token_weights(lens, "seq_mean", 9), torch.tensor([0.5, 1 / 6]))
    # Dr. GRPO: 2 responses of at most 9 tokens.
    torch.testing.assert_close(token_weights(lens, "constant", 9), torch.tensor([1 / 18, 1 / 18]))
    for name in ("token_mean", "seq_mean"):
        assert float((token_weights(lens, name, 9) * lens).sum()) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="aggregation: expected"):
        token_weights(lens, "mean", 9)


def test_k3_is_an_unbiased_estimate_of_kl():
    p, q = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.3, 0.3, 0.4]).double()
    expected = (p * (p / q).log()).sum()  # KL(p || q), sampled from p
    torch.testing.assert_close((p * k3((q / p).log())).sum(), expected)
    assert bool((k3(torch.linspace(-3, 3, 101)) >= 0).all())


def test_logprobs_and_entropy_hand_computed():
    # Temperature 0.5 squares the probabilities: (1, 3) / 4 -> (1, 9) / 10.
    logits = torch.tensor([[LN(1.0), LN(3.0)], [0.0, 0.0], [0.0, -math.inf]], requires_grad=True)
    logprobs, entropy = logprobs_and_entropy(logits, torch.tensor([1, 0, 0]), 0.5)
    torch.testing.assert_close(logprobs, torch.tensor([LN(0.9), LN(0.5), 0.0]))
    torch.testing.assert_close(
        entropy, torch.tensor([-(0.1 * LN(0.1) + 0.9 * LN(0.9)), LN(2.0), 0.0])
    )
    assert not entropy.requires_grad


def test_shape_mistakes_are_named():
    x = torch.zeros(3)
    with pytest.raises(ValueError, match=r"advantages: expected shape \[3\]"):
        loss_of(x, x, torch.zeros(2), x)
    with pytest.raises(ValueError, match="ref_logprobs: expected shape"):
        loss_of(x, x, x, x, kl_coef=0.1)
