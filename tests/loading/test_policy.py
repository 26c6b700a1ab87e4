"""Model folders: what is wrong with one is said in one message, and no weight is ever made up."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file

from spec_rollout.config.sections import ConfigError, ModelConfig
from spec_rollout.loading.policy import load_policy, resolve_device


@pytest.fixture
def folder(model_dir, tmp_path):
    return shutil.copytree(model_dir, tmp_path / "copy")


def load(path, **options):
    return load_policy(ModelConfig(str(path), device="cpu", **options))


def test_whole_folder(folder):
    policy = load(folder)
    assert policy.vocab_size == len(policy.tokenizer)
    assert policy.eos_token_ids == (policy.tokenizer.eos_token_id,)
    assert policy.max_length == 128
    assert not policy.model.training
    assert next(policy.model.parameters()).dtype == torch.float32


def test_dtype(folder):
    assert next(load(folder, dtype="bfloat16").model.parameters()).dtype == torch.bfloat16


def test_end_of_sequence_of_model_and_tokenizer(folder):
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [7, 5]}))
    assert load(folder).eos_token_ids == (1, 5, 7)


def test_no_folder(tmp_path):
    with pytest.raises(
        ConfigError, match=r"model\.path: expected a folder .* found nothing at .*absent"
    ):
        load(tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"model\.path: expected a folder .* found a file at"):
        load(tmp_path / "file")


def test_no_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(
        ConfigError, match=r"found no config\.json in .* \(it holds .*model\.safetensors"
    ):
        load(folder)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"found no weights in .* \(it holds config\.json"):
        load(folder)


def test_truncated_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match=r"model\.path: .* cannot load .*copy'"):
        load(folder)


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_incomplete_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    if change == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(
        ConfigError, match=r"model\.path: .*layers\.1\.mlp\.up_proj\.weight|mismatch"
    ):
        load(folder)


def test_no_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ConfigError, match=r"model\.path: expected a tokenizer beside the model"):
        load(folder)


def test_devices():
    assert resolve_device("cpu").type == "cpu"
    with pytest.raises(
        ConfigError, match=r"model\.device: expected auto, cpu or cuda\[:n\], got 'gpu'"
    ):
        resolve_device("gpu")
    with pytest.raises(ConfigError, match=r"model\.device: expected a device of this machine"):
        resolve_device("cuda:99")


@pytest.mark.parametrize("value", [40_000, -1, "</s>", [1, "</s>"]], ids=str)
def test_an_end_of_sequence_that_is_no_id_of_the_vocabulary_is_refused(folder, value):
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": value}))
    with pytest.raises(ConfigError, match=r"model\.path: expected .*(end-of-sequence id|config)"):
        load(folder)


@pytest.mark.parametrize(
    ("given", "read_back"),
    [
        ({"temperature": 0.6, "top_p": 0.9}, (0.6, 0.9, True, 0)),
        ({"pad_token_id": -1}, (None, None, None, None)),
        ({"top_p": 0.9, "pad_token_id": -1}, (None, 0.9, True, None)),
        ({"temperature": 0.0}, (None, None, None, 0)),
        ({"do_sample": False, "temperature": 0.6}, (None, None, False, 0)),
    ],
)
def test_a_generation_config_that_transformers_would_not_write_is_mended(
    folder, tmp_path, given, read_back
):
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **given}))
    policy = load(folder)
    policy.model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / path.name).read_text())
    names = ("temperature", "top_p", "do_sample", "pad_token_id")
    assert tuple(saved.get(name) for name in names) == read_back
    assert saved["eos_token_id"] == policy.tokenizer.eos_token_id


def test_a_generation_config_that_cannot_be_mended_is_left_as_it_was(folder):
    path = folder / "generation_config.json"
    given = {**json.loads(path.read_text()), "early_stopping": True, "top_p": 0.9}
    path.write_text(json.dumps(given))
    found = load(folder).model.generation_config
    assert (found.early_stopping, found.top_p, found.do_sample) == (True, 0.9, None)


def test_an_id_of_the_hub_comes_with_what_to_do():
    with pytest.raises(ConfigError, match=r"hf download no-body/no-model --local-dir DIR"):
        load("no-body/no-model")


def test_the_longest_row_is_as_the_rotary_embedding_has_it(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    config["rope_parameters"] = {**config["rope_parameters"], **rope}
    path.write_text(json.dumps(config))
    assert load(folder).max_length == 512


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        ("spda", "ValueError: Specified .*spda"),
        ("flash_attention_2", "ImportError: .*[Ff]lash"),
    ],
)
def test_an_attention_that_cannot_be_had_is_named(folder, attention, reason):
    if attention.startswith("flash") and (find_spec("flash_attn") or find_spec("kernels")):
        pytest.skip("it can be had")
    with pytest.raises(
        ConfigError,
        match=rf'^model\.attention: expected "sdpa" or "eager" for .*, got "{attention}" \({reason}',
    ):
        load(folder, attention=attention)
    # What is wrong whatever the attention is, is not blamed on it.
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"^model\.path: "):
        load(folder, attention=attention)
