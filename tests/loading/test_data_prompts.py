"""What the model gets for a row: text, chat messages, templates and what tokenizers add."""

from __future__ import annotations

from datetime import datetime

import pytest
from byte_tokenizer import BOS, CHATML, EOS, IM_END, VOCAB_SIZE, byte_tokenizer

from spec_rollout.config.sections import ConfigError, DataConfig
from spec_rollout.loading.data import DataError, load_prompts

USER = {"role": "user", "content": "1+1?"}
ASSISTANT = {"role": "assistant", "content": "It is "}


@pytest.fixture
def load(write_rows):
    """Rows of the given prompts; other keys go to each row or to `load_prompts`."""

    def load(*prompts, tokenizer=None, columns=None, **options):
        path = write_rows([{"prompt": p, "answer": "2", **(columns or {})} for p in prompts])
        tokenizer = tokenizer or byte_tokenizer(CHATML)
        return load_prompts(path, tokenizer, vocab_size=VOCAB_SIZE, **options)

    return load


def rendered(data):
    """The text of each row's ids."""
    tokenizer = byte_tokenizer()
    texts = [tokenizer.decode(row.prompt_ids) for row in data.rows]
    assert texts == [row.rendered for row in data.rows]
    return texts


def test_text_goes_through_the_chat_template_of_the_tokenizer(load):
    data = load("1+1?")
    assert rendered(data) == ["<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"]
    assert data.rows[0].prompt == "1+1?"  # rewards get the text of the file
    assert IM_END in data.rows[0].prompt_ids  # the template's own, as one token
    (note,) = data.notes
    assert "data.chat_template = false" in note
    assert "<|im_start|>user\\n1+1?<|im_end|>" in note


def test_the_template_can_be_asked_for_or_turned_off(load):
    asked = load("1+1?", chat_template=True)
    assert rendered(asked) == ["<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"]
    assert asked.notes == ()
    off = load("1+1?", chat_template=False)
    assert (rendered(off), off.notes) == (["1+1?"], ())
    none = load("1+1?", tokenizer=byte_tokenizer())
    assert (rendered(none), none.notes) == (["1+1?"], ())
    with pytest.raises(
        DataError, match=r":1: prompt: expected text, as data\.chat_template is fal"
    ):
        load([USER], chat_template=False)
    with pytest.raises(DataError, match=r":1: prompt: expected text, as the tokenizer has no chat"):
        load([USER], tokenizer=byte_tokenizer())
    with pytest.raises(ConfigError, match=r"data\.chat_template: .* no chat template, got True"):
        load("1+1?", tokenizer=byte_tokenizer(), chat_template=True)


def test_a_text_with_the_template_in_it_is_not_put_through_it_again(load):
    text = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(
        DataError,
        match=r":2: prompt: expected text without the '<\|im_end\|>' of the chat template",
    ):
        load("1+1?", text)
    assert rendered(load(text, chat_template=False)) == [text]
    assert rendered(load(text, chat_template=True))[0].count("<|im_start|>user") == 2
    # A special token that is not the template's is the text's own.
    assert "<think>" in rendered(load("Think in <think>?"))[0]


def test_an_empty_text_asks_for_nothing(load):
    for options in ({}, {"chat_template": False}):
        with pytest.raises(DataError, match=":1: prompt: expected at least one token, got none"):
            load("", **options)


def test_messages_are_rendered_and_handed_to_rewards_as_text(load):
    data = load([USER], [{"role": "system", "content": "Add."}, USER])
    first, second = rendered(data)
    assert first == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert second == "<|im_start|>system\nAdd.<|im_end|>\n" + first
    assert [row.prompt for row in data.rows] == [first, second]
    assert data.rows[0].messages == [USER]
    assert data.notes == ()


def test_a_system_prompt_comes_first_unless_the_row_has_one(load):
    own = [{"role": "system", "content": "Own."}, USER]
    text, messages, with_own = rendered(load("1+1?", [USER], own, system_prompt="Be brief."))
    assert text == messages
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?")
    assert with_own.startswith("<|im_start|>system\nOwn.<|im_end|>\n<|im_start|>user\n1+1?")
    with pytest.raises(ConfigError, match=r"data\.system_prompt: .* no chat template"):
        load("1+1?", tokenizer=byte_tokenizer(), system_prompt="Be brief.")
    with pytest.raises(ConfigError, match=r"data\.system_prompt: .* as chat_template is false"):
        load("1+1?", chat_template=False, system_prompt="Be brief.")
    with pytest.raises(DataError, match=r":1: prompt: .*data\.system_prompt, got token ids"):
        load([1, 2], system_prompt="Be brief.")
    with pytest.raises(ConfigError, match=r"data\.system_prompt: expected to be left out"):
        DataConfig("d", chat_template=False, system_prompt="Be brief.")


def test_a_last_message_of_the_assistants_is_continued_or_refused(load):
    with pytest.raises(
        DataError, match=r":1: prompt: expected a last .*data\.continue_final_message = true.*It is"
    ):
        load([USER, ASSISTANT])
    both = load([USER, ASSISTANT], [USER], continue_final_message=True)
    continued, answered = rendered(both)
    # No token ends the turn, and the space at the end stays.
    assert continued == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\nIt is "
    assert answered == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"


