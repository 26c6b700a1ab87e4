"""A token per character, lossless on everything the demo writes, and reloadable."""

from __future__ import annotations

import random

import pytest

from spec_rollout.demo.task import Teacher, draw_problem, format_prompt, teacher_response

pytest.importorskip("transformers")

from spec_rollout.demo.tokenizer import CHARACTERS, build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_every_demo_text_round_trips_one_token_per_character(tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(200):
        start, terms = draw_problem(rng, "pretrain")
        text = format_prompt(start, terms) + teacher_response(start, terms, rng, Teacher())
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_ids_are_pinned(tokenizer) -> None:
    # The shipped weights depend on them.
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer(CHARACTERS)["input_ids"] == list(range(3, 3 + len(CHARACTERS)))
    assert tokenizer("\n\n")["input_ids"] == [3, 3]


def test_unknown_characters_become_the_unknown_token_and_special_tokens_are_skipped(
    tokenizer,
) -> None:
    assert tokenizer("aÜ1")["input_ids"] == [
        *tokenizer("a")["input_ids"],
        2,
        *tokenizer("1")["input_ids"],
    ]
    assert tokenizer.decode([*tokenizer("84")["input_ids"], 1, 0], skip_special_tokens=True) == "84"


def test_saved_tokenizer_reloads_the_same(tokenizer, tmp_path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "62 +7 -8 =?\nfrom 62. add 7 is 69; answer: 61"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.eos_token_id, loaded.pad_token_id) == (1, 0)
