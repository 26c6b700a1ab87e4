"""Corrections for reused tokens against numbers worked out by hand, and in whole updates."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from test_update import (
    ADVANTAGES,
    GROUPS,
    make_updater,
    model,
    near_old,
    policy,
    rollouts,
    sgd_config,
    token_advantages,
)
from whole_runs import read_rows

from spec_rollout.config.sections import ConfigError
from spec_rollout.train.algorithms.base import LossInputs
from spec_rollout.train.algorithms.losses import policy_loss
from spec_rollout.train.corrections import clipped_behaviour, origins_of, truncated
from spec_rollout.train.trainer import run

__all__ = ["model", "policy", "rollouts"]  # fixtures

LN = math.log


def logs(*probabilities: float) -> torch.Tensor:
    return torch.log(torch.tensor(probabilities))


REUSED = torch.tensor([True, True, False, True])
OLD, BEHAVIOUR = logs(0.4, 0.2, 0.5, 0.9), logs(0.2, 0.4, 0.1, 0.1)


def test_clipped_behaviour_takes_the_log_probs_that_drew_reused_tokens() -> None:
    expected = logs(0.2, 0.4, 0.5, 0.1)
    torch.testing.assert_close(clipped_behaviour(OLD, BEHAVIOUR, REUSED), expected)


def test_truncated_weights_are_capped_ratios() -> None:
    # Ratios 2, 0.5, (fresh) and 9, at most 3.
    weights = truncated(OLD, BEHAVIOUR, REUSED, 3.0)
    torch.testing.assert_close(weights, torch.tensor([2.0, 0.5, 1.0, 3.0]))
    never = truncated(torch.tensor([-math.inf]), torch.zeros(1), torch.tensor([True]), 2.0)
    assert never.tolist() == [0.0]


def test_truncated_weights_give_the_expectation_where_drafts_are_kept_unseen() -> None:
    drawn_by, now = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.3, 0.3, 0.4])
    weights = truncated(now.log(), drawn_by.log(), torch.ones(3, dtype=torch.bool), 100.0)
    torch.testing.assert_close(drawn_by * weights, now)
    # What passed the test of a lenience of 1 counts less.
    tested = torch.minimum(drawn_by, now) * weights
    torch.testing.assert_close(tested, torch.minimum(now, now**2 / drawn_by))


def test_importance_weighs_the_policy_loss_and_not_the_kl() -> None:
    logprobs = logs(0.5, 0.5).requires_grad_()
    advantages, weights = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.5])
    inputs = LossInputs(
        logprobs, logprobs.detach(), advantages, weights, logs(0.25, 0.25),
        importance=torch.tensor([3.0, 0.25]),
    )  # fmt: skip
    out = policy_loss(inputs, kl_coef=0.1)
    kl = LN(2) - 0.5
    assert out.loss.item() == pytest.approx(0.5 * (-3.0 + 0.5) + 0.1 * kl)
    out.loss.backward()
    # -w * importance * A, and 0.1 * w * (1 - e^x) = 0.1 * 0.5 * 0.5 of the KL.
    torch.testing.assert_close(logprobs.grad, torch.tensor([-1.475, 0.275]))
    with pytest.raises(ValueError, match=r"importance: expected shape \[2\]"):
        policy_loss(replace(inputs, importance=torch.ones(3)))


def test_what_drew_the_tokens_must_be_known(rollouts) -> None:
    with pytest.raises(ValueError, match=r"rollouts\.behaviour_logprobs: expected them"):
        origins_of(rollouts, "truncated")


def _known(model, rollouts):
    """Rollouts whose old log-probs are near the model's, and every second token reused."""
    old = near_old(model, rollouts, spread=0.05)
    n = old.numel()
    return replace(
        rollouts,
        logprobs=old,
        behaviour_logprobs=old + 0.4 * torch.randn(n, generator=torch.Generator().manual_seed(8)),
        ages=(torch.arange(n) % 2).to(torch.int16),
    )


def _gradient(model, rollouts, config):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    updater = make_updater(model, torch.optim.SGD(model.parameters(), lr=1.0), config)
    updater.update(rollouts, token_advantages(rollouts), GROUPS, step=0)
    return {name: before[name] - p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("correction", ["none", "clipped_behaviour", "truncated"])
def test_an_update_has_the_gradient_of_its_formula(policy, model, rollouts, correction) -> None:
    from test_update import plain_logprobs

    rollouts = _known(model, rollouts)
    gradient = _gradient(model, rollouts, sgd_config(correction=correction, correction_cap=1.2))
    plain = policy.model
    total, count = torch.zeros(()), 0
    for row in (r for group in GROUPS for r in group):
        new = plain_logprobs(plain, rollouts, row)
        for t, value in enumerate(new):
            place = int(rollouts.cu_response_lens[row]) + t
            old, drawn = rollouts.logprobs[place], rollouts.behaviour_logprobs[place]
            weight = 1.0
            if rollouts.ages[place]:
                if correction == "truncated":
                    weight = min(1.2, math.exp(old - drawn))
                elif correction == "clipped_behaviour":
                    old = drawn
            ratio, advantage = torch.exp(value - old), ADVANTAGES[row]
            clipped = torch.clamp(ratio, 0.8, 1.3)
            total = total - weight * torch.min(ratio * advantage, clipped * advantage)
            count += 1
    plain.zero_grad()
    (total / count).backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad, atol=2e-6, rtol=2e-4)
    plain.zero_grad()


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_lossless_rule_needs_no_correction(make_config) -> None:
    for rule in ("coupled", "one_hot", "none"):
        with pytest.raises(ConfigError, match=r"train\.correction: expected 'none' with"):
            make_config(train={"correction": "truncated"}, rollout={"rule": rule})
    rows = {}
    for correction in ("none", "truncated", "clipped_behaviour"):
        config = make_config(
            train={"correction": correction, "max_steps": 4},
            rollout={"rule": "lenient"},
            eval={"num_train_prompts": 0},
            log={"run_dir": f"{make_config().log.run_dir}-{correction}"},
        )
        run(config)
        rows[correction] = read_rows(config.log.run_dir)
    losses = [[row["loss"] for row in given] for given in rows.values()]
    assert losses[0][:2] == losses[1][:2] == losses[2][:2]  # nothing is reused yet
    assert len({given[2] for given in losses}) == 3
