"""Registration of ops with torch: schema, CPU and CUDA implementation, fake."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("spec_rollout", "DEF")


def register_op(
    schema: str, *, fake: Callable[..., Any]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator that registers an implementation for CPU and CUDA and returns the op to call.

    Args:
        schema: `name(arguments) -> results`, in torch's schema language.
        fake: The same signature on tensors without data: output shapes, dtypes and devices.
    """
    name = schema.partition("(")[0]

    def decorate(implementation: Callable[..., Any]) -> Callable[..., Any]:
        _LIBRARY.define(schema)
        for backend in ("CPU", "CUDA"):
            _LIBRARY.impl(name, implementation, backend)
        torch.library.register_fake(f"spec_rollout::{name}", fake, lib=_LIBRARY)
        # The overload itself: looking it up in the packet at each call costs as much as the call.
        return getattr(torch.ops.spec_rollout, name).default

    return decorate
