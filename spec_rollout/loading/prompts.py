"""From what a row holds as its prompt to the token ids that the model gets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from spec_rollout.config.sections import ConfigError
from spec_rollout.loading.records import DataError, canonical, short, without_nulls
from spec_rollout.loading.template_time import asks_for_time, with_time

Message = dict[str, Any]

# Columns for the chat template, as other trainers name them.
_TOOLS = "tools"
_TEMPLATE_KWARGS = "chat_template_kwargs"
_EXPECTED = "expected text, a list of token ids or a list of chat messages (role, content)"


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A prompt as the model gets it.

    Attributes:
        ids: Token ids, at least one. [num_prompt_tokens], int32.
        rendered: The text that they stand for.
        prompt: The text for the rewards: that of the file, of messages the rendered one.
        messages: What the row held, where it held messages.
        identity: Bytes that stay the same whatever the chat template makes of the row; None if no
            template was applied, when the ids say it all.
    """

    ids: np.ndarray
    rendered: str
    prompt: str
    messages: list[Message] | None = None
    identity: bytes | None = None


@dataclass(frozen=True, slots=True)
class _Chat:
    """Arguments of the chat template."""

    messages: list[Message]
    tools: list[Any] | None
    kwargs: dict[str, Any]
    continues: bool


class PromptRenderer:
    """Renders the prompts of a run.

    Args:
        tokenizer: A transformers tokenizer.
        vocab_size: Token ids must be below it.
        chat_template, system_prompt, continue_final_message: See `DataConfig`.
        now: What chat templates see as the time; None is the time of the construction.

    Raises:
        ConfigError: if a chat template is asked for and the tokenizer has none.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        vocab_size: int,
        chat_template: bool | None = None,
        system_prompt: str | None = None,
        continue_final_message: bool = False,
        now: datetime | None = None,
    ) -> None:
        has_template = getattr(tokenizer, "chat_template", None) is not None
        reason = "chat_template is false" if has_template else "the tokenizer has no chat template"
        self.uses_template = has_template and chat_template is not False
        for key, value in (("chat_template", chat_template), ("system_prompt", system_prompt)):
            if value and not self.uses_template:
                raise ConfigError(
                    f"data.{key}: expected to be left out, as {reason}, got {short(value)}"
                )
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._choice = chat_template
        self._system_prompt = system_prompt
        self._continue = continue_final_message
        self._pinned = now is not None
        self.now = (now or datetime.now()).replace(microsecond=0)
        self._prefix, self._suffix = _put_around(tokenizer)
        added = tokenizer.added_tokens_decoder.values()
        self._special_tokens = sorted(token.content for token in added if token.special)
        # The first prompts of their kinds, for `notes` and `asked_for_time`.
        self._first_chat: _Chat | None = None
        self._first_text: str | None = None
        self._cut_suffix = self._cut_prefix = False
        self.asked_for_time = False

    @property
    def settings(self) -> list[Any]:
        """What, besides the rows, makes prompts other prompts."""
        return [self.uses_template, self._system_prompt, self._continue]

    def render(self, value: Any, record: Mapping[str, Any], where: str) -> RenderedPrompt:
        """Renders the prompt of a row.

        Args:
            value: Text, token ids or chat messages.
            record: The whole row, for its columns `tools` and `chat_template_kwargs`.
            where: Row and column, for messages.

        Raises:
            DataError: naming the row and what was expected.
        """
        if isinstance(value, str):
            prompt = self._text(value, record, where)
        elif isinstance(value, list) and value and all(isinstance(m, Mapping) for m in value):
            prompt = self._messages(value, record, where)
        elif isinstance(value, list) and all(type(i) is int for i in value):
            prompt = self._token_ids(value, record, where)
        else:
            raise DataError(f"{where}: {_EXPECTED}, got {short(value)}")
        if len(prompt.ids) == 0:
            raise DataError(f"{where}: expected at least one token, got none from {short(value)}")
        if prompt.ids.max() >= self._vocab_size:
            raise DataError(
                f"{where}: expected token ids below the model's {self._vocab_size}, the tokenizer "
                f"gave {prompt.ids.max()}"
            )
        return prompt

    def notes(self) -> list[str]:
        """What a user should know of the prompts rendered so far, a line each."""
        notes = []
        if self._first_text is not None and self._choice is None:
            notes.append(
                "text prompts go through the tokenizer's chat template (data.chat_template = false "
                f"leaves them as they are); the first reads {short(self._first_text, 400)}"
            )
        if self._cut_prefix:
            tokens = "".join(self._tokenizer.convert_ids_to_tokens(self._prefix))
            notes.append(f"texts that begin with {tokens!r} are not given another one")
        if self._cut_suffix:
            tokens = "".join(self._tokenizer.convert_ids_to_tokens(self._suffix))
            notes.append(f"the tokenizer ends a text with {tokens!r}; prompts are used without it")
        if self._pinned and self._first_chat is not None and self.asked_for_time:
            chat = self._first_chat
            if self._apply(chat, self.now) != self._apply(chat, datetime.now()):
                notes.append(
                    "the chat template would render prompts otherwise today; they are kept as of "
                    f"data.template_time = {self.now.isoformat()!r}"
                )
        return notes

    def _text(self, value: str, record: Mapping[str, Any], where: str) -> RenderedPrompt:
        if self.uses_template:
            if not value:
                raise DataError(f"{where}: expected at least one token, got none from ''")
            chat = self._chat([{"role": "user", "content": value}], record, where)
            ids, rendered = self._rendered(chat, where)
            self._first_text = self._first_text or rendered
            self._not_rendered_yet(value, rendered, where)
            return RenderedPrompt(ids, rendered, value, identity=_identity(chat))
        self._no_template_columns(record, where)
        ids = self._tokenized(value, where)
        if self._suffix and ids[-len(self._suffix) :].tolist() == self._suffix:
            ids = ids[: -len(self._suffix)]
            self._cut_suffix = True
        if self._prefix and ids[: 2 * len(self._prefix)].tolist() == 2 * self._prefix:
            ids = ids[len(self._prefix) :]
            self._cut_prefix = True
        return RenderedPrompt(ids, value, value)

    def _not_rendered_yet(self, value: str, rendered: str, where: str) -> None:
        """Raises DataError if a text seems to have the chat template in it already."""
        if self._choice is not None or not any(token in value for token in self._special_tokens):
            return
        around = rendered.replace(value, "")
        for token in self._special_tokens:
            if token in value and token in around:
                raise DataError(
                    f"{where}: expected text without the {token!r} of the chat template, got "
                    f"{short(value)} (data.chat_template = false takes texts as they are, true "
                    "puts them through the template all the same)"
                )

    def _messages(
        self, value: Sequence[Any], record: Mapping[str, Any], where: str
    ) -> RenderedPrompt:
        if not self.uses_template:
            reason = (
                "data.chat_template is false"
                if self._choice is False
                else "the tokenizer has no chat template"
            )
            raise DataError(f"{where}: expected text, as {reason}, got chat messages")
        messages = [_message(item, where) for item in value]
        chat = self._chat(messages, record, where)
        ids, rendered = self._rendered(chat, where)
        return RenderedPrompt(ids, rendered, rendered, messages, _identity(chat))

    def _token_ids(self, value: list[int], record: Mapping[str, Any], where: str) -> RenderedPrompt:
        if self._system_prompt is not None:
            raise DataError(
                f"{where}: expected text or chat messages with data.system_prompt, got token ids"
            )
        for i in value:
            if not 0 <= i < self._vocab_size:
                raise DataError(
                    f"{where}: expected token ids from 0 to {self._vocab_size - 1}, got {i}"
                )
        text = self._tokenizer.decode(value)
        return RenderedPrompt(np.asarray(value, dtype=np.int32), text, text)

    def _chat(self, messages: list[Message], record: Mapping[str, Any], where: str) -> _Chat:
        if self._system_prompt is not None and messages[0]["role"] not in ("system", "developer"):
            messages = [{"role": "system", "content": self._system_prompt}, *messages]
        continues = messages[-1]["role"] == "assistant"
        if continues and not self._continue:
            raise DataError(
                f"{where}: expected a last message of another role than 'assistant' (responses "
                "continue such a message with data.continue_final_message = true), got "
                f"{short(messages[-1])}"
            )
        tools = _from_json(record.get(_TOOLS))
        if tools is not None and not isinstance(tools, list):
            raise DataError(f"{where}: column {_TOOLS!r}: expected a list, got {short(tools)}")
        kwargs = _from_json(record.get(_TEMPLATE_KWARGS))
        if kwargs is not None and not isinstance(kwargs, Mapping):
            raise DataError(
                f"{where}: column {_TEMPLATE_KWARGS!r}: expected a table, got {short(kwargs)}"
            )
        return _Chat(messages, without_nulls(tools), without_nulls(kwargs or {}), continues)

    def _no_template_columns(self, record: Mapping[str, Any], where: str) -> None:
        """With `chat_template = false` they are columns like others."""
        for name in (_TOOLS, _TEMPLATE_KWARGS):
            if self._choice is None and record.get(name) is not None:
                raise DataError(
                    f"{where}: column {name!r} is for the chat template, which the tokenizer does "
                    "not have (with data.chat_template = false it is a column like others)"
                )

    def _rendered(self, chat: _Chat, where: str) -> tuple[np.ndarray, str]:
        try:
            text = self._apply(chat, self.now)
        except Exception as error:  # whatever a template does
            reason = " ".join(str(error).split())
            raise DataError(
                f"{where}: the chat template failed: {type(error).__name__}: {reason[:300]}"
            ) from error
        self._first_chat = self._first_chat or chat
        return self._tokenized(text, where, add_special_tokens=False), text

    def _apply(self, chat: _Chat, now: datetime) -> str:
        template = self._tokenizer.get_chat_template(None, chat.tools)
        times: Mapping[str, Any] = {}
        if asks_for_time(template):
            self.asked_for_time = True
            template, times = with_time(template, now)
        text = self._tokenizer.apply_chat_template(
            chat.messages,
            tools=chat.tools,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=not chat.continues,
            continue_final_message=chat.continues,
            **times,
            **chat.kwargs,
        )
        assert isinstance(text, str)
        return text

    def _tokenized(self, text: str, where: str, **options: Any) -> np.ndarray:
        try:
            return np.asarray(self._tokenizer(text, **options)["input_ids"], dtype=np.int32)
        except Exception as error:  # a lone surrogate, say
            reason = " ".join(str(error).split())
            raise DataError(
                f"{where}: expected text that the tokenizer takes, got {short(text)}: "
                f"{type(error).__name__}: {reason[:200]}"
            ) from error


def _put_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens that the tokenizer puts before and after every text; an end-of-sequence token, say."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    for start in range(len(whole) - len(plain), -1, -1):
        if plain and whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []


def _message(item: Mapping[str, Any], where: str) -> Message:
    """A message with text as its content; keys without a value (Parquet) are left out."""
    message = without_nulls(item)
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                raise DataError(f"{where}: expected messages of text, got the part {short(part)}")
        message["content"] = content = "".join(part["text"] for part in content)
    # An assistant that only calls tools says nothing.
    ok = isinstance(content, str) or (content is None and message.get("tool_calls"))
    if not ok or not isinstance(message.get("role"), str):
        raise DataError(f"{where}: {_EXPECTED}, got the message {short(item)}")
    return message


def _from_json(value: Any) -> Any:
    """The value; of a text that is JSON, what it says: so nested columns are often stored."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _identity(chat: _Chat) -> bytes:
    return canonical([chat.messages, chat.tools, chat.kwargs, chat.continues])
