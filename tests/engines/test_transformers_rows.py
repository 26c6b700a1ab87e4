"""Models whose forward is not a function of the row are refused or kept to lengths where it is."""

from __future__ import annotations

import logging

import pytest
import torch
from tiny_models import VOCAB, build, full_logprobs, random_requests, responses
from tiny_models import prompts as prompts_of
from transformers import (
    CLIPVisionConfig,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from spec_rollout.acceptance import Coupled
from spec_rollout.engines.transformers import TransformersEngine, row_check
from spec_rollout.engines.transformers.attention import BATCH_INVARIANT_ATTENTION
from spec_rollout.engines.transformers.forward import ModelForward
from spec_rollout.engines.transformers.lengths import row_limit
from spec_rollout.engines.transformers.row_check import RowGap, row_gap, tolerance_of
from spec_rollout.types import Rollouts, SamplingParams

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.25,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def llama(max_position_embeddings: int, **rope: object) -> PreTrainedModel:
    torch.manual_seed(0)
    parameters = {"rope_theta": 10000.0, **rope}
    config = LlamaConfig(
        **SMALL, max_position_embeddings=max_position_embeddings, rope_parameters=parameters
    )
    return LlamaForCausalLM(config).eval()


def gpt_neo(window: int, positions: int = 128) -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=window,
        max_position_embeddings=positions,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPTNeoForCausalLM._from_config(config, attn_implementation="eager").eval()


def assert_right(model: PreTrainedModel, rollouts: Rollouts, requests) -> None:
    """Log-probs are those of a plain forward over each row alone."""
    rows = zip(prompts_of(requests), responses(rollouts), strict=True)
    expected = torch.cat([full_logprobs(model, prompt, ids) for prompt, ids in rows])
    assert torch.allclose(rollouts.logprobs, expected, atol=1e-4)


LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0] * 4,
    "original_max_position_embeddings": 24,
}


@pytest.mark.parametrize(
    ("rope", "positions", "usual", "most"),
    [
        ({"rope_type": "default"}, 96, 96, 96),
        ({"rope_type": "linear", "factor": 4.0}, 96, 96, 384),
        ({"rope_type": "dynamic", "factor": 4.0}, 96, 96, 96),
        (LONGROPE, 96, 24, 24),
        # The config's length is that before scaling, as Qwen2.5 has it ...
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
            32,
            128,
            128,
        ),
        # ... or after it.
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
            128,
            128,
            128,
        ),
    ],
    ids=lambda value: value.get("rope_type") if isinstance(value, dict) else str(value),
)
def test_rows_may_be_as_long_as_the_rotary_embedding_reaches(rope, positions, usual, most) -> None:
    model = llama(positions, **rope)
    limit = row_limit(model, model.config)
    assert (limit.usual, limit.most) == (usual, most)
    engine = TransformersEngine(model)
    assert engine.max_model_len == usual
    with pytest.raises(ValueError, match=f"max_model_len: expected 2 to {most} "):
        TransformersEngine(model, max_model_len=most + 1)


def test_a_rotary_embedding_is_as_long_as_its_module_whatever_the_config_says_later() -> None:
    model = llama(48, rope_type="dynamic", factor=4.0)
    model.config.max_position_embeddings = 256
    assert TransformersEngine(model).max_model_len == 48


@pytest.mark.parametrize(
    "model",
    [
        llama(96, **LONGROPE),
        llama(96, rope_type="dynamic", factor=4.0),
        llama(32, rope_type="yarn", factor=4.0, original_max_position_embeddings=32),
    ],
    ids=["longrope", "dynamic", "yarn"],
)
def test_scaled_models_give_what_a_forward_of_the_row_gives(model: PreTrainedModel) -> None:
    requests = random_requests(9, longest=20)
    engine = TransformersEngine(model, num_slots=4)
    rollouts = engine.rollout(requests, SamplingParams(max_tokens=200), Coupled())
    lens = requests.cu_prompt_lens.diff() + rollouts.response_lens
    assert lens.tolist() == [engine.max_model_len] * 9
    assert_right(model, rollouts, requests)


def test_local_attention_that_reads_the_width_of_the_cache_is_refused_with_the_gap() -> None:
    with pytest.raises(
        ValueError,
        match=r"no row depends on the others, GPTNeoForCausalLM gives log-probs that differ by 0\.\d+ "
        r"nats on average, \d\.\d at most.*\(worst in a row of \d+ tokens\)",
    ):
        TransformersEngine(gpt_neo(window=8))


