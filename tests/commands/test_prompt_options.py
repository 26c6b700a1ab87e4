"""Messages about prompts and models as a command without a config says them."""

from __future__ import annotations

from typing import Any

import pytest
from byte_tokenizer import CHATML, IM_START, VOCAB_SIZE, byte_tokenizer

from spec_rollout.commands.prompt_options import naming_options, with_options
from spec_rollout.config.sections import ConfigError
from spec_rollout.loading.columns import AUTO, recognised
from spec_rollout.loading.data import DataError
from spec_rollout.loading.prompts import PromptRenderer

CHAT = [{"role": "user", "content": "1+1?"}]


def said(prompt: Any, template: str | None = CHATML, **options: Any) -> str:
    """What is said of a prompt that cannot be rendered."""
    try:
        with naming_options():
            renderer = PromptRenderer(byte_tokenizer(template), vocab_size=VOCAB_SIZE, **options)
            renderer.render(
                prompt, {"prompt": prompt, "tools": [{"name": "t"}]}, "d.jsonl:1: prompt"
            )
    except (ConfigError, DataError) as error:
        return str(error)
    raise AssertionError("nothing was said")


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        (lambda: said(CHAT, chat_template=False), "expected text, as --raw-prompts is given, got"),
        (
            lambda: said("1", chat_template=False, system_prompt="S"),
            "--system-prompt: expected to be left out, as --raw-prompts is given, got",
        ),
        (lambda: said([IM_START], system_prompt="S"), "chat messages with --system-prompt, got"),
        (
            lambda: said([*CHAT, {"role": "assistant", "content": "It"}]),
            "of another role than 'assistant', got",
        ),
        (lambda: said("<|im_start|>user"), "(--raw-prompts takes texts as they are)"),
        (lambda: said("1", None), "(with --raw-prompts it is a column like others)"),
    ],
)
def test_errors_name_options(message: Any, wanted: str) -> None:
    assert wanted in message()
    assert "data." not in message()


def test_keys_are_options_and_nothing_else_is_changed() -> None:
    assert with_options("model.path: expected x, got 'a'") == "--model: expected x, got 'a'"
    text = "data: expected at least one row in 'my/model.path.jsonl', got none"
    assert with_options(text) == text.replace("data:", "--prompts:")
    with pytest.raises(DataError) as found, naming_options():
        recognised({"a": 1}, "d.jsonl:1", AUTO, AUTO)
    assert str(found.value).endswith("got columns 'a' (--prompt-column names another)")
    assert with_options("rollout.max_tokens: 1") == "rollout.max_tokens: 1"
