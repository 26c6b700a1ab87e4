"""How the embedded engine treats the model it is given, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from tiny_models import (
    SAMPLING,
    VOCAB,
    assert_same,
    build,
    draft_rows,
    perturbed,
    random_requests,
    with_drafts,
)

from spec_rollout.acceptance import Coupled, Lenient, NoReuse
from spec_rollout.engines import TransformersEngine
from spec_rollout.types import RolloutRequests


@pytest.fixture(scope="module")
def new_model():
    return perturbed(build("qwen3"), 0.01)


# --- The model stays the caller's ---------------------------------------------------------------


def test_model_is_left_as_it_was_and_can_be_trained() -> None:
    model = build("llama").train()
    model.model.layers[0].mlp.eval()
    modes = [module.training for module in model.modules()]
    engine = TransformersEngine(model)
    engine.rollout(random_requests(4), SAMPLING, NoReuse())
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == "sdpa"
    assert not model.lm_head._forward_pre_hooks
    ids = torch.tensor([[3, 4, 5]])
    output = model(ids, labels=ids)
    assert output.logits.shape == (1, 3, VOCAB)
    output.loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_model_is_restored_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama").train()
    engine = TransformersEngine(model)
    expected = engine.rollout(random_requests(4), SAMPLING, NoReuse())

    def broken(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.model.norm, "forward", broken)
        with pytest.raises(KeyboardInterrupt):
            engine.rollout(random_requests(4), SAMPLING, NoReuse())
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert not model.lm_head._forward_pre_hooks
    assert_same(engine.rollout(random_requests(4), SAMPLING, NoReuse()), expected)


def test_dropout_is_off_while_generating() -> None:
    requests = random_requests(6)
    expected = TransformersEngine(build("gpt2")).rollout(requests, SAMPLING, NoReuse())
    model = build("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5).train()
    assert_same(TransformersEngine(model).rollout(requests, SAMPLING, NoReuse()), expected)


# --- Bad input ----------------------------------------------------------------------------------


def test_rejects_what_it_cannot_generate(new_model) -> None:
    engine = TransformersEngine(new_model, max_model_len=12)
    requests = random_requests(5, seed=1, longest=20)
    longest = int(requests.cu_prompt_lens.diff().max())
    assert longest > 12
    with pytest.raises(ValueError, match=rf"prompt_ids.*max_model_len \(12\).*{longest} tokens"):
        engine.rollout(requests, SAMPLING, NoReuse())
    requests = random_requests(3, longest=3)
    bad = RolloutRequests(
        torch.full_like(requests.prompt_ids, VOCAB),
        requests.cu_prompt_lens,
        requests.keys,
        requests.drafts,
    )
    with pytest.raises(ValueError, match=r"prompt_ids: expected 0 <= id < 32, got 32"):
        engine.rollout(bad, SAMPLING, NoReuse())
    drafts = draft_rows([[-1], [], []])
    with pytest.raises(ValueError, match=r"drafts.token_ids: expected 0 <= id < 32, got -1"):
        engine.rollout(with_drafts(requests, drafts), SAMPLING, Coupled())
    drafts = draft_rows([[4], [], []], logprob=None)
    with pytest.raises(ValueError, match=r"drafts.logprobs"):
        engine.rollout(with_drafts(requests, drafts), SAMPLING, Lenient(0.0))
    assert engine.rollout(with_drafts(requests, drafts), SAMPLING, Coupled()).batch == 3


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("num_slots", 0),
        ("max_verify_tokens", 0),
        ("verify_chunk", 0),
        ("max_model_len", 1),
        ("max_model_len", 129),
    ],
)
def test_rejects_bad_arguments(new_model, argument: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{argument}: expected .* got {value}"):
        TransformersEngine(new_model, **{argument: value})


def test_rejects_models_it_cannot_run(new_model) -> None:
    from transformers import (
        BloomConfig,
        BloomForCausalLM,
        Lfm2Config,
        Lfm2ForCausalLM,
        MambaConfig,
        MambaForCausalLM,
    )

    mamba = MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1))
    with pytest.raises(ValueError, match="model: expected a forward with position_ids, Mamba"):
        TransformersEngine(mamba)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="model: expected a forward with position_ids, Bloom"):
        TransformersEngine(bloom)
    lfm2 = Lfm2ForCausalLM(
        Lfm2Config(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, layer_types=["conv", "full_attention"],
            **{f"{name}_token_id": None for name in ("bos", "eos", "pad")},
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"standard KV cache, Lfm2ForCausalLM has \['conv'\]"):
        TransformersEngine(lfm2)
    with pytest.raises(ValueError, match=r"batch_invariant.*eager"):
        TransformersEngine(build("llama", attn_implementation="eager"), batch_invariant=True)


def test_rejects_attention_without_a_mask_and_recurrent_layers() -> None:
    """As models declare them; none of the tiny ones has either."""
    model = build("llama")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match=r"model: expected attention sdpa.*'flex_attention'"):
        TransformersEngine(model)
    model = build("qwen3")
    model._is_stateful = True
    with pytest.raises(ValueError, match=r"standard KV cache, Qwen3.* has recurrent layers"):
        TransformersEngine(model)


# --- Weights ------------------------------------------------------------------------------------


def test_update_weights_replaces_the_policy(new_model) -> None:
    model = build("qwen3")
    engine = TransformersEngine(model)
    requests = random_requests(8)
    assert engine.rollout(requests, SAMPLING, NoReuse()).policy_version == 0
    addresses = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    engine.update_weights(new_model.named_parameters())
    rollouts = engine.rollout(requests, SAMPLING, NoReuse())
    assert engine.policy_version == rollouts.policy_version == 1
    assert_same(rollouts, TransformersEngine(new_model).rollout(requests, SAMPLING, NoReuse()))
    assert {name: tensor.data_ptr() for name, tensor in model.named_parameters()} == addresses
    engine.update_weights(model.state_dict().items())  # itself: nothing to copy
    assert engine.policy_version == 2


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.layers.7.weight", torch.zeros(1), "model.layers.7.weight"),
        ("model.norm.weight", torch.zeros(31), r"'model.norm.weight' of shape \[32\], got \[31\]"),
        ("lm_head.weight", torch.zeros(VOCAB, 32), "'lm_head.weight' again"),
    ],
)
def test_update_weights_refuses_before_it_writes(name, tensor, message) -> None:
    model = build("qwen3")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    engine = TransformersEngine(model)
    updates = [("lm_head.weight", torch.zeros(VOCAB, 32)), (name, tensor)]
    with pytest.raises(ValueError, match=message):
        engine.update_weights(updates)
    assert engine.policy_version == 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
