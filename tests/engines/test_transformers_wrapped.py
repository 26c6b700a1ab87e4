"""Models as trainers hold them: compiled, wrapped for several devices, with an adapter."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from tiny_models import (
    SAMPLING,
    VOCAB,
    assert_same,
    build,
    draft_rows,
    drafts_of,
    full_logprobs,
    perturbed,
    random_requests,
    responses,
    with_drafts,
)
from tiny_models import prompts as prompts_of

from spec_rollout.acceptance import Coupled, Lenient, NoReuse
from spec_rollout.engines.transformers import TransformersEngine, row_check, row_counts
from spec_rollout.engines.transformers.forward import ModelForward
from spec_rollout.engines.transformers.row_check import row_gap
from spec_rollout.rollout import RolloutSession
from spec_rollout.types import SamplingParams

peft = pytest.importorskip("peft")


def with_adapter(model: torch.nn.Module, **options: Any) -> Any:
    """LoRA on the attention, with weights that change the output."""
    torch.manual_seed(3)
    settings = {"target_modules": ["q_proj", "v_proj"], "r": 4, **options}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return wrapped.eval()


WRAPPERS = {"compile": torch.compile, "data parallel": torch.nn.DataParallel}


@pytest.mark.slow
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_a_wrapped_model_rolls_out_as_the_model_inside(wrap) -> None:
    model, requests = build("llama"), random_requests(5)
    expected = TransformersEngine(model).rollout(requests, SAMPLING, Coupled())
    engine = TransformersEngine(wrap(model))
    assert engine.model is model
    assert_same(engine.rollout(requests, SAMPLING, Coupled()), expected)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_weights_may_come_under_the_names_of_a_wrapper(wrap) -> None:
    new, requests = perturbed(build("llama"), 0.05), random_requests(5)
    expected = TransformersEngine(new).rollout(requests, SAMPLING, Coupled())
    engine = TransformersEngine(build("llama"))
    names = [name for name, _ in wrap(new).named_parameters()]
    assert all(name.startswith(("_orig_mod.", "module.")) for name in names)
    engine.update_weights(wrap(new).named_parameters())
    assert_same(engine.rollout(requests, SAMPLING, Coupled()), expected)


def test_rollouts_of_a_model_with_an_adapter_are_with_the_adapter() -> None:
    requests = random_requests(6)
    plain = TransformersEngine(build("llama")).rollout(requests, SAMPLING, Coupled())
    adapted = with_adapter(build("llama"))
    rollouts = TransformersEngine(adapted).rollout(requests, SAMPLING, Coupled())
    assert responses(rollouts) != responses(plain)
    rows = zip(prompts_of(requests), responses(rollouts), strict=True)
    expected = torch.cat([full_logprobs(adapted, prompt, ids) for prompt, ids in rows])
    assert torch.allclose(rollouts.logprobs, expected, atol=1e-4)


def test_an_engine_with_an_adapter_takes_the_adapters_names() -> None:
    requests = random_requests(6)
    trained = with_adapter(build("llama"))
    expected = TransformersEngine(trained).rollout(requests, SAMPLING, Coupled())
    engine = TransformersEngine(peft.get_peft_model(build("llama"), trained.peft_config["default"]))
    assert responses(engine.rollout(requests, SAMPLING, Coupled())) != responses(expected)
    engine.update_weights(
        (name, tensor) for name, tensor in trained.named_parameters() if "lora_" in name
    )
    assert_same(engine.rollout(requests, SAMPLING, Coupled()), expected)


def test_a_plain_engine_takes_merged_weights_under_pefts_names() -> None:
    requests = random_requests(6)
    trained = with_adapter(build("llama"), modules_to_save=["lm_head"])
    expected = responses(TransformersEngine(trained).rollout(requests, SAMPLING, Coupled()))
    engine = TransformersEngine(build("llama", seed=5))
    trained.merge_adapter()
    merged = [
        (name, tensor)
        for name, tensor in trained.named_parameters()
        if "lora_" not in name and "original_module" not in name
    ]
    assert any(".base_layer." in name for name, _ in merged)
    assert any(".modules_to_save." in name for name, _ in merged)
    engine.update_weights(merged)
    assert responses(engine.rollout(requests, SAMPLING, Coupled())) == expected


def test_adapter_weights_for_a_plain_engine_are_refused_and_nothing_is_written() -> None:
    engine = TransformersEngine(build("llama"))
    before = copy.deepcopy(engine.model.state_dict())
    adapted = with_adapter(build("llama", seed=5))
    with pytest.raises(ValueError, match=r"named_tensors: expected merged weights.*lora_A"):
        engine.update_weights(adapted.named_parameters())
    assert all(torch.equal(tensor, before[n]) for n, tensor in engine.model.state_dict().items())
    assert engine.policy_version == 0


def test_plain_weights_for_an_engine_with_an_adapter_are_refused() -> None:
    engine = TransformersEngine(with_adapter(build("llama")))
    with pytest.raises(ValueError, match=r"names of a model with an adapter.*q_proj\.base_layer"):
        engine.update_weights(build("llama", seed=5).named_parameters())


def test_a_method_that_adds_to_the_input_is_refused() -> None:
    config = peft.PromptTuningConfig(task_type=peft.TaskType.CAUSAL_LM, num_virtual_tokens=4)
    with pytest.raises(ValueError, match="model: expected a peft method that changes layers"):
        TransformersEngine(peft.get_peft_model(build("llama"), config))


def test_an_output_head_wider_than_the_embedding_is_refused() -> None:
    model = build("llama")
    model.lm_head = torch.nn.Linear(32, VOCAB + 8, bias=False)
    with pytest.raises(
        ValueError, match=rf"output head of at most {VOCAB} rows .* got {VOCAB + 8}"
    ):
        TransformersEngine(model)


def test_with_a_narrower_head_prompts_may_have_ids_that_are_never_drawn() -> None:
    model = build("llama")
    torch.manual_seed(1)
    model.lm_head = torch.nn.Linear(32, 8, bias=False)
    engine = TransformersEngine(model)
    requests = random_requests(4)  # ids up to VOCAB - 1
    rollouts = engine.rollout(requests, SamplingParams(max_tokens=9), Coupled())
    assert int(rollouts.response_ids.max()) < 8 <= int(requests.prompt_ids.max())
    drafts = draft_rows([[3, 9], [], [], []])
    with pytest.raises(ValueError, match=r"drafts\.token_ids: expected 0 <= id < 8, got 3 to 9"):
        engine.rollout(with_drafts(requests, drafts), SamplingParams(max_tokens=9), Coupled())
    with pytest.raises(ValueError, match="stop_token_ids: expected 0 <= id < 8, got 8 to 8"):
        engine.rollout(requests, SamplingParams(max_tokens=9, stop_token_ids=(8,)), Coupled())


def test_the_default_dtype_does_not_matter(other_dtype, monkeypatch) -> None:
    model, requests = build("llama"), random_requests(4)
    asked = {"prompts": [[2, 3], [4]], "sample_ids": [0, 1], "sampling": SAMPLING, "step": 0}
    engine = TransformersEngine(model)
    expected = engine.rollout(requests, SAMPLING, Coupled())
    evaluated = RolloutSession(engine, NoReuse()).evaluate_rows(**asked)
    # What is measured once in a process is measured anew.
    monkeypatch.setattr(row_counts, "_EQUAL", {})
    monkeypatch.setattr(row_check, "_PROBLEMS", {})
    with other_dtype():
        engine = TransformersEngine(model)
        assert_same(engine.rollout(requests, SAMPLING, Coupled()), expected)
        session = RolloutSession(engine, NoReuse())
        assert_same(session.evaluate_rows(**asked, drafting=True), evaluated)


def test_weights_in_double_precision_are_refused() -> None:
    with pytest.raises(ValueError, match="model: expected float32, float16 or bfloat16"):
        TransformersEngine(build("llama").double())


def in_mixed_precision(model: Any) -> Any:
    """As accelerate leaves a model: computed under autocast, given back in float32."""
    model._original_forward = forward = model.forward

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            output = forward(*args, **kwargs)
        output.logits = output.logits.float()
        return output

    model.forward = call
    return model


# One so deep that its rounding is more than float32's may be.
DEEP = {"num_hidden_layers": 16, "hidden_size": 128, "intermediate_size": 256}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [("llama", {}), ("qwen3", DEEP), ("qwen3_sliding", {}), ("gpt2", {})],
)
def test_under_autocast_rollouts_are_those_of_the_models_own_forward(
    name: str, changes: dict[str, Any]
) -> None:
    model, requests = in_mixed_precision(build(name, **changes)), random_requests(8)
    engine = TransformersEngine(model)
    assert not engine.batch_invariant
    drawn = engine.rollout(requests, SAMPLING, NoReuse())
    again = engine.rollout(with_drafts(requests, drafts_of(drawn)), SAMPLING, Lenient(float("inf")))
    assert responses(again) == responses(drawn)
    rows = zip(prompts_of(requests), responses(drawn), strict=True)
    expected = torch.cat([full_logprobs(model, prompt, ids) for prompt, ids in rows])
    for rollouts in (drawn, again):
        gap = (rollouts.logprobs - expected).abs()
        assert gap.mean() < 0.03
        assert gap.max() < 0.5


def test_autocast_is_held_to_the_rounding_of_16_bits_and_the_same_model_without_is_not() -> None:
    for model, is_16_bit in ((in_mixed_precision(build("llama")), True), (build("llama"), False)):
        gap = row_gap(ModelForward(model, False, 128))
        assert gap.is_rounding
        assert (gap.tolerance > 0.05) == is_16_bit
        assert TransformersEngine(model).batch_invariant != is_16_bit
    with pytest.raises(ValueError, match=r"batch_invariant: .* got one that computes in another"):
        TransformersEngine(in_mixed_precision(build("llama")), batch_invariant=True)
