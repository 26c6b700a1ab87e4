"""LoRA: what is trained, what the engine is given, and what a checkpoint holds."""

from __future__ import annotations

import copy
import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_parts import Parts
from safetensors.torch import load_file
from tiny_models import build
from tiny_runs import save_tiny_model
from whole_runs import (
    SignalAtForward,
    assert_same_weights,
    final_weights,
    read_rows,
    without_seconds,
)

from spec_rollout.config.sections import ConfigError, ModelConfig, TrainConfig
from spec_rollout.train import adapter, checkpoint
from spec_rollout.train.checkpoint import CheckpointError, list_checkpoints
from spec_rollout.train.interrupt import RunInterrupted
from spec_rollout.train.manifest import write_manifest
from spec_rollout.train.trainer import resume, run
from spec_rollout.train.update import make_optimizer

pytest.importorskip("peft")

LORA = ModelConfig("unused", lora_rank=4)


def with_adapter(dtype=torch.float32, config=LORA):
    """A model, and the same with an adapter that changes its logits."""
    model = build("qwen3").to(dtype)
    other = copy.deepcopy(model)
    adapter.add_adapter(other, config)
    return model, other


def shake(model):
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.arange(20)[None]).logits


def test_an_adapter_begins_as_nothing_and_alone_is_trained():
    model, other = with_adapter()
    assert torch.equal(logits(model), logits(other))
    trained = {name for name, p in other.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    layers, projections, matrices = 2, 7, 2
    assert len(trained) == layers * projections * matrices
    assert adapter.has_adapter(other)
    assert not adapter.has_adapter(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_are_those_of_the_model_with_its_adapter(dtype):
    model, other = with_adapter(dtype)
    shake(other)
    frozen = copy.deepcopy(other.state_dict())
    weights = dict(adapter.merged(other))
    assert weights.keys() == model.state_dict().keys()
    assert {w.dtype for w in weights.values()} == {dtype}
    model.load_state_dict(weights)
    assert not torch.allclose(logits(model), logits(build("qwen3").to(dtype)), atol=0.05)
    room = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(logits(model), logits(other), atol=room, rtol=room)
    assert_same_weights(frozen, other.state_dict())  # no rounding is left behind
    lora = [p for name, p in other.named_parameters() if "lora_" in name]
    assert {p.dtype for p in lora} == {torch.float32}


def test_merged_weights_go_where_they_are_kept():
    """Beside the frozen ones a GPU may have no room for all of them."""
    _, other = with_adapter()
    other.set_input_embeddings(torch.nn.Embedding.from_pretrained(other.lm_head.weight))
    other.lm_head.weight = other.get_input_embeddings().weight  # tied
    stay = dict(adapter.merged(other))
    own = {id(p) for p in other.parameters()}
    for name, tensor in adapter.merged(other, torch.device("meta")):
        assert tensor.is_meta, name
        stay[name + " moved"] = tensor
    assert {p.device.type for p in other.parameters()} == {"cpu"}
    assert own == {id(p) for p in other.parameters()}
    tied = (stay[f"{name}.weight moved"] for name in ("lm_head", "model.embed_tokens"))
    assert torch._C._is_alias_of(*tied)
    assert stay["lm_head.weight"].data_ptr() == other.lm_head.weight.data_ptr()


def test_a_checkpoint_has_merged_weights_of_the_cpu(model_dir, tmp_path, monkeypatch):
    asked = []
    plain = checkpoint.merged

    def merged(model, device=None):
        asked.append(device)
        return plain(model, device)

    monkeypatch.setattr(checkpoint, "merged", merged)
    parts = Parts(model_dir)
    adapter.add_adapter(parts.model, LORA)
    parts.optimizer = make_optimizer(parts.model, TrainConfig())
    folder = parts.save(tmp_path)
    assert asked == [torch.device("cpu")]
    assert "lm_head.weight" not in load_file(folder / "model" / "model.safetensors")  # tied


def test_targets_by_name():
    _, other = with_adapter(config=replace(LORA, lora_targets=("q_proj", "v_proj")))
    names = {
        n.split(".lora_")[0].rpartition(".")[2] for n, _ in other.named_parameters() if "lora" in n
    }
    assert names == {"q_proj", "v_proj"}
    with pytest.raises(ConfigError, match=r"model\.lora_targets: expected names of linear layers"):
        with_adapter(config=replace(LORA, lora_targets=("nothing",)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_rank": 0}, "model.lora_rank: expected at least 1"),
        ({"lora_alpha": 8.0}, "model.lora_alpha: expected a positive finite number, with model.lo"),
        ({"lora_rank": 4, "lora_alpha": 0.0}, "model.lora_alpha: expected a positive"),
        ({"lora_rank": 4, "lora_targets": ()}, "model.lora_targets: expected at least one"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig("unused", **settings)


def test_without_peft_it_says_what_to_install(make_config, monkeypatch):
    monkeypatch.setattr(adapter, "find_spec", lambda _name: None)
    with pytest.raises(
        ConfigError, match=r"model\.lora_rank: .*pip install 'peft>=.*no module peft"
    ):
        run(make_config(model={"lora_rank": 4, "path": "not even a model"}))


def lora_config(make_config, run_dir, **sections):
    return make_config(
        model={"lora_rank": 4},
        train={"lr": 3e-2, "kl_coef": 1e-3, **sections.pop("train", {})},
        log={"run_dir": str(run_dir)},
        **sections,
    )


@pytest.mark.slow
def test_a_run_learns_and_its_checkpoint_is_a_whole_model(make_config, tmp_path, model_dir):
    from transformers import AutoModelForCausalLM

    config = lora_config(make_config, tmp_path / "run", train={"epochs": 6})
    run(config)
    rows = read_rows(config.log.run_dir)
    assert rows[-1]["reward"] > rows[1]["reward"] + 0.1
    assert rows[-1]["reused_fraction"] > 0  # the embedded engine follows the adapter
    assert max(row.get("logprob_gap", 0.0) for row in rows) < 1e-4
    folder = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    start, end = load_file(model_dir / "model.safetensors"), final_weights(config.log.run_dir)
    assert start.keys() == end.keys()
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert moved == {name for name in start if "_proj" in name}
    fresh = AutoModelForCausalLM.from_pretrained(folder / "model")
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    adapter.add_adapter(base, config.model)
    adapter.load_adapter(folder, base)
    torch.testing.assert_close(logits(fresh), logits(base), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(make_config, tmp_path, one_thread):
    whole = lora_config(make_config, tmp_path / "whole")
    run(whole)
    part = lora_config(make_config, tmp_path / "part")
    with SignalAtForward(60, signal.SIGTERM) as sent, pytest.raises(RunInterrupted):
        run(part)
    assert sent.count >= 60
    resume(part.log.run_dir)
    assert without_seconds(read_rows(part.log.run_dir)) == without_seconds(
        read_rows(whole.log.run_dir)
    )
    assert_same_weights(final_weights(part.log.run_dir), final_weights(whole.log.run_dir))


@pytest.mark.slow
def test_an_adapter_goes_on_beside_the_weights_that_it_was_trained_beside(
    make_config, tmp_path, model_dir, capsys
):
    config = lora_config(make_config, tmp_path / "run", train={"max_steps": 1})
    run(config)
    other = save_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(
        CheckpointError,
        match=r"model\.path: expected the weights .* \(fingerprint \w+\), got others in '.*other'",
    ):
        resume(config.log.run_dir, [f"model.path={other}", "train.max_steps=2"])
    with pytest.raises(CheckpointError, match=r"model\.path: .* in the same model\.dtype"):
        resume(config.log.run_dir, ["model.dtype=bfloat16", "train.max_steps=2"])
    moved = shutil.copytree(model_dir, tmp_path / "moved")
    capsys.readouterr()
    resume(config.log.run_dir, [f"model.path={moved}", "train.max_steps=2"])
    said = capsys.readouterr().err
    assert "note: model.path: the adapter is the checkpoint's; the weights beneath it, " in said
    assert "does not say which weights" not in said


@pytest.mark.slow
def test_a_checkpoint_that_does_not_say_what_its_adapter_belongs_to_is_resumed_with_a_note(
    make_config, tmp_path, capsys
):
    config = lora_config(make_config, tmp_path / "run", train={"max_steps": 1})
    run(config)
    folder = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    state = json.loads((folder / "state.json").read_text())
    assert len(state.pop("base_fingerprint")) == 32
    (folder / "state.json").write_text(json.dumps({**state, "format_version": 5}))
    (folder / "SHA256SUMS").unlink()
    write_manifest(folder)
    resume(config.log.run_dir, ["train.max_steps=2"])
    assert "does not say which weights its adapter was trained beside" in capsys.readouterr().err


def test_a_fingerprint_is_of_every_bit():
    model, other = build("qwen3"), build("qwen3")
    assert adapter.fingerprint(model) == adapter.fingerprint(other)
    with torch.no_grad():
        weight = list(other.parameters())[-1]
        weight.view(-1)[-1] = weight.view(-1)[-1].nextafter(torch.tensor(2.0))
    assert adapter.fingerprint(model) != adapter.fingerprint(other)


@pytest.mark.slow
def test_an_adapter_of_another_rank_is_refused(make_config, tmp_path):
    config = lora_config(make_config, tmp_path / "run", train={"max_steps": 1})
    run(config)
    with pytest.raises(
        CheckpointError, match=r"adapter\.safetensors: .*lora_rank: .* \[2, 64\], got \[4, 64\]"
    ):
        resume(config.log.run_dir, ["model.lora_rank=2", "train.max_steps=2"])
    folder = list_checkpoints(Path(config.log.run_dir) / "checkpoints")[-1]
    assert json.loads((folder / "state.json").read_text())["step"] == 1
