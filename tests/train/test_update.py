"""The policy update against a plain row-by-row computation with whole logits."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_batching import make_rollouts

from spec_rollout.config.sections import ModelConfig, TrainConfig
from spec_rollout.loading.policy import load_policy
from spec_rollout.train import algorithms
from spec_rollout.train.algorithms.advantages import per_token
from spec_rollout.train.forward import response_logits
from spec_rollout.train.update import DivergedError, PolicyUpdater, learning_rate, make_optimizer
from spec_rollout.train.value_head import ValueHead

TEMPERATURE = 0.8
GROUPS = [[0, 1, 2], [3, 5], []]  # row 4 had no reward, the last prompt none at all


@pytest.fixture(scope="module")
def policy(model_dir):
    return load_policy(ModelConfig(str(model_dir), device="cpu"))


@pytest.fixture
def model(policy):
    return copy.deepcopy(policy.model)


@pytest.fixture
def rollouts():
    return make_rollouts([3, 1, 7, 2, 5, 4], [4, 9, 1, 2, 8, 3], seed=1)


ADVANTAGES = torch.tensor([1.0, -0.5, -0.5, 0.7, 9.0, -0.7])


def plain_logprobs(model, rollouts, row):
    """One row alone, all logits, no padding. [response_len], differentiable."""
    prompt = rollouts.prompt_ids[rollouts.cu_prompt_lens[row] : rollouts.cu_prompt_lens[row + 1]]
    response = rollouts.response_ids[
        rollouts.cu_response_lens[row] : rollouts.cu_response_lens[row + 1]
    ]
    logits = model(torch.cat([prompt, response])[None].long()).logits[0, len(prompt) - 1 : -1]
    logp = torch.log_softmax(logits / TEMPERATURE, -1)
    return logp.gather(1, response[:, None].long()).squeeze(1)


def plain_loss(model, rollouts, old, rows, aggregation, reference=None, kl_coef=0.0):
    """The minibatch's loss written out token by token."""
    total = torch.zeros(())
    num_tokens = sum(int(rollouts.response_lens[r]) for r in rows)
    for r in rows:
        new = plain_logprobs(model, rollouts, r)
        ref = None if reference is None else plain_logprobs(reference, rollouts, r).detach()
        for t in range(len(new)):
            ratio = torch.exp(new[t] - old[int(rollouts.cu_response_lens[r]) + t])
            clipped = torch.clamp(ratio, 0.8, 1.3)
            loss = -torch.min(ratio * ADVANTAGES[r], clipped * ADVANTAGES[r])
            if ref is not None:
                loss = loss + kl_coef * (torch.exp(ref[t] - new[t]) - 1 - (ref[t] - new[t]))
            total = (
                total
                + loss
                / (
                    {
                        "token_mean": num_tokens,
                        "seq_mean": len(new) * len(rows),
                        "constant": 9 * len(rows),
                    }[aggregation]
                )
            )
    return total


def near_old(model, rollouts, spread=0.3):
    """Old log-probs near the model's, so that some ratios are clipped and some not."""
    rows = [plain_logprobs(model, rollouts, r).detach() for r in range(rollouts.batch)]
    noise = torch.randn(
        int(rollouts.cu_response_lens[-1]), generator=torch.Generator().manual_seed(5)
    )
    return torch.cat(rows) + spread * noise


def token_advantages(rollouts, advantages=ADVANTAGES):
    return algorithms.Advantages(per_token(advantages, rollouts.response_lens))


def make_updater(model, optimizer, config, reference=None, value_head=None, filtered=False):
    return PolicyUpdater(
        model,
        optimizer,
        config,
        algorithms.make(config),
        temperature=TEMPERATURE,
        max_tokens=9,
        reference=reference,
        value_head=value_head,
        filtered=filtered,
    )


