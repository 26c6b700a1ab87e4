"""What a run is made of is checked before anything is written."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import build as tiny_model
from tiny_runs import save_tiny_model

from spec_rollout import cli
from spec_rollout.config.sections import ConfigError
from spec_rollout.train import components
from spec_rollout.train.checkpoint import CheckpointError, list_checkpoints, load_state
from spec_rollout.train.checks import check_attention
from spec_rollout.train.components import build
from spec_rollout.train.forward import check_padded_rows, padded_gap
from spec_rollout.train.trainer import run


def test_a_reference_with_another_vocabulary_is_refused(make_config, model_dir, tmp_path) -> None:
    other = shutil.copytree(model_dir, tmp_path / "other")
    path = other / "config.json"
    config = json.loads(path.read_text())
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(other)
    model.resize_token_embeddings(config["vocab_size"] + 3)
    model.save_pretrained(other)
    run = make_config(model={"reference": str(other)}, train={"kl_coef": 0.1})
    size = config["vocab_size"]
    with pytest.raises(
        ConfigError,
        match=rf"model\.reference: expected .* vocabulary of {size} tokens, got one of {size + 3}",
    ):
        build(run)
    assert not Path(run.log.run_dir).exists()


@pytest.mark.parametrize("key", ["path", "reference"])
def test_a_resumed_run_has_the_reference_that_it_had(make_config, tmp_path, key: str) -> None:
    weights = save_tiny_model(tmp_path / "weights")
    config = make_config(model={key: str(weights)}, train={"kl_coef": 0.1, "max_steps": 1})
    run(config)
    folder = list_checkpoints(Path(config.log.run_dir) / "checkpoints")[-1]
    parts = build(config, folder)
    assert parts.notes == ()
    assert len(parts.state.reference_fingerprint) == 32
    assert parts.state.reference_fingerprint == load_state(folder).reference_fingerprint
    without = replace(config, train=replace(config.train, kl_coef=0.0))
    assert build(without, folder).state == parts.state  # it may come back

    save_tiny_model(weights, seed=1)
    build(without, folder)
    with pytest.raises(
        CheckpointError,
        match=rf"^model\.{key}: expected the weights that are the reference of the run's KL, .*"
        rf"\(fingerprint \w+\), got others in '.*weights'",
    ):
        build(config, folder)
    assert cli.main(["eval", "--run", config.log.run_dir]) == 0  # trains nothing

    path = folder / "state.json"
    state = {**json.loads(path.read_text()), "format_version": 7}
    del state["reference_fingerprint"]
    path.write_text(json.dumps(state))
    (note,) = build(config, folder).notes
    assert f"model.{key}: the checkpoint does not say which weights are the reference" in note


def test_flash_attention_is_not_for_float32(make_config) -> None:
    flash = {"attention": "flash_attention_2"}
    with pytest.raises(ConfigError, match=r'^model\.attention: expected another .*, got "flash_at'):
        check_attention(make_config(model=flash))
    check_attention(make_config(model=flash, train={"compute_dtype": "bfloat16"}))
    check_attention(make_config(model={**flash, "dtype": "bfloat16"}))
    check_attention(make_config())


def test_a_model_of_which_no_checkpoint_could_be_written_is_refused(
    make_config, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = components.load_policy

    def load(config):
        policy = plain(config)
        policy.model.generation_config.early_stopping = True  # without beams
        return policy

    monkeypatch.setattr(components, "load_policy", load)
    run = make_config()
    with pytest.raises(
        ConfigError, match=r"model\.path: expected a generation_config\.json .*early_stopping"
    ):
        build(run)
    assert not Path(run.log.run_dir).exists()


def test_an_engine_that_seeds_the_process_changes_no_random_state(
    make_config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM does, in the trainer's process; rewards of a resumed run would draw the same again."""
    plain, drawn = components.make_engine, []
    for seed in (None, 0, 1):

        def make(*args, seed=seed, **kw):
            engine = plain(*args, **kw)
            if seed is not None:
                random.seed(seed)
                torch.manual_seed(seed)
            return engine

        monkeypatch.setattr(components, "make_engine", make)
        build(make_config(train={"seed": 7}))
        drawn.append((random.random(), float(torch.rand(()))))
    assert drawn[0] == drawn[1] == drawn[2]


@pytest.mark.parametrize("name", ["llama", "qwen3_sliding", "mistral_sliding", "gpt2"])
def test_padded_rows_of_sound_models_are_those_alone(name: str) -> None:
    assert padded_gap(tiny_model(name), 128).largest < 1e-4


def test_a_model_whose_padding_reaches_its_rows_is_refused() -> None:
    model = tiny_model("llama")
    original = model.model.forward

    def shifted(*args, **kw):
        output = original(*args, **kw)
        # What no causal model does: every token sees the mean of its row, padding included.
        hidden = output.last_hidden_state
        output.last_hidden_state = hidden + hidden.mean(1, keepdim=True)
        return output

    model.model.forward = shifted
    with pytest.raises(ValueError, match=r"LlamaForCausalLM gives log-probs that differ by \d"):
        check_padded_rows(model, 128)


def test_the_tiny_model_of_the_tests_passes(tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path)).eval()
    assert padded_gap(model, 128).is_rounding
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()


def test_so_many_prompts_are_evaluated_as_the_config_says(make_config, write_rows) -> None:
    rows = [{"prompt": f"{a} 2 =?\n", "answer": str(a + 2)} for a in range(3)]
    heldout = str(write_rows(rows, "heldout.jsonl"))
    for most, expected in ((None, 3), (2, 2)):
        parts = build(make_config(eval={"path": heldout, "num_heldout_prompts": most}))
        assert {name: len(found) for name, found in parts.eval_rows.items()} == {
            "train": 4,
            "heldout": expected,
        }
