"""A response token by token, as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder makes of the first bytes of a character
_WINDOW, _CONTEXT = 32, 8  # tokens decoded together at most, and kept when the window moves on


def pieces(token_ids: Sequence[int], decode: Callable[[list[int]], str]) -> list[str]:
    """What each token adds to the text: one piece per token, together exactly the decoded text.

    A character whose bytes are spread over tokens is the piece of the last of them; the others'
    pieces are empty.

    Args:
        token_ids: Of one response.
        decode: The tokenizer's.
    """
    ids = list(token_ids)
    ends: list[int] = []
    start, seen, end = 0, 0, 0  # the window's first token; of its text, what has been given out
    for index in range(len(ids)):
        text = decode(ids[start : index + 1])
        whole = len(text) - text.endswith(_UNFINISHED)
        if whole > seen:
            end += whole - seen
            seen = whole
        ends.append(end)
        if index + 1 - start >= _WINDOW:
            start = index + 1 - _CONTEXT
            text = decode(ids[start : index + 1])
            seen = len(text) - text.endswith(_UNFINISHED)
    # Cut from the text itself, so that a tokenizer that joins tokens in ways of its own loses
    # nothing.
    text = decode(ids) if ids else ""
    if ends:
        ends[-1] = len(text)
    return [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]
