"""bfloat16 arithmetic over float32 weights, and layers computed again in the backward pass."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.utils.checkpoint
from test_batching import make_rollouts
from tiny_models import build
from whole_runs import read_rows

from spec_rollout.config.sections import ConfigError, TrainConfig
from spec_rollout.loading.policy import Policy
from spec_rollout.train import algorithms, checks, memory
from spec_rollout.train.algorithms.advantages import per_token
from spec_rollout.train.forward import padded_gap
from spec_rollout.train.trainer import run
from spec_rollout.train.update import PolicyUpdater, make_optimizer

GROUPS = [[0, 1, 2], [3, 4, 5]]
ADVANTAGES = torch.tensor([1.0, -0.5, -0.5, 0.7, -0.2, -0.7])


def gradients(model, **settings):
    """Of one update, by name; the optimizer takes no step."""
    rollouts = make_rollouts([3, 1, 7, 2, 5, 4], [4, 9, 1, 2, 8, 3], seed=1)
    config = TrainConfig(kl_coef=0.0, lr=1e-3, grad_clip=None, **settings)
    optimizer = make_optimizer(model, config)
    found = {}

    def step():
        found.update({name: p.grad.clone() for name, p in model.named_parameters()})

    optimizer.step = step
    updater = PolicyUpdater(
        model, optimizer, config, algorithms.make(config), temperature=1.0, max_tokens=9
    )
    advantages = per_token(ADVANTAGES, rollouts.response_lens)
    updater.update(rollouts, algorithms.base.Advantages(advantages), GROUPS, step=0)
    return found


def seen_dtypes(model):
    """Of the outputs of the layers' projections, while an update runs."""
    seen = set()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _m, _i, out: seen.add(out.dtype))
    return seen


def test_recomputed_layers_give_the_same_gradients(monkeypatch):
    model = build("qwen3", vocab_size=512)
    plain = gradients(copy.deepcopy(model))
    calls = []

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return torch.utils.checkpoint.checkpoint(*args, **kwargs)

    monkeypatch.setattr(memory, "checkpoint", counted)
    other = gradients(model, gradient_checkpointing=True)
    assert len(calls) == 2  # layers, in one micro-batch
    assert plain.keys() == other.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(other[name], gradient, msg=lambda m, n=name: f"{n}: {m}")
    assert not any(module.training for module in model.modules())


def test_dropout_stays_off_in_recomputed_layers():
    model = build(
        "gpt2", vocab_size=512, resid_pdrop=0.5, attn_pdrop=0.5
    )  # in modules of their own
    memory.check_recomputing(model, TrainConfig())
    plain = gradients(copy.deepcopy(model))
    other = gradients(model, gradient_checkpointing=True)
    for name, gradient in plain.items():
        torch.testing.assert_close(other[name], gradient)


def test_a_layer_that_would_drop_out_by_itself_is_refused():
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=32, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.5, init_std=0.3,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"gradient_checkpointing: expected false .* dropout"):
        memory.check_recomputing(OPTForCausalLM(config).eval(), TrainConfig())


def test_products_are_in_bfloat16_over_float32_weights():
    model = build("qwen3", vocab_size=512)
    plain = gradients(copy.deepcopy(model))
    seen = seen_dtypes(model)
    other = gradients(model, compute_dtype="bfloat16", gradient_checkpointing=True)
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for name, gradient in plain.items():
        assert other[name].dtype == torch.float32
        gap = float((other[name] - gradient).norm() / gradient.norm())
        assert 0 < gap < 0.05, name


@pytest.mark.parametrize(
    ("compute_dtype", "dtype"), [(None, torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_a_model_is_checked_in_what_training_computes_in(compute_dtype, dtype, monkeypatch):
    """Flash attention takes nothing but 16 bits."""
    told = []
    plain = checks.check_padded_rows

    def check_padded_rows(*args, is_16_bit):
        told.append(is_16_bit)
        plain(*args, is_16_bit=is_16_bit)

    monkeypatch.setattr(checks, "check_padded_rows", check_padded_rows)
    model = build("llama", vocab_size=512)
    seen = seen_dtypes(model)
    config = TrainConfig(compute_dtype=compute_dtype, gradient_checkpointing=True)
    checks.check_forward(Policy(model, None, (), 512, 128), config)
    assert seen == {dtype}
    assert told == [compute_dtype is not None]
    seen.clear()
    memory.check_recomputing(model, config)
    assert seen == {dtype}
    assert not any(module.training for module in model.modules())
    gaps = [padded_gap(model, 128, is_16_bit=is_16_bit).tolerance for is_16_bit in (False, True)]
    assert gaps[0] < gaps[1]


@pytest.mark.slow
def test_a_run_with_both_learns(make_config):
    settings = {"compute_dtype": "bfloat16", "gradient_checkpointing": True}
    config = make_config(train={**settings, "epochs": 6, "lr": 1e-2})
    run(config)
    rows = read_rows(config.log.run_dir)
    assert rows[-1]["reward"] > rows[1]["reward"] + 0.1
