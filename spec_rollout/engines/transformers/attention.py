"""Attention on CPU over rows of different lengths, whose result for a token never depends on the
batch.

A padded attention reads every row's cache up to the longest row's length, and decoding is bound by
that reading; and it may sum in another order for another shape, so that a token's logits change in
the last bits with what is computed beside it. The kernel behind this function
(csrc/cpu/forward/causal_attention.cpp) reads each row at its own length and adds up keys one after
the other, whatever the shape, in float32 also where the cache is bfloat16.

Matrix products remain torch's. On CPU they keep one order of summation per output element where
they have enough rows (`row_counts`). `TransformersEngine.batch_invariance_error`
measures whether that does for a model on the machine at hand.
"""

from __future__ import annotations

from typing import Any

import torch

from spec_rollout._native import _C, num_threads

BATCH_INVARIANT_ATTENTION = "spec_rollout_batch_invariant"

# Arguments of transformers' attention functions that change what they compute.
_NOT_SERVED = ("softcap", "s_aux", "position_bias")


def span_mask(
    first_positions: torch.Tensor,
    last_positions: torch.Tensor,
    cache_rows: torch.Tensor,
    window: int | None,
) -> torch.Tensor:
    """What `batch_invariant_attention` takes as its mask.

    Args:
        first_positions, last_positions: Of each row's new tokens in the cache. [rows], int64.
        cache_rows: Row of the cache that each row belongs to; several rows may share one, and are
            computed together if they are neighbours. [rows], int64.
        window: Positions a token attends to, its own included; None is all.

    Returns:
        [rows, 1, 1, 4], int64: rank 4, so that models hand it on as it is.
    """
    windows = torch.full_like(first_positions, window or 0)
    columns = [first_positions, last_positions, windows, cache_rows]
    return torch.stack(columns, dim=1)[:, None, None]


def batch_invariant_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers (`AttentionInterface`), on CPU.

    Scores and sums are float32, whatever the dtype of keys and values.

    Args:
        module: The attention layer; not read.
        query: [rows, heads, tokens, head_dim], float32 or bfloat16.
        key, value: [cache rows, kv_heads, width, head_dim], of the same dtype; of each row
            what lies up to its last position is read.
        attention_mask: From `span_mask`.
        scaling: Factor of the scores; None is 1 / sqrt(head_dim).
        dropout: Must be 0: the engine does not train.

    Returns:
        [rows, tokens, heads, head_dim] of that dtype, 0 for padding after a row's last position,
        and None in place of the weights.
    """
    if dropout or any(kwargs.get(name) is not None for name in _NOT_SERVED):
        raise NotImplementedError(
            "batch-invariant attention has no soft cap, sinks, position bias or dropout; "
            "build the engine with batch_invariant=False"
        )
    rows, num_heads, num_tokens, head_dim = query.shape
    out = torch.empty((rows, num_tokens, num_heads, head_dim), dtype=torch.float32)
    query_dtype, query = query.dtype, query.float()
    _C.causal_attention(
        query if query.stride(-1) == 1 else query.contiguous(),
        key,
        value,
        attention_mask.view(rows, 4),
        head_dim**-0.5 if scaling is None else scaling,
        out,
        num_threads(),
    )
    return out.to(query_dtype), None
