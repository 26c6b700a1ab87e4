"""How long a row may get while a model's forward is still a function of that row alone."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

# Rotary embeddings that change for every position once the longest row of a batch passes a length.
_BY_LONGEST_ROW = ("dynamic", "longrope")


# Where configs say how far a token of some layer sees.
_WINDOWS = (
    "sliding_window",
    "window_size",
    "attention_window",
    "attention_chunk_size",
    "keep_window_size",
)
_CONFIGURED = "the model's max_position_embeddings"


@dataclass(frozen=True, slots=True)
class RowLimit:
    """Most tokens of prompt and response together.

    Attributes:
        usual: Where nothing else is asked for; None is no limit.
        most: What may be asked for; None is no limit.
        reason: Why not more, for messages.
    """

    usual: int | None
    most: int | None
    reason: str = _CONFIGURED


def row_limit(model: torch.nn.Module, config: Any) -> RowLimit:
    """The limit of a model.

    Scaled rotary embeddings reach further than the config's `max_position_embeddings` where that
    is the length before scaling (yarn). Two kinds choose their frequencies by the longest row of a
    batch (longrope, dynamic scaling): beyond the original length a row's logits would depend on
    its company, and keys that were cached before would be of other frequencies.

    Args:
        model: The causal LM.
        config: Its text config.
    """
    positions = getattr(config, "max_position_embeddings", None)
    usual, most, reason = positions, positions, _CONFIGURED
    if positions is None:
        return RowLimit(None, None)
    for rope in _ropes(config):
        kind, factor = _kind(rope), float(rope.get("factor") or 1.0)
        original = rope.get("original_max_position_embeddings")
        if any(name in kind for name in _BY_LONGEST_ROW):
            limit = _original_len(model, original or positions)
            if usual is None or limit <= usual:
                usual = most = limit
                reason = (
                    f"the original length of the model's rotary embedding of type {kind}, which "
                    "beyond it depends on the longest row of a batch"
                )
        elif kind == "yarn":
            reach = int((original or positions) * factor)
            usual, most = max(usual or 0, reach), max(most or 0, reach)
            reason = "the length that the model's rotary embedding is scaled to"
        elif kind == "linear" and factor > 1.0:
            # Whether max_position_embeddings is the length before or after scaling is not said.
            most = max(most or 0, int(positions * factor))
            reason = "the length that the model's rotary embedding is scaled to"
    return RowLimit(usual, most, reason)


def declared(config: Any, name: str) -> Any:
    """A config's value, or None where its class knows no such key.

    transformers keeps whatever a config.json holds: a Llama that came from a Mistral may still
    name a window, which its layers do not have.
    """
    known = hasattr(type(config), name) or any(
        name in vars(cls).get("__annotations__", {}) for cls in type(config).__mro__
    )
    if not known:  # configs were plain classes before transformers 5
        known = name in inspect.signature(type(config).__init__).parameters
    return getattr(config, name, None) if known else None


def windows(config: Any) -> list[int]:
    """How far tokens see in layers that do not see all.

    Args:
        config: A model's text config.
    """
    found = (declared(config, name) for name in _WINDOWS)
    return [window for window in found if isinstance(window, int) and window > 0]


def _ropes(config: Any) -> Iterator[Mapping[str, Any]]:
    """Parameters of every rotary embedding: one, or one per type of layer."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(rope, Mapping):
        return
    nested = [value for value in rope.values() if isinstance(value, Mapping)]
    yield from nested or [rope]


def _kind(rope: Mapping[str, Any]) -> str:
    kind = str(rope.get("rope_type") or rope.get("type") or "default")
    return "longrope" if kind == "su" else kind


def _original_len(model: torch.nn.Module, configured: int) -> int:
    """What the modules were built with: the config may have been changed since."""
    built = [
        length
        for module in model.modules()
        if isinstance(length := getattr(module, "original_max_seq_len", None), int)
        and isinstance(getattr(module, "rope_type", None), str)
        and module.rope_type != "longrope"  # holds the scaled length under this name
    ]
    return min([configured, *built])
