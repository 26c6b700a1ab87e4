"""Attention on CPU whose result for a token does not depend on what is computed with it, bit for bit.

A token's attention is the same sum whether its row is decoded alone or teacher-forced with others,
but a library may add it up in another order for another shape. Float32 kernels on CPU keep one order
per output element as long as a few shape rules hold (found by trial on x86 with MKL: `torch.equal`
over row counts 1 to 4,096, query counts 1 to 256, widths 16 to 1,024, head sizes 16 to 128). This
function keeps to the shapes for which they hold. `TransformersEngine.batch_invariance_error` measures
whether they hold for a model on the machine at hand.
"""

from __future__ import annotations

from typing import Any

import torch

BATCH_INVARIANT_ATTENTION = "spec_rollout_batch_invariant"

# A matrix product of fewer rows than this may take a kernel of its own.
MIN_ROWS = 16
# Torch's CPU flash attention works through queries in blocks of 32 if there are fewer than 192.
_QUERY_BLOCK = 32
_MAX_QUERIES = 160
# A product over more keys than this is split in two sums, at a border that depends on the shape.
_KEY_BLOCK = 384


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
    """An attention function of transformers (`AttentionInterface`), for float32 on CPU.

    Args:
        module: The attention layer; not read.
        query: [rows, heads, queries, head_dim].
        key, value: [rows, kv_heads, width, head_dim]; width is a multiple of 16.
        attention_mask: Additive, 0 or -inf. [rows, 1, queries, width], float32.
        scaling: Factor of the scores; None is 1 / sqrt(head_dim).
        dropout: Must be 0: the engine does not train.

    Returns:
        [rows, queries, heads, head_dim], and None in place of the weights.
    """
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None or dropout:
        raise NotImplementedError(
            "batch-invariant attention has no soft cap, sinks or dropout; "
            "build the engine with batch_invariant=False"
        )
    rows, num_heads, num_queries, head_dim = query.shape
    num_kv_heads = key.shape[1]
    # The queries that share a KV head become further queries of that head: keys are not repeated.
    folded = num_heads // num_kv_heads * num_queries
    padded = _pad_queries(folded, head_dim)
    queries = query.reshape(rows, num_kv_heads, folded, head_dim)
    mask = attention_mask
    if folded != num_queries:
        mask = mask.repeat(1, 1, num_heads // num_kv_heads, 1)
    if padded != folded:
        queries = torch.nn.functional.pad(queries, (0, 0, 0, padded - folded))
        mask = torch.nn.functional.pad(mask, (0, 0, 0, padded - folded))
    parts = [
        _attend(
            queries[:, :, i : i + _MAX_QUERIES],
            key,
            value,
            mask[:, :, i : i + _MAX_QUERIES],
            scaling,
        )
        for i in range(0, padded, _MAX_QUERIES)
    ]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    out = out[:, :, :folded].reshape(rows, num_heads, num_queries, value.shape[3])
    return out.transpose(1, 2), None


def _pad_queries(count: int, head_dim: int) -> int:
    """Queries to compute so that no block of them is so small that it takes a kernel of its own."""
    smallest = 2 if head_dim <= 32 else 8
    last = count % _QUERY_BLOCK
    return count + smallest - last if 0 < last < smallest else count


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    """Flash attention over blocks of keys. [rows, heads, queries, head_dim]."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    width = key.shape[2]
    if width <= _KEY_BLOCK:
        return flash(query, key, value, attn_mask=mask, scale=scaling)[0]
    outs, log_sums = [], []
    for i in range(0, width, _KEY_BLOCK):
        block = slice(i, i + _KEY_BLOCK)
        out, log_sum = flash(
            query, key[:, :, block], value[:, :, block], attn_mask=mask[..., block], scale=scaling
        )
        unseen = torch.isneginf(mask[..., block]).all(-1)  # flash gives these a log-sum of 0
        outs.append(out)
        log_sums.append(log_sum.masked_fill(unseen, -torch.inf))
    log_sum = torch.stack(log_sums)
    weights = torch.exp(log_sum - log_sum.amax(0))
    # Added one after the other: the blocks a shorter width lacks weigh exactly 0.
    total, norm = outs[0] * weights[0].unsqueeze(-1), weights[0]
    for out, weight in zip(outs[1:], weights[1:], strict=True):
        total = total + out * weight.unsqueeze(-1)
        norm = norm + weight
    return total / norm.unsqueeze(-1)
