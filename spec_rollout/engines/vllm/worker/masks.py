"""Restrictions of a request's vocabulary that do not depend on the tokens drawn."""

from __future__ import annotations

import math
from typing import Any

import torch


class LogitMasks:
    """min_p, min_tokens, logit_bias and allowed_token_ids of one request, in vLLM's order.

    Args:
        params: vLLM's SamplingParams.
        device: Of the logits.
    """

    __slots__ = (
        "allowed",
        "bias_ids",
        "bias_values",
        "log_min_p",
        "min_tokens",
        "stop_ids",
        "temperature",
    )

    def __init__(self, params: Any, device: torch.device) -> None:
        def ids(values: Any) -> torch.Tensor:
            return torch.tensor(sorted(values), dtype=torch.int64, device=device)

        self.allowed = ids(params.allowed_token_ids) if params.allowed_token_ids else None
        bias = params.logit_bias or {}
        self.bias_ids = torch.tensor(list(bias), dtype=torch.int64, device=device)
        self.bias_values = torch.tensor(list(bias.values()), dtype=torch.float32, device=device)
        self.min_tokens = params.min_tokens
        self.stop_ids = ids(params.all_stop_token_ids)
        self.log_min_p = math.log(params.min_p) if params.min_p > 0.0 else None
        self.temperature = params.temperature

    @classmethod
    def of(cls, params: Any, device: torch.device) -> LogitMasks | None:
        """None if the request restricts nothing."""
        on = (
            params.min_p > 0.0 or params.logit_bias or params.allowed_token_ids or params.min_tokens
        )
        return cls(params, device) if on else None

    def apply(self, logits: torch.Tensor, index: int) -> None:
        """Changes logits in place.

        Args:
            logits: Row i predicts response token `index` + i. [num_rows, vocab].
            index: From the start of the response.
        """
        if self.allowed is not None:
            kept = logits[:, self.allowed]
            logits.fill_(-math.inf)
            logits[:, self.allowed] = kept
        if self.bias_ids.numel():
            logits[:, self.bias_ids] += self.bias_values.to(logits.dtype)
        early = self.min_tokens - index
        if early > 0 and self.stop_ids.numel():
            logits[:early, self.stop_ids] = -math.inf
        if self.log_min_p is not None:
            # p < min_p * p_max, with p of logits / temperature
            floor = logits.amax(dim=-1, keepdim=True) + self.temperature * self.log_min_p
            logits.masked_fill_(logits < floor, -math.inf)
