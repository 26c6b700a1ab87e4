"""Texts of a run as the page shows them, whatever they hold."""

from __future__ import annotations

import re
from collections.abc import Mapping

MAX_CHARS = 200_000  # of one text
_DEEPEST = 8  # levels of nested facts
# All that HTML and UTF-8 do not have: control characters and lone surrogates.
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def _picture(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)  # the control pictures of Unicode
    return f"\\u{code:04x}"


def visible(text: str) -> str:
    """The text with control characters (but tab and line feed) and lone surrogates as what can be
    seen: \N{SYMBOL FOR NULL}, \\ud800."""
    return _INVISIBLE.sub(_picture, text)


def cut(text: str, limit: int = MAX_CHARS) -> str:
    """The text, or its beginning and how much follows."""
    if len(text) <= limit:
        return text
    return f"{text[:limit]}\N{HORIZONTAL ELLIPSIS} ({len(text) - limit:,} more characters)"


def fact_text(value: object, depth: int = 0) -> str:
    """A fact of `environment.json` in words."""
    if depth > _DEEPEST:
        return "\N{HORIZONTAL ELLIPSIS}"
    if isinstance(value, Mapping):
        facts = ((key, fact_text(v, depth + 1)) for key, v in value.items() if v is not None)
        return ", ".join(f"{key} {text}" for key, text in facts)
    if isinstance(value, list):
        return "; ".join(fact_text(v, depth + 1) for v in value) or "none"
    return "unknown" if value is None else cut(plain(value), 2_000)


def plain(value: object) -> str:
    """`str` of anything that a JSON or TOML file holds; what has no such text is named by its
    type."""
    try:
        return str(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; nested too deeply
        return f"({type(value).__name__})"
