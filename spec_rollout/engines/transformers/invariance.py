"""Measures whether a model's logits depend on what is computed together, on the machine at hand."""

from __future__ import annotations

import torch

from spec_rollout.engines.transformers.forward import ModelForward

# (rows, tokens of a row per forward): whole rows at once, decoding, and shapes between.
_SHAPES = ((33, 48), (33, 1), (16, 1), (6, 1), (1, 1), (5, 9), (1, 32), (19, 20))
_LEN = 48
_STRIDE = 5  # logits of every fifth token, to bound memory


def batch_invariance_error(forward: ModelForward, *, seed: int = 0) -> float:
    """Largest difference between logits of the same tokens computed in different shapes.

    The same 33 rows of 48 random tokens go through the model whole, token by token, and in chunks,
    all and some of the rows. Must run inside `forward.session()`.

    Returns:
        0.0 if every logit has the same bits each time.
    """
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(forward.vocab_size, (_SHAPES[0][0], _LEN), generator=generator)
    token_ids = token_ids.to(forward.device)
    expected = _logits(forward, token_ids, _LEN)
    error = 0.0
    for rows, chunk in _SHAPES[1:]:
        actual = _logits(forward, token_ids[:rows], chunk)
        error = max(error, float((actual - expected[:rows]).abs().max()))
    return error


def _logits(forward: ModelForward, token_ids: torch.Tensor, chunk: int) -> torch.Tensor:
    """[rows, tokens / _STRIDE, vocab], float32."""
    rows = token_ids.shape[0]
    cache = forward.new_cache(rows, _LEN + chunk)
    pieces = []
    for start in range(0, _LEN, chunk):
        tokens = token_ids[:, start : start + chunk]
        count = tokens.shape[1]
        wanted = [column for column in range(count) if (start + column) % _STRIDE == 0]
        columns = torch.tensor(wanted, dtype=torch.int64, device=forward.device)
        first = torch.arange(rows, device=forward.device)[:, None] * count
        starts = torch.full((rows,), start, device=forward.device)
        counts = torch.full_like(starts, count)
        select = (first + columns).flatten()
        logits = forward(cache, tokens.flatten(), starts, counts, start + count, select)
        pieces.append(logits.float().view(rows, len(wanted), logits.shape[-1]))
    return torch.cat(pieces, dim=1)
