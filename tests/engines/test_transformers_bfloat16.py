"""The embedded engine in bfloat16: the same bits whatever the batch, where the machine's products
allow it; measured rounding where they do not."""

from __future__ import annotations

import logging

import pytest
import torch
from tiny_models import (
    SAMPLING,
    assert_same,
    build,
    drafts_of,
    perturbed,
    random_requests,
    responses,
    with_drafts,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from spec_rollout.acceptance import AcceptanceRule, Coupled, Lenient, NoReuse
from spec_rollout.engines import TransformersEngine
from spec_rollout.engines.transformers.attention import batch_invariant_attention, span_mask
from spec_rollout.engines.transformers.layer_parts import (
    LayerParts,
    rms_norm,
    rotate_halves,
    silu_mul,
)
from spec_rollout.engines.transformers.row_counts import row_counts
from spec_rollout.rollout import RolloutSession
from spec_rollout.rounding import Rounding, measure_rounding
from spec_rollout.types import Drafts, RolloutRequests, Rollouts, SamplingParams

HALF = torch.bfloat16
# One rounding: half a unit in the last of eight bits, relative to the value.
ROUNDING = 2**-8


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(HALF)


def half_model(seed: int = 0, **changes: object) -> torch.nn.Module:
    return build("llama", seed, **changes).to(HALF)


# --- Kernels ------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [5, 16, 24, 64])
@pytest.mark.parametrize("window", [None, 20])
def test_attention(head_dim: int, window: int | None) -> None:
    """Float32 arithmetic on bfloat16 keys and values; every piece has the bits of the whole."""
    total = 200
    query, key, value = (
        random(2, heads, total, head_dim, seed=heads + seed)
        for heads, seed in ((6, 0), (2, 1), (2, 2))
    )

    def attend(first: int, count: int, convert: torch.dtype = HALF) -> torch.Tensor:
        firsts = torch.full((2,), first)
        return batch_invariant_attention(
            torch.nn.Identity(),
            query[:, :, first : first + count].to(convert),
            key.to(convert),
            value.to(convert),
            span_mask(firsts, firsts + count - 1, torch.arange(2), window),
        )[0]

    whole = attend(0, total)
    assert whole.dtype == HALF
    assert torch.equal(whole, attend(0, total, torch.float32).to(HALF))
    for first, count in ((0, 1), (5, 1), (5, 2), (5, 3), (199, 1), (90, 33), (10, 150)):
        assert torch.equal(attend(first, count), whole[:, first : first + count]), (first, count)


def test_attention_refuses_keys_and_values_of_different_dtypes() -> None:
    query, key = random(1, 2, 1, 8), random(1, 2, 16, 8)
    mask = span_mask(torch.zeros(1).long(), torch.zeros(1).long(), torch.zeros(1).long(), None)
    with pytest.raises(ValueError, match=r"value: expected bfloat16, got float32"):
        batch_invariant_attention(torch.nn.Identity(), query, key, key.float(), mask)


@pytest.mark.parametrize("dim", [1, 31, 96, 257])
def test_norm_and_gate_are_those_of_transformers(dim: int) -> None:
    """Up to one rounding; and of each row whatever the others are."""
    x, gate, up = random(70, dim), 4 * random(70, dim, seed=1), random(70, dim, seed=2)
    norm = LlamaRMSNorm(dim).to(HALF)
    with torch.no_grad():
        norm.weight.copy_(random(dim, seed=3))
        expected = norm(x)
    actual = rms_norm(x, norm.weight.detach(), norm.variance_epsilon)
    torch.testing.assert_close(actual, expected, rtol=2 * ROUNDING, atol=1e-6)
    gated = silu_mul(gate, up)
    plain = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(gated, plain, rtol=2 * ROUNDING, atol=1e-6)
    for count in (1, 3, 16):
        assert torch.equal(rms_norm(x[:count], norm.weight.detach(), 1e-6), actual[:count])
        assert torch.equal(silu_mul(gate[:count], up[:count]), gated[:count])


def test_norms_kept_in_float32_remain_those_of_transformers() -> None:
    norm = LlamaRMSNorm(32)
    parts = LayerParts(norm)
    assert parts.num_modules == 1
    with torch.no_grad():
        expected = norm(random(3, 32))
        with parts.installed():
            actual = norm(random(3, 32))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(("heads", "tokens", "head_dim"), [(4, 1, 32), (3, 2, 18)])
def test_rotation_has_the_bits_of_transformers(heads: int, tokens: int, head_dim: int) -> None:
    x = random(30, tokens, heads, head_dim).transpose(1, 2)
    cos, sin = random(30, tokens, head_dim, seed=1), random(30, tokens, head_dim, seed=2)
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin)
    assert torch.equal(rotate_halves(x, cos, sin), expected)


