"""The shipped checkpoint speaks the task and is right about half of the time; its script trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from spec_rollout.demo import model_dir
from spec_rollout.demo.checkpoint import main, sampled_accuracy
from spec_rollout.demo.task import MAX_RESPONSE_TOKENS, heldout_problems


@pytest.fixture(scope="module")
def shipped():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_dir(), dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(model_dir())


def test_checkpoint_is_small_and_complete() -> None:
    sizes = {path.name: path.stat().st_size for path in model_dir().iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "pretrain.json"} <= sizes.keys()
    assert sum(sizes.values()) < 5_000_000


@pytest.mark.slow
def test_sampled_accuracy_leaves_room_to_learn(shipped) -> None:
    model, tokenizer = shipped
    accuracy = sampled_accuracy(model, tokenizer, heldout_problems(128), seed=0)
    assert 0.25 <= accuracy <= 0.65


@pytest.mark.slow
def test_policy_keeps_entropy_and_responses_fit(shipped) -> None:
    model, tokenizer = shipped
    prompt = heldout_problems(1)[0].prompt
    torch.manual_seed(0)
    ids = torch.tensor(tokenizer([prompt] * 32)["input_ids"])
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0,
        max_new_tokens=MAX_RESPONSE_TOKENS, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    tokens = output.sequences[:, ids.shape[1] :]
    live = torch.cumsum(tokens == tokenizer.eos_token_id, 1).roll(1, 1)
    live[:, 0] = 0
    live = live == 0  # up to and including the end of sequence
    lens = live.sum(1)
    assert 60 <= lens.float().mean() <= 200
    assert (tokens == tokenizer.eos_token_id).any(1).float().mean() > 0.9
    log_probs = torch.log_softmax(torch.stack(output.logits, 1), -1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)[live].mean()
    assert entropy > 0.2  # nats per character


@pytest.mark.slow
def test_short_pretraining_learns_and_writes_a_loadable_folder(tmp_path, capsys) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "model"
    assert main(["--out", str(out), "--short"]) == 0
    report = capsys.readouterr().out
    first, last = (float(x) for x in report.rsplit("loss ", 1)[1].split(",")[0].split(" -> "))
    assert last < 0.7 * first
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.config.vocab_size >= len(tokenizer)
    assert json.loads(Path(out, "pretrain.json").read_text())["seed"] == 0


def test_bad_pretraining_arguments_are_named() -> None:
    from spec_rollout.demo.checkpoint import PretrainConfig

    with pytest.raises(ValueError, match="num_steps"):
        PretrainConfig(num_steps=0)
    with pytest.raises(ValueError, match="lr"):
        PretrainConfig(lr=-1.0)