def test_a_window_that_only_a_long_row_passes_is_tried_and_the_way_out_is_named() -> None:
    model = gpt_neo(window=64)
    with pytest.raises(ValueError, match="rows of at most 64 tokens are right: max_model_len=64"):
        TransformersEngine(model)
    requests = random_requests(7, longest=30)
    engine = TransformersEngine(model, max_model_len=64)
    rollouts = engine.rollout(requests, SamplingParams(max_tokens=100), Coupled())
    assert_right(model, rollouts, requests)


def test_rows_that_are_ahead_of_others_see_all_of_themselves() -> None:
    """The model's own mask begins where the width of the batch says, not where a row is."""
    model = gpt_neo(window=24)
    masks = [block.attn.attention.bias for block in model.transformer.h]
    engine = TransformersEngine(model, max_model_len=24, verify_chunk=20)
    requests = random_requests(40, longest=20)
    rollouts = engine.rollout(requests, SamplingParams(max_tokens=24), Coupled())
    assert_right(model, rollouts, requests)
    assert row_gap(ModelForward(model, None, 24)).is_rounding
    for block, mask in zip(model.transformer.h, masks, strict=True):
        assert block.attn.attention.bias is mask


def test_the_check_can_be_left_out() -> None:
    assert TransformersEngine(gpt_neo(window=8), check_model=False).max_model_len == 128


@pytest.mark.parametrize("name", ["llama", "qwen3_sliding", "mistral_sliding", "gpt2"])
@pytest.mark.parametrize("batch_invariant", [None, False])
def test_sound_models_differ_by_rounding_alone(name: str, batch_invariant: bool | None) -> None:
    gap = row_gap(ModelForward(build(name), batch_invariant, 128))
    assert gap.largest < 1e-3
    assert gap.is_rounding


def test_the_check_sees_a_mask_that_is_one_off(monkeypatch: pytest.MonkeyPatch) -> None:
    original = ModelForward._additive_mask

    def shifted(self, positions, width, window):
        return original(self, (positions - 1).clamp(min=0), width, window)

    monkeypatch.setattr(ModelForward, "_additive_mask", shifted)
    gap = row_gap(ModelForward(build("llama"), False, 128))
    assert gap.mean > 0.1
    assert not gap.is_rounding


def test_the_check_leaves_the_model_as_it_was() -> None:
    model = build("llama")
    model.model.layers[1].train()
    before = [module.training for module in model.modules()]
    TransformersEngine(model)
    assert [module.training for module in model.modules()] == before
    assert model.config._attn_implementation == "sdpa"


def test_an_error_of_the_check_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_check, "_PROBLEMS", {})
    model = build("llama")

    def fails(forward: ModelForward) -> None:
        raise RuntimeError("not now")

    with monkeypatch.context() as patch:
        patch.setattr(row_check, "row_gap", fails)
        with pytest.raises(ValueError, match="LlamaForCausalLM raised RuntimeError: not now"):
            TransformersEngine(model)
    TransformersEngine(model)


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_a_lack_of_memory_is_no_fault_of_the_model(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_check, "_PROBLEMS", {})

    def fails(forward: ModelForward) -> None:
        raise error("full")

    monkeypatch.setattr(row_check, "row_gap", fails)
    with pytest.raises(error, match="full"):
        TransformersEngine(build("llama"))


def test_a_model_is_tried_once_with_each_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_check, "_PROBLEMS", {})
    tried = []

    def gap(forward: ModelForward) -> RowGap:
        tried.append(forward.config._attn_implementation)
        return RowGap(0.0, 0.0, 0, 1.0)

    monkeypatch.setattr(row_check, "row_gap", gap)
    for attention in ("sdpa", "sdpa", "eager"):
        model = build("llama")
        model.set_attn_implementation(attention)
        TransformersEngine(model, batch_invariant=False)
    assert tried == ["sdpa", "eager"]