def test_rounding_is_to_the_nearest_and_keeps_nan() -> None:
    """Ties go to the even neighbour, as torch's do: 1 * x is x, and a sum of two falls between."""
    x = torch.tensor([[1.0, 1.0 + 2**-7, -1.0, torch.inf, torch.nan, 3e38]], dtype=HALF)
    half_step = torch.full_like(x, 2**-8)
    shape = (1, 1, 1, 6)
    one = torch.ones(1, 1, 6, dtype=HALF)
    # x * 1 + rotated(x) * 2^-8 has ties wherever the rotated value is 1 or -1.
    expected, _ = apply_rotary_pos_emb(x.view(shape), x.view(shape), one, half_step.view(1, 1, 6))
    actual = rotate_halves(x.view(shape), one, half_step.view(1, 1, 6))
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.nan_to_num(7.0), expected.nan_to_num(7.0))


# --- The engine ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3_sliding", "gpt2"])
def test_what_the_cache_holds_changes_no_bit(name: str) -> None:
    """Where products keep one order: decoding, verifying and both after an update."""
    old = build(name, hidden_size=64) if name != "gpt2" else build(name)
    new = perturbed(old, 0.01).to(HALF)
    old = old.to(HALF)
    requests = random_requests(24)
    engine = TransformersEngine(old, num_slots=7, verify_chunk=9)
    assert engine.batch_invariant == bool(row_counts(old))
    drawn = engine.rollout(requests, SAMPLING, Coupled())
    assert drawn.logprobs.dtype == torch.float32
    again = engine.rollout(with_drafts(requests, drafts_of(drawn)), SAMPLING, Coupled())
    assert again.stats.reused_fraction > 0.8  # rounding alone, at most
    if not engine.batch_invariant:
        pytest.skip("bfloat16 products depend on the number of rows on this machine")
    assert engine.batch_invariance_error() == 0.0
    assert torch.equal(again.accepted_lens.long(), drawn.response_lens)
    assert_same(again, drawn)
    moved = TransformersEngine(new, num_slots=64, verify_chunk=200)
    plain = moved.rollout(requests, SAMPLING, Coupled())
    reused = moved.rollout(with_drafts(requests, drafts_of(drawn)), SAMPLING, Coupled())
    assert 0.05 < reused.stats.reused_fraction < 1.0
    assert_same(reused, plain)


