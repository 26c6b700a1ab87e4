"""Models of transformers that live beside an engine in its process.

vLLM runs the models that it has no code of its own for on transformers' classes, and changes these
classes for good: a trainer's model of the same class could be neither called nor made any more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def only_vllms(original: Callable) -> Callable:
    """`_support_torch_compile` that changes only the models of a class that vLLM makes itself."""

    def _support_torch_compile(cls: Any, *args: Any, **kwargs: Any) -> Any:
        from transformers import PreTrainedModel
        from vllm.config import get_current_vllm_config_or_none

        if not issubclass(cls, PreTrainedModel):
            return original(cls, *args, **kwargs)
        plain = cls.__init__
        decorated = original(cls, *args, **kwargs)
        init, call = cls.__init__, cls.__call__
        if init is plain:  # decorated before
            return decorated

        @functools.wraps(plain)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            if "vllm_config" in kwargs or get_current_vllm_config_or_none() is not None:
                init(self, *args, **kwargs)
            else:
                plain(self, *args, **kwargs)

        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            is_vllms = "do_not_compile" in self.__dict__
            return (call if is_vllms else torch.nn.Module.__call__)(self, *args, **kwargs)

        cls.__init__, cls.__call__ = __init__, __call__
        return decorated

    return _support_torch_compile