def test_products_in_tf32_have_a_tolerance_of_their_own() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    exact = tolerance_of(torch.float32, cpu)
    assert exact == tolerance_of(torch.float32, gpu) == tolerance_of(torch.float64, gpu)
    matmul = torch.backends.cuda.matmul
    try:
        for allow in ("set_float32_matmul_precision", "allow_tf32", "fp32_precision"):
            torch.set_float32_matmul_precision("highest")
            if allow == "allow_tf32":
                matmul.allow_tf32 = True
            elif allow == "set_float32_matmul_precision":
                torch.set_float32_matmul_precision("high")
            elif hasattr(matmul, allow):
                matmul.fp32_precision = "tf32"  # after this, the older ones raise
            else:
                continue
            assert exact < tolerance_of(torch.float32, gpu) < tolerance_of(torch.bfloat16, gpu)
            assert exact == tolerance_of(torch.float32, cpu) == tolerance_of(torch.float64, gpu)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert exact == tolerance_of(torch.float32, gpu)
    assert not matmul.allow_tf32


def test_a_model_is_tried_again_where_its_products_are_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(row_check, "_PROBLEMS", {})
    tried = []

    def gap(forward: ModelForward) -> RowGap:
        tried.append(row_check.allows_tf32(forward.device))
        return RowGap(0.0, 0.0, 0, 1.0)

    monkeypatch.setattr(row_check, "row_gap", gap)
    for allowed in (False, True, True, False):
        monkeypatch.setattr(row_check, "allows_tf32", lambda _device, allowed=allowed: allowed)
        TransformersEngine(build("llama"))
    assert tried == [False, True]


def llava() -> PreTrainedModel:
    """A model of text and images: a config with configs inside."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    text = LlamaConfig(**SMALL, max_position_embeddings=128)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=VOCAB - 1)
    return LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize("batch_invariant", [True, False])
def test_every_attention_of_a_composite_config_is_as_it_was(batch_invariant: bool) -> None:
    model = llava()
    config = model.config
    config.vision_config._attn_implementation = "eager"
    forward = ModelForward(model, batch_invariant)
    with forward.session():
        inside = BATCH_INVARIANT_ATTENTION if batch_invariant else "sdpa"
        assert config.text_config._attn_implementation == inside
    found = [c._attn_implementation for c in (config, config.text_config, config.vision_config)]
    assert found == ["sdpa", "sdpa", "eager"]
    requests = random_requests(5)
    engine = TransformersEngine(model, batch_invariant=batch_invariant)
    assert_right(model, engine.rollout(requests, SamplingParams(max_tokens=9), Coupled()), requests)


def test_the_attention_that_counts_is_that_of_the_text() -> None:
    model = llava()
    model.config.text_config._attn_implementation = "eager"
    assert model.config._attn_implementation == "sdpa"
    assert not ModelForward(model).batch_invariant
    with pytest.raises(ValueError, match=r"batch_invariant: .* uses eager attention"):
        ModelForward(model, True)
    model.config.text_config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match=r"model: expected attention sdpa or eager .* 'flex_att"):
        ModelForward(model)


def test_values_narrower_than_keys_take_forwards_with_masks() -> None:
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **{**SMALL, "num_key_value_heads": 4},
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=12,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            moe_intermediate_size=32,
            first_k_dense_replace=1,
            max_position_embeddings=128,
        )
    ).eval()
    engine = TransformersEngine(model)
    assert not engine.batch_invariant
    requests = random_requests(5)
    assert_right(model, engine.rollout(requests, SamplingParams(max_tokens=9), Coupled()), requests)
    with pytest.raises(ValueError, match=r"batch_invariant: .* has values narrower than its keys"):
        TransformersEngine(model, batch_invariant=True)


class SinkLlama(LlamaForCausalLM):
    """Asks its attention for something that the batch-invariant one has not (and sdpa ignores)."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, cache=None, **kw):
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "cache": cache}
        return super().forward(input_ids, **given, **kw, s_aux=torch.zeros(4))


def test_attention_that_is_not_made_for_it_takes_forwards_with_masks_and_says_so(caplog) -> None:
    torch.manual_seed(0)
    model = SinkLlama(LlamaConfig(**SMALL, max_position_embeddings=128)).eval()
    with caplog.at_level(logging.WARNING, logger="spec_rollout"):
        engine = TransformersEngine(model)
    assert not engine.batch_invariant
    assert "SinkLlama: batch-invariant forwards cannot be had" in caplog.text
    requests = random_requests(5)
    assert_right(model, engine.rollout(requests, SamplingParams(max_tokens=9), Coupled()), requests)
    with pytest.raises(ValueError, match="raised NotImplementedError: batch-invariant attention"):
        TransformersEngine(model, batch_invariant=True)