def test_products_that_depend_on_the_rows_are_not_called_batch_invariant(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = half_model()
    path = "spec_rollout.engines.transformers.forward.row_counts"
    monkeypatch.setattr(path, lambda model: ())
    engine = TransformersEngine(model)
    assert not engine.batch_invariant
    with pytest.raises(ValueError, match=r"batch_invariant: .*bfloat16 products that depend on"):
        TransformersEngine(model, batch_invariant=True)


def test_products_are_tried_with_many_rows() -> None:
    """A layer that adds up in another order from 32 rows on has no number of rows that will do."""

    class Moody(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (1.0 if x.shape[0] < 32 else 1.01)

    assert row_counts(Moody(32, 32).to(HALF)) == ()
    assert row_counts(torch.nn.Sequential(torch.nn.Linear(32, 16), Moody(8, 8)).to(HALF)) == ()


def test_products_that_add_up_by_lanes_are_told_from_others() -> None:
    """Kernels with 32 lanes, of which each has every 32nd term, beside such as have a sum for each
    32 terms in turn: what is regular in a trial's terms cancels in both."""

    class Lanes(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            terms = (x[..., None, :].float() * self.weight.float()).unflatten(-1, (2, 32))
            if x.shape[0] < 3:
                terms = terms.sum(-2, keepdim=True)
            sums = torch.zeros(terms.shape[:-1])
            for term in terms.unbind(-1):
                sums = sums + term
            return sums.sum(-1).to(x.dtype)

    assert row_counts(Lanes(64, 32, bias=False).to(HALF)) == (4, 8, 16)


def test_float16_has_masks() -> None:
    assert not TransformersEngine(build("llama").to(torch.float16)).batch_invariant


# --- Rounding, measured and tolerated -----------------------------------------------------------


@pytest.fixture(scope="module")
def rounding_engine() -> TransformersEngine:
    """Logits that differ a little where many rows are computed together, on every machine."""
    model = build("llama")

    def rounded(module: object, args: object, logits: torch.Tensor) -> torch.Tensor:
        return logits + 0.03 * torch.sin(37 * logits) if logits.shape[1] > 8 else logits

    model.lm_head.register_forward_hook(rounded)
    return TransformersEngine(model, num_slots=8, batch_invariant=False, check_model=False)


def test_rounding_is_what_verification_differs_by(rounding_engine) -> None:
    requests = random_requests(24)
    found = measure_rounding(rounding_engine, requests, SAMPLING, num_rows=20, max_tokens=30)
    values = [value for _, value in found.quantiles]
    assert 0 < found.num_tokens <= 20 * 30
    assert values == sorted(values)
    assert 0.0 < found.mean < found.tolerance <= values[-1] <= found.largest < 0.5
    assert found.tolerance == dict(found.quantiles)[0.99]
    # By hand, of the first rows: drawn, then verified.
    short = SamplingParams(max_tokens=30, stop_token_ids=SAMPLING.stop_token_ids)
    end = int(requests.cu_prompt_lens[20])
    first = RolloutRequests(
        requests.prompt_ids[:end],
        requests.cu_prompt_lens[:21],
        requests.keys[:20],
        Drafts.none(20),
    )
    drawn = rounding_engine.rollout(first, short, NoReuse())
    again = rounding_engine.rollout(
        with_drafts(first, drafts_of(drawn)), short, Lenient(float("inf"))
    )
    difference = (again.logprobs - drawn.logprobs).abs().double()
    assert found.num_tokens == difference.numel()
    assert found.largest == float(difference.max())
    assert found.mean == pytest.approx(float(difference.mean()))


def test_a_float32_engine_on_a_cpu_has_none() -> None:
    found = measure_rounding(TransformersEngine(build("llama")), random_requests(8), SAMPLING)
    assert (found.mean, found.largest, found.tolerance) == (0.0, 0.0, 0.0)


def num_rejected(engine: TransformersEngine, rule: AcceptanceRule) -> int:
    requests = random_requests(64)
    drawn = engine.rollout(requests, SAMPLING, NoReuse())
    again = engine.rollout(with_drafts(requests, drafts_of(drawn)), SAMPLING, rule)
    return int((again.accepted_lens < drawn.response_lens).sum())


@pytest.mark.slow
@pytest.mark.parametrize("rule", [Coupled, Lenient])
def test_a_tolerance_keeps_what_rounding_rejects(rounding_engine, rule) -> None:
    found = measure_rounding(rounding_engine, random_requests(64), SAMPLING, num_rows=64)
    without = num_rejected(rounding_engine, rule())
    assert without > 0
    assert num_rejected(rounding_engine, rule(tolerance=2 * found.largest)) == 0


def test_auto_is_measured_once_before_drafts_are_verified(
    rounding_engine, caplog: pytest.LogCaptureFixture
) -> None:
    session = RolloutSession(rounding_engine, Coupled(tolerance="auto"))
    seen: list[AcceptanceRule] = []
    session.on_requests = lambda requests, rule: seen.append(rule)
    prompts = [[3, 4, 5], [6, 7]]

    def epoch(number: int) -> Rollouts:
        return session.rollout(prompts, 8, SAMPLING, step=number, epoch=number)

    first = epoch(0)
    assert session.rounding is None
    assert seen == [Coupled(tolerance=0.0)]
    with caplog.at_level(logging.INFO, "spec_rollout"):
        second = epoch(1)
    assert isinstance(session.rounding, Rounding)
    assert f"rounding of TransformersEngine: {session.rounding}" in caplog.text
    measured = session.rounding
    epoch(2)
    assert session.rounding is measured
    assert seen[1:] == [Coupled(tolerance=measured.tolerance)] * 2
    assert measured.tolerance > 0
    assert len(responses(second)) == len(responses(first)) == 16


def test_coupled_on_an_engine_that_rounds_is_told(
    rounding_engine, caplog: pytest.LogCaptureFixture
) -> None:
    RolloutSession(rounding_engine, Coupled())
    assert caplog.text.count("near-ties turn") == 1
    caplog.clear()
    RolloutSession(rounding_engine, Coupled(tolerance="auto"))
    RolloutSession(rounding_engine, Lenient(0.5))
    RolloutSession(rounding_engine, Coupled(), reuse=False)
    RolloutSession(TransformersEngine(build("llama")), Coupled())
    assert not caplog.text


def test_a_session_measures_when_asked(rounding_engine) -> None:
    session = RolloutSession(rounding_engine, Coupled(tolerance="auto"))
    found = session.measure_rounding([[3, 4, 5], [6, 7]], 4, SAMPLING)
    assert session.rounding == found
    assert session.cache.stats.num_groups == 0
