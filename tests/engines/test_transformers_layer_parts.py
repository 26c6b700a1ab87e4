"""The kernels between a decoder layer's matrix products, and which modules they stand in for."""

from __future__ import annotations

import sys

import pytest
import torch
from tiny_models import build

from spec_rollout.engines.transformers.layer_parts import (
    LayerParts,
    rms_norm,
    rotate_halves,
    silu_mul,
)

# 1 and 31: less than a vector; 96: whole vectors; 257: one element more than whole ones.
DIMS = [1, 31, 96, 257]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("rows", [0, 1, 700])
def test_rms_norm_is_its_definition(rows: int, dim: int) -> None:
    x, weight = 3 * random(rows, 1, dim), random(dim)
    exact = x.double()
    exact = weight * exact / (exact.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    actual = rms_norm(x, weight, 1e-6)
    assert actual.shape == x.shape
    torch.testing.assert_close(actual.double(), exact, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("rows", [0, 1, 700])
def test_silu_mul_is_its_definition(rows: int, dim: int) -> None:
    gate, up = 8 * random(rows, 1, dim), random(rows, 1, dim + 1)[..., :dim]
    exact = torch.nn.functional.silu(gate.double()) * up.double()
    # Without fused multiply-add the exponential of -40 is off by 40 roundings of its exponent.
    torch.testing.assert_close(silu_mul(gate, up).double(), exact, rtol=4e-6, atol=1e-12)


def test_silu_mul_at_the_ends() -> None:
    gate = torch.tensor([[0.0, -0.0, 100.0, -100.0, 3e38, -3e38, torch.nan, torch.inf]])
    actual = silu_mul(gate, torch.ones_like(gate))[0]
    assert actual[:2].tolist() == [0.0, 0.0]
    assert actual[2] == 100.0
    assert abs(actual[3]) < 1e-30
    assert actual[4] == gate[0, 4]
    assert actual[6].isnan()
    assert actual[7] == torch.inf
    assert actual[5].isfinite()


@pytest.mark.parametrize(("heads", "tokens", "head_dim"), [(4, 1, 32), (1, 5, 2), (3, 2, 18)])
def test_rotation_has_the_bits_of_transformers(heads: int, tokens: int, head_dim: int) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    rows = 300
    x = random(rows, tokens, heads, head_dim).transpose(1, 2)  # as projections come
    cos, sin = random(rows, tokens, head_dim), random(rows, tokens, head_dim + 2)[..., 2:]
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin)
    assert torch.equal(rotate_halves(x, cos, sin), expected)
    assert torch.equal(rotate_halves(x.contiguous(), cos, sin), expected)


def test_results_do_not_depend_on_the_batch() -> None:
    x, weight = random(64, 1, 96), random(96)
    for count in (1, 3, 16):
        assert torch.equal(rms_norm(x[:count], weight, 1e-6), rms_norm(x, weight, 1e-6)[:count])
        assert torch.equal(silu_mul(x[:count], x[:count]), silu_mul(x, x)[:count])


@pytest.mark.parametrize(
    ("name", "norms_per_layer", "mlps_per_layer", "num_rotary"),
    [("llama", 2, 1, 1), ("qwen3", 4, 1, 1), ("gpt2", 0, 0, 0)],
)
def test_known_parts_are_found(name, norms_per_layer, mlps_per_layer, num_rotary) -> None:
    model = build(name)
    parts = LayerParts(model)
    layers = model.config.num_hidden_layers
    final_norm = int(norms_per_layer > 0)
    assert parts.num_modules == layers * (norms_per_layer + mlps_per_layer) + final_norm
    assert parts.num_rotary == num_rotary


def test_installed_parts_are_used_and_gone_afterwards() -> None:
    model = build("llama")
    file = sys.modules[type(model).__module__]
    rotary, norm = file.apply_rotary_pos_emb, model.model.norm

    def interrupted() -> None:
        with LayerParts(model).installed():
            assert "forward" in vars(norm)
            assert file.apply_rotary_pos_emb is not rotary
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "forward" not in vars(norm)
    assert file.apply_rotary_pos_emb is rotary


def test_installed_parts_follow_the_weights() -> None:
    model = build("llama")
    norm, x = model.model.norm, random(2, 1, model.config.hidden_size)
    parts = LayerParts(model)
    with torch.no_grad():
        norm.weight.mul_(2.0)
    expected = norm(x)
    with torch.inference_mode(), parts.installed():
        torch.testing.assert_close(norm(x), expected)


def test_another_model_of_the_file_can_be_trained_meanwhile() -> None:
    model, other = build("llama"), build("llama")
    ids = torch.tensor([[3, 4, 5]])

    def gradient() -> torch.Tensor:
        other.zero_grad()
        other(ids, labels=ids).loss.backward()
        return other.model.layers[0].self_attn.q_proj.weight.grad.clone()

    expected = gradient()
    with LayerParts(model).installed():
        assert torch.equal(gradient(), expected)


class OffsetRMSNorm(torch.nn.Module):
    """Looks like an RMS norm, and is one with 1 + weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(8))
        self.variance_epsilon = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (1 + self.weight) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def test_what_computes_something_else_is_left_alone() -> None:
    gelu = build("llama").model.layers[0].mlp
    gelu.act_fn = torch.nn.GELU()
    replaced = build("llama").model.norm
    replaced.forward = replaced.forward
    for module in (OffsetRMSNorm(), gelu, replaced):
        assert LayerParts(module).num_modules == 0
