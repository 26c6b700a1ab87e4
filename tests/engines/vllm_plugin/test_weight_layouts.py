"""Weight updates of models that vLLM, transformers and the files keep differently."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_samples import (
    EOS,
    LLM_ARGS,
    VOCAB,
    make_model,
    make_requests,
    random_prompts,
    rows_of,
)

from spec_rollout.acceptance import Coupled
from spec_rollout.types import Rollouts, SamplingParams

PROMPTS = random_prompts(5, seed=31)
SAMPLING = SamplingParams(max_tokens=20, stop_token_ids=(EOS,))
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 128,  # what vLLM's CPU kernels for experts want at least
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": 0,
}
_EXPERTS = {
    "num_experts": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2, biases": {"model_type": "qwen2"},
    "qwen3_moe": _EXPERTS,
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 64},
    "phi": {},  # vLLM registers the bias of its head anew with every load
    "mixtral": _EXPERTS,  # experts have other names in its files
    "smollm3": {},  # vLLM runs it on transformers' own classes, which this test uses beside it
}


def make_family(name: str, folder: Path) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**_SHAPE, **FAMILIES[name]}
    config = AutoConfig.for_model(settings.pop("model_type", name), **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):  # zeros otherwise
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return model


def perturb(model: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


def file_weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def roll_out(engine: Any) -> Rollouts:
    return engine.rollout(make_requests(PROMPTS), SAMPLING, Coupled())


def assert_equal(a: Rollouts, b: Rollouts) -> None:
    assert rows_of(a) == rows_of(b)
    assert torch.equal(a.logprobs, b.logprobs)


def gap(model: Any, rollouts: Rollouts) -> float:
    """Largest difference from the log-probs of a plain forward of each row, nats."""
    expected = []
    for prompt, response in zip(PROMPTS, rows_of(rollouts), strict=True):
        ids = torch.tensor([[*prompt.tolist(), *response]])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, prompt.size - 1 : -1]
        tokens = torch.tensor(response)[:, None]
        expected.append(logits.double().log_softmax(-1).gather(1, tokens)[:, 0])
    return float((torch.cat(expected) - rollouts.logprobs.double()).abs().max())


def _group_for_experts() -> None:
    """vLLM makes groups with the first engine of a process, and this one only if it has experts."""
    from vllm.distributed import parallel_state

    if parallel_state._TP is not None and parallel_state._EP is None:
        parallel_state._EP = parallel_state.init_model_parallel_group(
            [[0]], 0, "gloo", group_name="ep"
        )


MakeFamily = Callable[[str], tuple[Any, Any, Path]]


@pytest.fixture(scope="module")
def make(vllm_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeFamily]:
    """`make(family)`: an engine, its model as transformers loads it, and its folder."""
    from transformers import AutoModelForCausalLM

    from spec_rollout.engines.vllm import VLLMEngine

    engines: dict[str, tuple[Any, Path]] = {}

    def of(name: str) -> tuple[Any, Any, Path]:
        if name not in engines:
            folder = tmp_path_factory.mktemp("family")
            make_family(name, folder)
            _group_for_experts()
            engines[name] = VLLMEngine(str(folder), llm_args=LLM_ARGS), folder
        engine, folder = engines[name]
        return engine, AutoModelForCausalLM.from_pretrained(folder).float().eval(), folder

    yield of
    engines.clear()


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_weights_change_no_log_prob_and_others_arrive_whole(
    make: MakeFamily, family: str
) -> None:
    engine, model, folder = make(family)
    loaded = roll_out(engine)
    assert gap(model, loaded) < 1e-4

    with pytest.raises(ValueError, match="got 'nothing'"):  # after trying the names
        engine.update_weights([("nothing", torch.zeros(1))])
    assert_equal(roll_out(engine), loaded)
    engine.update_weights(model.named_parameters())
    assert_equal(roll_out(engine), loaded)
    engine.update_weights(model.state_dict().items())  # tied weights under both names
    assert_equal(roll_out(engine), loaded)

    perturb(model)
    assert gap(model, loaded) > 0.1
    engine.update_weights(model.named_parameters())
    assert gap(model, roll_out(engine)) < 1e-4

    engine.update_weights(file_weights(folder).items())  # and the names of its files
    assert_equal(roll_out(engine), loaded)


@pytest.mark.parametrize("family", ["llama", "phi", "qwen3_moe"])
def test_weights_stay_where_cuda_graphs_would_read_them(make: MakeFamily, family: str) -> None:
    engine, model, _ = make(family)

    def places() -> dict[str, int]:
        named = engine.llm.apply_model(lambda inner: dict(inner.named_parameters()))[0]
        return {name: tensor.data_ptr() for name, tensor in named.items()}

    before = places()
    engine.update_weights(model.named_parameters())
    assert places() == before


def test_a_layer_alone_is_updated(make: MakeFamily) -> None:
    engine, model, folder = make("qwen3_moe")
    loaded = roll_out(engine)
    part = {n: t for n, t in model.named_parameters() if "layers.1.mlp.experts" in n}
    assert len(part) == 2  # of all experts
    with torch.no_grad():
        for tensor in part.values():
            tensor *= 1.5
    assert gap(model, loaded) > 1e-2
    engine.update_weights(part.items())
    assert gap(model, roll_out(engine)) < 1e-4
    engine.update_weights(file_weights(folder).items())
    assert_equal(roll_out(engine), loaded)


EMBEDDING = "model.embed_tokens.weight"
Q, K, V = (f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv")
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
REFUSED: dict[str, tuple[str, Callable[[dict], Any], str]] = {
    "unknown": ("llama", lambda w: {**w, "model.nothing.weight": w[Q]}, "model.nothing.weight"),
    "unknown bias": ("llama", lambda w: {Q[:-6] + "bias": w[Q][0]}, r"q_proj\.bias"),
    "shape": ("llama", lambda w: {**w, Q: w[Q][:-1]}, r"q_proj.*\[128, 128\].*\[127, 128\]"),
    "a part of a fused layer": (
        "llama",
        lambda w: {n: t for n, t in w.items() if n != K},
        r"qkv_proj' or none, got .*q_proj.weight' without .*k_proj",
    ),
    "an expert less": (
        "qwen3_moe",
        lambda w: {n: t for n, t in w.items() if n != EXPERT},
        r"layers\.1\.mlp\.experts.* without .*experts\.3\.up_proj",
    ),
    "in two forms": (
        "qwen3_moe",
        lambda w: {**w, "model.layers.1.mlp.experts.down_proj": torch.zeros(8, 128, 64)},
        r"experts\.0\.down_proj\.weight' both as in the model's state dict and as in its",
    ),
    "shape of a tied weight": (
        "llama, tied",
        lambda w: {**w, "lm_head.weight": w[EMBEDDING][1:]},
        r"lm_head.weight' of shape \[64, 128\], got \[63, 128\]",
    ),
    "an adapter": (
        "llama",
        lambda w: {**w, "base_model.model." + Q[:-6] + "lora_A.default.weight": w[Q][:4]},
        "expected merged weights.*lora_A",
    ),
    "tied to other values": (
        "llama, tied",
        lambda w: {**w, "lm_head.weight": w[EMBEDDING] + 1},
        "lm_head.weight' equal to 'model.embed_tokens.weight'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_arrive_is_refused_by_name_and_nothing_is_written(
    make: MakeFamily, case: str
) -> None:
    family, change, message = REFUSED[case]
    engine, _, folder = make(family)
    before, version = roll_out(engine), engine.policy_version
    weights = {name: tensor + 0.1 for name, tensor in file_weights(folder).items()}
    with pytest.raises(ValueError, match=f"named_tensors: .*{message}"):
        engine.update_weights(change(weights).items())
    assert engine.policy_version == version
    assert_equal(roll_out(engine), before)


def test_a_weight_given_twice_is_refused(make: MakeFamily) -> None:
    engine, _, folder = make("llama")
    weights = file_weights(folder)
    with pytest.raises(ValueError, match=f"expected each name once, got 'module.{Q}' again"):
        engine.update_weights([*weights.items(), (f"module.{Q}", weights[Q])])


def test_an_engine_whose_update_failed_on_its_way_serves_again_after_a_whole_one(
    make: MakeFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, model, folder = make("qwen3_moe")
    loaded = roll_out(engine)
    original = engine.llm.collective_rpc

    def fails(method: str, *args: Any, **kwargs: Any) -> Any:
        if method == "spec_rollout_finish_update":
            raise KeyboardInterrupt
        return original(method, *args, **kwargs)

    perturb(model)
    with monkeypatch.context() as patch:
        patch.setattr(engine.llm, "collective_rpc", fails)
        with pytest.raises(KeyboardInterrupt):
            engine.update_weights(model.named_parameters())
    with pytest.raises(RuntimeError, match="weights: expected a whole update"):
        roll_out(engine)
    engine.update_weights([("model.norm.weight", model.model.norm.weight)])
    with pytest.raises(RuntimeError, match="weights: expected a whole update"):
        roll_out(engine)
    engine.update_weights(file_weights(folder).items())
    assert_equal(roll_out(engine), loaded)


def _int8_when_loaded() -> str:
    """A quantisation of vLLM's that repacks linear layers as it loads them; its name.

    vLLM's own of this kind have no kernels in its builds for CPUs without AMX.
    """
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
    from vllm.model_executor.utils import replace_parameter

    class Method(UnquantizedLinearMethod):
        def process_weights_after_loading(self, layer: Any) -> None:
            rounded, scale = int8(layer.weight.data)
            replace_parameter(layer, "weight", rounded.t().contiguous())
            layer.register_parameter("scale", torch.nn.Parameter(scale, requires_grad=False))

        def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
            return torch.nn.functional.linear(x, layer.weight.t() * layer.scale, bias)

    @register_quantization_config("spec_rollout_test")
    class Config(QuantizationConfig):
        def get_name(self) -> str:
            return "spec_rollout_test"

        def get_supported_act_dtypes(self) -> list[torch.dtype]:
            return [torch.float32]

        @classmethod
        def get_min_capability(cls) -> int:
            return -1

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> Any:
            return cls()

        def get_quant_method(self, layer: Any, prefix: str) -> Any:
            return Method() if isinstance(layer, LinearBase) else None

    return "spec_rollout_test"


def int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[out, in] in steps of [out, 1]."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round().to(torch.int8), scale


def test_a_model_that_is_quantised_when_it_is_loaded_is_quantised_anew(
    vllm_installed: None, tmp_path: Path
) -> None:
    from spec_rollout.engines.vllm import VLLMEngine

    model = make_model(tmp_path, hidden_size=128)
    llm_args = {**LLM_ARGS, "quantization": _int8_when_loaded()}
    engine = VLLMEngine(str(tmp_path), llm_args=llm_args)
    loaded = roll_out(engine)
    assert gap(model, loaded) > 1e-2
    engine.update_weights(model.named_parameters())
    assert_equal(roll_out(engine), loaded)

    perturb(model)
    engine.update_weights(model.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                rounded, scale = int8(parameter)
                parameter.copy_(rounded * scale)
    assert gap(model, roll_out(engine)) < 1e-4


def _quantise(folder: Path) -> None:
    """The int8 format of compressed-tensors."""
    from safetensors.torch import save_file

    weights = file_weights(folder)
    for name in [n for n in weights if "proj.weight" in n]:
        scale = weights[name].abs().amax(1, keepdim=True) / 127
        weights[f"{name}_scale"] = scale
        weights[name] = (weights[name] / scale).round().to(torch.int8)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    numbers = {"num_bits": 8, "type": "int", "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**numbers, "strategy": "channel", "dynamic": False},
                "input_activations": {**numbers, "strategy": "token", "dynamic": True},
            }
        },
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))


def test_a_quantised_checkpoint_is_refused_and_nothing_is_written(
    vllm_installed: None, tmp_path: Path
) -> None:
    from spec_rollout.engines.vllm import VLLMEngine

    model = make_model(tmp_path, hidden_size=128)
    _quantise(tmp_path)
    engine = VLLMEngine(str(tmp_path), llm_args={**LLM_ARGS, "dtype": "bfloat16"})
    loaded = roll_out(engine)
    message = r"weights cannot be updated.*quantised, and model\.layers\.0\.\S+ takes int8 only"
    with pytest.raises(ValueError, match=message):
        engine.update_weights(model.named_parameters())
    assert_equal(roll_out(engine), loaded)


def test_vllms_own_loading_goes_on_after_an_update(make: MakeFamily) -> None:
    engine, model, folder = make("qwen2, biases")
    loaded = roll_out(engine)
    perturb(model)
    engine.update_weights(model.named_parameters())
    weights = file_weights(folder)
    engine.llm.apply_model(lambda inner: inner.load_weights(weights.items()) and None)
    engine.llm.collective_rpc("spec_rollout_weights_loaded")
    engine.llm.reset_prefix_cache()
    assert_equal(roll_out(engine), loaded)


def test_a_router_gate_that_vllm_keeps_combined_follows_its_parts(vllm_installed: None) -> None:
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    from spec_rollout.engines.vllm.compat.reload import refresh_derived

    class Runner(torch.nn.Module):
        """vLLM's code on two gates; a whole runner takes an engine on an AMD GPU."""

        fuse = MoERunner._maybe_fuse_gate_weights

        def __init__(self) -> None:
            super().__init__()
            self.gate, self.shared_expert_gate = torch.nn.Linear(4, 3), torch.nn.Linear(4, 1)
            self._combined_gate_weight = None

    runner = Runner().requires_grad_(False)
    refresh_derived(runner)  # not combined yet
    runner.fuse()
    combined = runner._combined_gate_weight
    runner.gate.weight += 1
    runner.shared_expert_gate.weight += 2
    refresh_derived(runner)
    assert runner._combined_gate_weight is combined  # CUDA graphs read it where it was
    runner._combined_gate_weight = None
    runner.fuse()
    assert torch.equal(combined, runner._combined_gate_weight)


def test_merged_adapters_arrive_under_pefts_names(make: MakeFamily) -> None:
    peft = pytest.importorskip("peft")
    engine, model, folder = make("llama")
    loaded = roll_out(engine)
    torch.manual_seed(3)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, modules_to_save=["lm_head"])
    trained = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    with pytest.raises(ValueError, match=r"named_tensors: expected merged weights.*lora_A"):
        engine.update_weights(trained.named_parameters())
    assert_equal(roll_out(engine), loaded)

    trained.merge_adapter()
    engine.update_weights(
        (name, tensor)
        for name, tensor in trained.named_parameters()
        if "lora_" not in name and "original_module" not in name
    )
    adapted = roll_out(engine)
    assert rows_of(adapted) != rows_of(loaded)
    assert gap(trained, adapted) < 1e-4
    engine.update_weights(file_weights(folder).items())
    assert_equal(roll_out(engine), loaded)