def updated(model, rollouts, config, reference=None):
    """Model after one SGD update with learning rate 1, so that the change is minus the gradient."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    updater = make_updater(model, optimizer, config, reference)
    return updater.update(rollouts, token_advantages(rollouts), GROUPS, step=0)


def sgd_config(**changes):
    base = TrainConfig(lr=1.0, grad_clip=None, clip_low=0.2, clip_high=0.3, kl_coef=0.0)
    return replace(base, **changes)


def test_three_updates_give_the_numbers_that_they_always_gave(policy, model, rollouts):
    # Of the version in which update and formulas were one. Another processor sums in another order,
    # hence the tolerance; a term that is missing or weighted otherwise shows in the first digits.
    config = TrainConfig(
        lr=3e-3,
        minibatches=2,
        kl_coef=0.1,
        loss_aggregation="seq_mean",
        recompute_logprobs=True,
        micro_batch_tokens=20,
    )
    rewards = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.25, 1.0]], dtype=torch.float64)
    truncated = torch.zeros(6, dtype=torch.bool)
    inputs = algorithms.AdvantageInputs(rewards, rollouts.response_lens, truncated, 12)
    trained = algorithms.make(config).advantages(inputs)
    updater = make_updater(model, make_optimizer(model, config), config, policy.model)
    names = ("loss", "grad_norm", "entropy", "approx_kl", "clip_fraction", "kl")
    expected = [
        (-0.0112217, 5.310462, 3.445766, 0.01467581, 1 / 9, 0.01498128),
        (0.1026301, 6.022796, 3.418941, 0.02359150, 2 / 9, 1.385536),
        (0.1759946, 2.658060, 3.308370, 0.01640598, 1 / 9, 3.307825),
    ]
    for step, values in enumerate(expected):
        row = updater.update(rollouts, trained, [[0, 1, 2], [3, 4, 5]], step=step).as_row()
        assert [row[name] for name in names] == pytest.approx(values, rel=2e-3), step


def test_what_an_algorithm_needs_must_be_there(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="reference: expected a model, which GRPO needs"):
        make_updater(model, optimizer, sgd_config(kl_coef=0.1))
    config = sgd_config()
    with_values = SimpleNamespace(needs=algorithms.Needs(values=True))
    with pytest.raises(ValueError, match="value_head: expected a model, which SimpleNamespace"):
        PolicyUpdater(model, optimizer, config, with_values, temperature=1.0, max_tokens=9)


def test_there_must_be_an_advantage_for_every_token(model, rollouts):
    updater = make_updater(model, torch.optim.SGD(model.parameters(), lr=1.0), sgd_config())
    with pytest.raises(ValueError, match=r"advantages: expected shape \[27\] .* got \[6\]"):
        updater.update(rollouts, algorithms.Advantages(ADVANTAGES), GROUPS, step=0)


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean", "constant"])
@pytest.mark.parametrize("micro_batch_tokens", [1, 20, 1000])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_gradient_is_the_plain_one(model, rollouts, aggregation, micro_batch_tokens, kl_coef):
    reference = None
    if kl_coef:
        reference = copy.deepcopy(model).requires_grad_(False)
        with torch.no_grad():
            reference.lm_head.weight.mul_(1.2)
    rollouts = replace(rollouts, logprobs=near_old(model, rollouts))
    before = copy.deepcopy(model)
    rows = [r for g in GROUPS for r in g]
    loss = plain_loss(before, rollouts, rollouts.logprobs, rows, aggregation, reference, kl_coef)
    loss.backward()
    config = sgd_config(
        loss_aggregation=aggregation, micro_batch_tokens=micro_batch_tokens, kl_coef=kl_coef
    )
    result = updated(model, rollouts, config, reference)
    assert result.loss == pytest.approx(loss.item(), rel=1e-4, abs=1e-5)
    assert 0 < result.means["clip_fraction"] < 1
    norm = 0.0
    for (name, new), old in zip(model.named_parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(
            old.detach() - new.detach(),
            old.grad,
            rtol=2e-3,
            atol=3e-5,
            msg=lambda m, n=name: f"{n}: {m}",
        )
        norm += float(old.grad.square().sum())
    assert result.grad_norm == pytest.approx(math.sqrt(norm), rel=1e-4)
    assert result.num_tokens == int(rollouts.response_lens[rows].sum())
    assert ("kl" in result.means) == bool(kl_coef)


def test_the_default_dtype_does_not_matter(policy, rollouts, other_dtype):
    config = sgd_config(loss_aggregation="seq_mean")
    models = [copy.deepcopy(policy.model) for _ in range(2)]
    losses = [updated(models[0], rollouts, config).as_row()["loss"]]
    with other_dtype():
        assert {p.dtype for p in ValueHead(models[1]).parameters()} == {torch.float32}
        losses.append(updated(models[1], rollouts, config).as_row()["loss"])
    assert losses[0] == losses[1]
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_skipping_zero_advantages_keeps_the_gradient(policy, rollouts):
    advantages = ADVANTAGES.clone()
    advantages[[1, 3]] = 0.0
    models = [copy.deepcopy(policy.model) for _ in range(2)]
    counts = []
    for model, skip in zip(models, (False, True), strict=True):
        config = sgd_config(skip_zero_advantage=skip)
        updater = make_updater(model, torch.optim.SGD(model.parameters(), lr=1.0), config)
        per = token_advantages(rollouts, advantages)
        counts.append(updater.update(rollouts, per, GROUPS, step=0).num_tokens)
    assert counts == [27 - 8, 27 - 8 - 9 - 2]
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_minibatches_are_separate_steps_over_whole_groups(model, rollouts):
    rollouts = replace(rollouts, logprobs=near_old(model, rollouts, 0.0))
    expected = copy.deepcopy(model)
    for rows in GROUPS[:2]:
        expected.zero_grad()
        plain_loss(expected, rollouts, rollouts.logprobs, rows, "token_mean").backward()
        with torch.no_grad():
            for p in expected.parameters():
                p -= p.grad
    result = updated(model, rollouts, sgd_config(minibatches=3))
    assert result.means["approx_kl"] > 1e-4  # the second minibatch is off-policy
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=3e-5)


@pytest.mark.parametrize(
    ("minibatches", "sizes"), [(1, [5]), (2, [2, 3]), (4, [1, 1, 1, 2]), (5, [1] * 5), (9, [1] * 5)]
)
def test_there_are_as_many_minibatches_as_asked_for(model, rollouts, minibatches, sizes):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    updater = make_updater(model, optimizer, sgd_config(lr=1e-6, minibatches=minibatches))
    seen = []
    accumulate = updater._accumulate

    def noted(*args, **kwargs):
        seen.append(args[5])
        return accumulate(*args, **kwargs)

    updater._accumulate = noted
    groups = [[row] for row in range(5)]
    updater.update(rollouts, token_advantages(rollouts), groups, step=0)
    assert [len(rows) for rows in seen] == sizes
    assert [row for rows in seen for row in rows] == list(range(5))
    assert updater.num_begun == len(sizes)


def test_the_gap_is_that_of_the_first_minibatch_with_rows(model, rollouts):
    gaps = [
        (plain_logprobs(model, rollouts, row).detach() - logprobs).abs()
        for row, logprobs in enumerate(rollouts.logprobs.split(rollouts.response_lens.tolist()))
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    updater = make_updater(model, optimizer, sgd_config(minibatches=3))
    per = token_advantages(rollouts)
    result = updater.update(rollouts, per, [[], [0, 1, 2], [3, 5]], step=0)
    assert result.logprob_gap == pytest.approx(float(torch.cat(gaps[:3]).mean()), rel=1e-4)
    assert updater.num_begun == 2
    nothing = updater.update(rollouts, per, [[], [], []], step=1).as_row()
    assert updater.num_begun == 2
    assert nothing["num_tokens"] == nothing["loss"] == nothing["grad_norm"] == 0
    means = ("logprob_gap", "entropy", "approx_kl", "clip_fraction")
    assert all(math.isnan(nothing[name]) for name in means)


def test_recomputed_old_logprobs_replace_the_engines(model, rollouts):
    # Whatever the engine said, the first minibatch is then on-policy: ratio 1, nothing clipped.
    rollouts = replace(rollouts, logprobs=rollouts.logprobs - 3.0)
    engine = copy.deepcopy(model)
    off = updated(engine, rollouts, sgd_config())
    on = updated(model, rollouts, sgd_config(recompute_logprobs=True))
    assert off.means["approx_kl"] > 0.1
    assert on.means["approx_kl"] == pytest.approx(0.0, abs=1e-6)
    assert on.means["clip_fraction"] == 0.0
    assert on.logprob_gap == pytest.approx(off.logprob_gap, rel=1e-4)
    assert on.logprob_gap > 0.5  # the difference stays visible


def test_gradient_clipping(policy, rollouts):
    model, before = copy.deepcopy(policy.model), policy.model
    result = updated(model, rollouts, sgd_config(grad_clip=0.01))
    change = sum(
        float((a - b).detach().square().sum())
        for a, b in zip(model.parameters(), before.parameters(), strict=True)
    )
    assert result.grad_norm > 0.01
    assert math.sqrt(change) == pytest.approx(0.01, rel=1e-3)


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(policy, rollouts):
    model = copy.deepcopy(policy.model)
    updater = make_updater(model, torch.optim.SGD(model.parameters(), lr=1.0), sgd_config())
    result = updater.update(
        rollouts, algorithms.Advantages(torch.full((27,), 3e38)), GROUPS, step=0
    )
    assert result.num_skipped_updates == 1
    for a, b in zip(model.parameters(), policy.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_ten_updates_without_a_finite_gradient_are_no_accident(policy, rollouts):
    model = copy.deepcopy(policy.model)
    config = sgd_config(minibatches=3, lr=1e-9)
    updater = make_updater(model, torch.optim.SGD(model.parameters(), lr=1e-9), config)
    broken = algorithms.Advantages(torch.full((27,), 3e38))
    half_broken = broken.advantages.clone()
    half_broken[rollouts.cu_response_lens[GROUPS[1][0]] :] = 0.5  # of the second minibatch

    def update(advantages, step):
        updater.update(rollouts, algorithms.Advantages(advantages), GROUPS, step=step)

    for step in range(9):
        update(broken.advantages, step)
    update(half_broken, 9)
    begun = updater.num_begun
    assert begun == 1
    for step in range(10, 19):
        update(broken.advantages, step)
    with pytest.raises(
        DivergedError,
        match=r"train: expected finite gradients, got none in the last 10 .* step 20:",
    ):
        update(broken.advantages, 19)
    assert updater.num_begun == begun


def test_weights_that_are_not_finite_are_named(policy, rollouts):
    model = copy.deepcopy(policy.model)
    updater = make_updater(model, torch.optim.SGD(model.parameters(), lr=1e30), sgd_config(lr=1e38))
    large = algorithms.Advantages(1e3 * token_advantages(rollouts).advantages)
    with pytest.raises(
        DivergedError,
        match=r"after the update of step 4, got .* in model\.[a-z_0-9.]+ \(\d+ of \d+ n",
    ):
        updater.update(rollouts, large, GROUPS, step=3)
    assert updater.num_begun == 1


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_logprobs_that_are_not_finite_are_refused(model, rollouts, value):
    logprobs = rollouts.logprobs.clone()
    logprobs[-1] = value
    with pytest.raises(
        ValueError, match=f"rollouts.logprobs: expected finite.*got {value} in row 5"
    ):
        updated(model, replace(rollouts, logprobs=logprobs), sgd_config())


def test_tokens_that_a_filter_leaves_out_are_trained_on_with_recomputed_logprobs(policy, rollouts):
    """A rule kept them unseen; the trainer's distribution has them."""
    results = []
    for value in (float(rollouts.logprobs[0]), -math.inf):
        logprobs = rollouts.logprobs.clone()
        logprobs[0] = value
        model = copy.deepcopy(policy.model)
        config = sgd_config(recompute_logprobs=True)
        result = updated(model, replace(rollouts, logprobs=logprobs), config)
        results.append((result, model.state_dict()))
    (whole, weights), (filtered, others) = results
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    first = abs(float(plain_logprobs(policy.model, rollouts, 0)[0].detach() - rollouts.logprobs[0]))
    num = filtered.num_tokens
    expected = (whole.logprob_gap * num - first) / (num - 1)
    assert filtered.logprob_gap == pytest.approx(expected, rel=1e-4)
    assert replace(filtered, logprob_gap=0.0) == replace(whole, logprob_gap=0.0)


