"""The tokens with which a model ends a text, by its own configurations."""

from __future__ import annotations

from typing import Any


def eos_token_ids(*named: Any) -> tuple[int, ...]:
    """All ids that a model's configurations name, ascending.

    Args:
        named: What each has as `eos_token_id`: an id, several, or None.
    """
    values = [value if isinstance(value, list | tuple) else [value] for value in named]
    return tuple(sorted({token for ids in values for token in ids if token is not None}))