def test_tools_and_variables_of_the_row_reach_the_template(load):
    tools = [{"type": "function", "function": {"name": "add"}}]
    shown = (
        '<|im_start|>tools\n[{"type": "function", "function": {"name": "add"}}]<|im_end|>\n'
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n<think></think>"
    )
    columns = {"tools": tools, "chat_template_kwargs": {"enable_thinking": False}}
    assert rendered(load([USER], "1+1?", columns=columns)) == [shown, shown]
    # As text that is JSON, and with the nulls of a file whose rows all have the same keys.
    columns = {
        "tools": '[{"type": "function", "function": {"name": "add"}}]',
        "chat_template_kwargs": {"enable_thinking": False, "add_generation_prompt": None},
    }
    assert rendered(load([USER], columns=columns)) == [shown]
    assert rendered(load([USER], columns={"tools": None, "chat_template_kwargs": None})) == [
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    ]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"tools": "add"}, r":1: prompt: column 'tools': expected a list, got 'add'"),
        ({"tools": {"name": "f"}}, r"column 'tools': expected a list, got \{'name': 'f'\}"),
        ({"chat_template_kwargs": [1]}, r"'chat_template_kwargs': expected a table, got \[1\]"),
        ({"chat_template_kwargs": {"tokenize": True}}, "the chat template failed: TypeError"),
    ],
)
def test_columns_for_the_template_that_it_cannot_use(columns, message, load):
    with pytest.raises(DataError, match=message):
        load([USER], columns=columns)


def test_without_a_template_such_columns_are_columns_like_others_if_asked(load):
    data = load("1+1?", columns={"tools": ["hammer"]}, chat_template=False)
    assert data.rows[0].columns == {"tools": ["hammer"]}


def test_contents_in_parts_are_text_or_refused(load):
    parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]
    assert rendered(load([{"role": "user", "content": parts}])) == rendered(load([USER]))
    with pytest.raises(
        DataError, match=r":1: prompt: expected messages of text, got the part .*image"
    ):
        load([{"role": "user", "content": [*parts, {"type": "image", "url": "x.png"}]}])
    with pytest.raises(DataError, match=r":1: prompt: expected text, .* got the message"):
        load([{"role": "user", "content": None}])


def test_a_template_that_fails_names_the_row(load):
    template = (
        "{% for m in messages %}{% if m.role == 'user' and loop.index0 == 0 %}{{ m.content }}"
        "{% else %}{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
    )
    with pytest.raises(
        DataError, match=r"rows\.jsonl:2: prompt: the chat template failed: .*roles must alternate"
    ):
        load([USER], [USER, USER], tokenizer=byte_tokenizer(template))
    with pytest.raises(DataError, match=r"rows\.jsonl:1: prompt: expected text that the tokenizer"):
        load([{"role": "user", "content": "\ud800"}])


def test_tokens_that_the_tokenizer_puts_after_a_text_end_no_prompt(load):
    around = byte_tokenizer(around="<bos> $A <eos>")
    assert around("ab")["input_ids"] == [BOS, 97, 98, EOS]
    data = load("ab", "ab<eos>", tokenizer=around)
    # What the file says stays.
    assert [row.prompt_ids.tolist() for row in data.rows] == [[BOS, 97, 98], [BOS, 97, 98, EOS]]
    (note,) = data.notes
    assert "'<eos>'" in note
    before = load("ab", tokenizer=byte_tokenizer(around="<bos> $A"))
    assert ([row.prompt_ids.tolist() for row in before.rows], before.notes) == ([[BOS, 97, 98]], ())
    two = load("ab", tokenizer=byte_tokenizer(around="$A <pad> <eos>"))
    assert [row.prompt_ids.tolist() for row in two.rows] == [[97, 98]]


def test_nothing_is_put_around_what_the_template_renders(load):
    data = load("ab", [USER], tokenizer=byte_tokenizer("<bos>" + CHATML, "<bos> $A <eos>"))
    assert [list(row.prompt_ids).count(BOS) for row in data.rows] == [1, 1]
    assert not any(EOS in row.prompt_ids for row in data.rows)


def test_a_text_that_begins_with_the_first_token_gets_no_second(load):
    around = byte_tokenizer(around="<bos> $A")
    data = load("<bos>ab", "ab", tokenizer=around)
    assert [row.prompt_ids.tolist() for row in data.rows] == 2 * [[BOS, 97, 98]]
    assert data.notes == (
        f"{data.rows[0].source[:-2]}: texts that begin with '<bos>' are not given another one",
    )


# With what Llama 3 has in its template, and a format that has it all.
DATED = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}"
    "{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}"
    "Today: {{ date_string }}, {{ strftime_now('%H:%M, 100%% of day %-d, %%d') }}\n"
    "{% for m in messages %}{{ m.content }}{% endfor %}"
)


def test_a_template_sees_the_time_it_is_given(load):
    data = load("1+1?", tokenizer=byte_tokenizer(DATED), template_time="2026-03-07T09:05:00")
    assert rendered(data) == ["Today: 07 Mar 2026, 09:05, 100% of day 7, %d\n1+1?"]
    assert data.template_time == "2026-03-07T09:05:00"
    assert any("data.template_time = '2026-03-07T09:05:00'" in note for note in data.notes)


def test_a_template_without_a_given_time_sees_the_present_one(load):
    before = datetime.now()
    data = load("1+1?", tokenizer=byte_tokenizer(DATED))
    at = datetime.fromisoformat(data.template_time)
    assert before.replace(microsecond=0) <= at <= datetime.now()
    assert rendered(data)[0].startswith(f"Today: {at:%d %b %Y}, {at:%H:%M}, ")
    assert not any("template_time" in note for note in data.notes)
    assert load("1+1?").template_time is None  # the template does not ask


def test_a_time_that_is_none_is_refused():
    with pytest.raises(ConfigError, match=r"data\.template_time: expected a time .* got 'today'"):
        DataConfig("d", template_time="today")