def test_logprobs_of_a_filtered_distribution_are_not_compared(policy, rollouts):
    """What is between them and the trainer's is what the filter keeps, and no rounding."""
    whole, filtered = (
        make_updater(
            model, torch.optim.SGD(model.parameters(), lr=1.0), sgd_config(), filtered=filtered
        ).update(rollouts, token_advantages(rollouts), GROUPS, step=0)
        for filtered in (False, True)
        for model in [copy.deepcopy(policy.model)]
    )
    assert math.isnan(filtered.logprob_gap)
    assert replace(filtered, logprob_gap=0.0) == replace(whole, logprob_gap=0.0)


def test_what_is_no_number_is_refused_with_recomputed_logprobs_too(model, rollouts):
    logprobs = rollouts.logprobs.clone()
    logprobs[-1] = math.nan
    config = sgd_config(recompute_logprobs=True)
    with pytest.raises(ValueError, match=r"rollouts\.logprobs: .* the engine, got nan in row 5"):
        updated(model, replace(rollouts, logprobs=logprobs), config)
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with pytest.raises(
        ValueError, match=r"train\.recompute_logprobs: .* the trainer, got nan in row 0"
    ):
        updated(model, rollouts, config)


def test_only_chosen_positions_reach_the_head(policy):
    model = policy.model
    ids = torch.randint(3, 40, (3, 7), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 5, 13, 14])
    seen = []
    handle = model.get_output_embeddings().register_forward_hook(
        lambda _m, a, _o: seen.append(a[0].shape)
    )
    with torch.no_grad():
        some = response_logits(model, ids, positions)
        whole = model(ids).logits.flatten(0, 1)
    handle.remove()
    torch.testing.assert_close(some, whole[positions], rtol=1e-5, atol=1e-5)
    assert [s[:2].numel() for s in seen] == [4, 21]


