"""Models that are right for short rows only: GPT-Neo, whose local attention measures its window from
the width of the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spec_rollout import cli
from spec_rollout.config.sections import ConfigError
from spec_rollout.demo.tokenizer import build_tokenizer
from spec_rollout.loading.records import DataError
from spec_rollout.train.components import build
from spec_rollout.train.trainer import run

WINDOW = 32


@pytest.fixture(scope="module")
def gpt_neo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    folder = tmp_path_factory.mktemp("gpt_neo")
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=WINDOW,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    GPTNeoForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def eager(folder: Path) -> dict[str, str]:
    return {"path": str(folder), "attention": "eager"}


def test_it_is_refused_and_the_key_is_named(make_config, gpt_neo) -> None:
    with pytest.raises(
        ConfigError, match=rf"rollout\.engine: model: .*GPTNeo.*max_model_len={WINDOW}"
    ):
        build(make_config(model=eager(gpt_neo)))


def test_it_has_one_attention(make_config, gpt_neo) -> None:
    with pytest.raises(ConfigError, match=r'model\.attention: expected "eager" .*, got "sdpa"'):
        build(make_config(model={"path": str(gpt_neo)}))


def test_within_its_window_it_is_right_and_trains(make_config, gpt_neo) -> None:
    config = make_config(
        model=eager(gpt_neo),
        rollout={"max_model_len": WINDOW},
        train={"max_steps": 2},
    )
    parts = build(config)
    assert parts.engine.max_model_len == parts.policy.max_length == WINDOW
    prompts = [row.prompt_ids for row in parts.data.rows]
    rollouts = parts.session.rollout(prompts, 2, parts.sampling, step=0, epoch=0)
    cu, prompt_cu = rollouts.cu_response_lens.tolist(), rollouts.cu_prompt_lens.tolist()
    for row in range(rollouts.batch):
        prompt = rollouts.prompt_ids[prompt_cu[row] : prompt_cu[row + 1]].long()
        response = rollouts.response_ids[cu[row] : cu[row + 1]].long()
        with torch.no_grad():
            logits = parts.policy.model(torch.cat([prompt, response])[None]).logits[0]
        alone = logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, response[:, None])[:, 0]
        torch.testing.assert_close(
            rollouts.logprobs[cu[row] : cu[row + 1]], alone, atol=1e-4, rtol=0
        )
    assert run(config).totals.steps == 2


def test_prompts_and_responses_have_to_fit(make_config, gpt_neo, model_dir) -> None:
    for path in (gpt_neo, model_dir):
        config = make_config(model=eager(path), rollout={"max_model_len": WINDOW, "max_tokens": 28})
        with pytest.raises(DataError, match=rf"to fit the config's {WINDOW} tokens, got \d prompt"):
            build(config)


def test_the_check_can_be_left_out(make_config, gpt_neo) -> None:
    parts = build(make_config(model=eager(gpt_neo), rollout={"check_model": False}))
    assert parts.engine.max_model_len == 128


@pytest.mark.parametrize("length", [1, 0, -5])
def test_a_length_has_room_for_a_prompt_and_a_token(make_config, length: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"rollout\.max_model_len: expected at least 2, got {length}"
    ):
        make_config(rollout={"max_model_len": length})


def test_more_than_the_model_takes_is_refused(make_config) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.engine: max_model_len: expected 2 to 128"):
        build(make_config(rollout={"max_model_len": 129}))


def test_the_rollout_command_takes_it(gpt_neo, write_rows, tmp_path, capsys) -> None:
    prompts = write_rows([{"prompt": "1 2 =?\n"}])
    argv = [
        "rollout", "--model", str(gpt_neo), "--prompts", str(prompts), "--out", str(tmp_path / "out"),
        "--max-tokens", "12", "--device", "cpu", "--attention", "eager",
    ]  # fmt: skip
    assert cli.main(argv) == 2
    assert f"max_model_len={WINDOW}" in capsys.readouterr().err
    assert cli.main([*argv, "--max-model-len", str(WINDOW)]) == 0
