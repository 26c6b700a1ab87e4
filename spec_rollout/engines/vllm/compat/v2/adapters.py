"""Adapters of the output head, where a request has several rows of logits.

vLLM's `LoraState.make_lora_inputs` names one adapter a request for the head, as if each had one
row; a request with draft tokens has one more than it has of them. From the second row of the first
request on, rows would go through the head without their adapter, or through another request's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from spec_rollout.engines.vllm.compat.v2.config import table_of

_NUM_ROWS = "_spec_rollout_logits_rows"  # of the runner: rows of logits of each request


def counting_rows(original: Callable) -> Callable:
    """For `GPUModelRunner.prepare_inputs`: notes how many rows of logits each request has."""

    def prepare_inputs(self: Any, *args: Any, **kw: Any) -> Any:
        batch = original(self, *args, **kw)
        if self.lora_config and table_of(self) is not None:
            setattr(self, _NUM_ROWS, np.diff(batch.cu_num_logits_np))
        return batch

    return prepare_inputs


def naming_each_row(original: Callable) -> Callable:
    """For `GPUModelRunner._set_active_loras`: the adapter of every row of logits.

    Left as it is where the rows are named already, and in runs that nothing was prepared for.
    """

    def _set_active_loras(self: Any, of_requests: tuple, *args: Any, **kw: Any) -> None:
        num_rows = self.__dict__.pop(_NUM_ROWS, None)
        if num_rows is not None and len(of_requests) == len(num_rows):
            of_requests = tuple(np.repeat(of_requests, num_rows).tolist())
        original(self, of_requests, *args, **kw)

    return _set_active_loras