def test_weight_decay_spares_vectors(model):
    optimizer = make_optimizer(model, TrainConfig(weight_decay=0.1))
    decayed, spared = optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert all(p.dim() >= 2 for p in decayed["params"])
    assert all(p.dim() < 2 for p in spared["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


def test_a_value_head_has_its_own_rate_and_its_own_clip(model, rollouts):
    config = TrainConfig("ppo", lr=0.25, critic_lr=4.0, warmup_steps=2, grad_clip=1e-3)
    head = ValueHead(model)
    optimizer = make_optimizer(model, config, head)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25, 4.0, 4.0]
    optimizer = torch.optim.SGD(
        [
            {"params": list(model.parameters()), "base_lr": 0.25},
            {"params": list(head.parameters()), "base_lr": 4.0},
        ],
        lr=9.0,
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    updater = make_updater(model, optimizer, config, value_head=head)
    values = updater.values(rollouts)
    assert torch.equal(values, torch.zeros_like(rollouts.logprobs))
    advantages = per_token(ADVANTAGES, rollouts.response_lens)
    trained = algorithms.Advantages(advantages, torch.ones_like(values))
    result = updater.update(rollouts, trained, GROUPS, step=0, values=values)
    assert (result.lr, result.means["value_loss"]) == (0.125, pytest.approx(0.5))
    # Gradients are clipped to 1e-3 each; half of the rates in the first of two warm-up steps.
    moved = torch.cat([(p.detach() - before[n]).flatten() for n, p in model.named_parameters()])
    assert float(moved.norm()) == pytest.approx(0.125e-3, rel=1e-2)
    head_moved = torch.cat([p.detach().flatten() for p in head.parameters()])
    assert float(head_moved.norm()) == pytest.approx(2e-3, rel=1e-2)


def test_warmup():
    config = TrainConfig(lr=1.0, warmup_steps=4)
    assert [learning_rate(config, s) for s in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert learning_rate(TrainConfig(lr=0.5), 0) == 0.5
