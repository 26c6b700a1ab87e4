"""Reference of `spec_rollout.ops.assemble`: row by row, token by token."""

from __future__ import annotations

import torch


def assemble(
    prompt_ids: torch.Tensor,
    cu_prompt_lens: torch.Tensor,
    prefix_ids: torch.Tensor,
    cu_prefix_lens: torch.Tensor,
    accepted_lens: torch.Tensor,
    continuation_ids: torch.Tensor | None = None,
    cu_continuation_lens: torch.Tensor | None = None,
    *,
    layout: str = "packed",
    prefix_logprobs: torch.Tensor | None = None,
    continuation_logprobs: torch.Tensor | None = None,
    pad_token_id: int = 0,
    max_prompt_len: int | None = None,
    max_response_len: int | None = None,
) -> dict[str, torch.Tensor | None]:
    """Fields of `Assembled` by name, on CPU, from the arguments of the op."""
    rows = []  # per row: tokens as (id, is_response, logprob), and the prompt's length
    for r, accepted in enumerate(accepted_lens.tolist()):
        prompt = prompt_ids[cu_prompt_lens[r] : cu_prompt_lens[r + 1]].tolist()
        start = int(cu_prefix_lens[r])
        tokens = [(token, False, 0.0) for token in prompt]
        for i in range(start, start + accepted):
            logprob = 0.0 if prefix_logprobs is None else float(prefix_logprobs[i])
            tokens.append((int(prefix_ids[i]), True, logprob))
        if continuation_ids is not None:
            assert cu_continuation_lens is not None
            for i in range(int(cu_continuation_lens[r]), int(cu_continuation_lens[r + 1])):
                logprob = 0.0 if continuation_logprobs is None else float(continuation_logprobs[i])
                tokens.append((int(continuation_ids[i]), True, logprob))
        rows.append((tokens, len(prompt)))

    prompt_width = max((p for _, p in rows), default=0)
    response_width = max((len(t) - p for t, p in rows), default=0)
    width = max((len(t) for t, _ in rows), default=0)
    if layout != "split" and max_prompt_len is not None and max_response_len is not None:
        width = max_prompt_len + max_response_len
    if layout == "split":
        prompt_width = prompt_width if max_prompt_len is None else max_prompt_len
        width = prompt_width + (response_width if max_response_len is None else max_response_len)

    pad = (pad_token_id, False, 0.0, 0, False)  # id, response, logprob, position, attended
    padded = []
    for tokens, prompt_len in rows:
        cells = [(*token, position, True) for position, token in enumerate(tokens)]
        free = width - len(cells)
        before = {"packed": 0, "right": 0, "left": free, "split": prompt_width - prompt_len}[layout]
        after = 0 if layout == "packed" else free - before
        padded.append([pad] * before + cells + [pad] * after)
    flat = [cell for row in padded for cell in row]
    shape = (len(flat),) if layout == "packed" else (len(rows), width)

    def field(index: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([cell[index] for cell in flat], dtype=dtype).reshape(shape)

    lens = torch.tensor([0] + [len(tokens) for tokens, _ in rows])
    return {
        "input_ids": field(0, torch.int64),
        "attention_mask": None if layout == "packed" else field(4, torch.bool),
        "position_ids": field(3, torch.int64),
        "response_mask": field(1, torch.bool),
        "logprobs": None if prefix_logprobs is None else field(2, torch.float32),
        "cu_lens": lens.cumsum(0) if layout == "packed" else None,
    }
