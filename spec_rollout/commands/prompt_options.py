"""Messages of loading prompts, models and rewards, with options in the place of a config's keys."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from spec_rollout.config.sections import ConfigError
from spec_rollout.loading.data import DataError

# Phrases that come before keys.
_PHRASES = (
    (
        "data.chat_template = false takes texts as they are, true puts them through the template "
        "all the same",
        "--raw-prompts takes texts as they are",
    ),
    ("data.chat_template = false", "--raw-prompts"),
    ("data.chat_template is false", "--raw-prompts is given"),
    ("as chat_template is false", "as --raw-prompts is given"),
)
_CONTINUE = "data.continue_final_message = true"
_CONTINUES = f" (responses continue such a message with {_CONTINUE})"
_KEYS = {
    "data.prompt_column": "--prompt-column",
    "data.answer_column": "--answer-column",
    "data.system_prompt": "--system-prompt",
    "model.path": "--model",
    "model.device": "--device",
    "model.attention": "--attention",
    "rollout.engine": "--engine",
    "reward.functions": "--reward",
}
_KEY = re.compile(rf"(?<![\w./-])(?:{'|'.join(map(re.escape, _KEYS))})\b(?!\.)")


def with_options(message: str, *, continues: bool = False) -> str:
    """A message that names options in the place of keys.

    Args:
        message: Of loading.
        continues: Whether the command has `--continue-final-message`. Where it has not, the advice
            to continue a message of the assistant's is left out.
    """
    if continues:
        message = message.replace(_CONTINUE, "--continue-final-message")
    message = message.replace(_CONTINUES, "")
    for phrase, said in _PHRASES:
        message = message.replace(phrase, said)
    message = re.sub(r"^data: ", "--prompts: ", message)
    return _KEY.sub(lambda key: _KEYS[key[0]], message)


@contextmanager
def naming_options() -> Iterator[None]:
    """Errors about a config and its data name options; also a decorator."""
    try:
        yield
    except (ConfigError, DataError) as error:
        raise type(error)(with_options(str(error))) from None
