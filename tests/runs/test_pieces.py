"""Pieces of a text, one per token."""

from __future__ import annotations

import pytest
from byte_tokenizer import THINK, byte_tokenizer

from spec_rollout.runs.pieces import pieces


def _bytes(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


def test_a_character_is_the_piece_of_its_last_byte() -> None:
    ids = list("aé€😀z".encode())
    assert pieces(ids, _bytes) == ["a", "", "é", "", "", "€", "", "", "", "😀", "z"]
    assert pieces([], _bytes) == []


def test_bytes_that_are_no_text_are_shown_once_known_to_be_none() -> None:
    assert pieces([*b"a\xc3", *b"b\xff"], _bytes) == ["a", "", "\ufffdb", "\ufffd"]
    assert pieces([*b"ab\xe2\x82"], _bytes) == ["a", "b", "", "\ufffd"]  # cut off by the limit


@pytest.mark.parametrize(
    "text", ["plain text, and more of it " * 9, "日本語のテキスト" * 20, "😀" * 50, "e\u0301" * 40]
)
def test_long_texts_are_cut_where_their_characters_end(text: str) -> None:
    data = text.encode()
    found = pieces(list(data), _bytes)
    assert "".join(found) == text
    for index, piece in enumerate(found):
        assert (
            piece
            == data[: index + 1].decode(errors="ignore")[
                len(data[:index].decode(errors="ignore")) :
            ]
        )


def test_garbage_of_any_length_takes_time_in_proportion_and_loses_nothing() -> None:
    decoded = 0

    def decode(ids: list[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return _bytes(ids)

    ids = [0x80 + index * 7 % 128 for index in range(2000)]
    found = pieces(ids, decode)
    assert "".join(found) == _bytes(ids)
    assert len(found) == len(ids)
    assert decoded < 60 * len(ids)


def test_words_that_a_tokenizer_joins_with_spaces_of_its_own() -> None:
    words = ["one", "two", "three"]

    def decode(ids: list[int]) -> str:
        return " ".join(words[i] for i in ids)  # the first one without a space

    assert pieces([0, 1, 2] * 40, decode) == [
        "one",
        " two",
        " three",
        *[" one", " two", " three"] * 39,
    ]


def test_of_a_tokenizer_of_transformers() -> None:
    tokenizer = byte_tokenizer()
    ids = [THINK, *"né".encode()]
    assert pieces(ids, tokenizer.decode) == ["<think>", "n", "", "é"]
