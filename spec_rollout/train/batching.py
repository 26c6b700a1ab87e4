"""Micro-batches of rollouts: sorted by length, right-padded, bounded by tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from spec_rollout.ops import assemble
from spec_rollout.packed import cu_lens_from
from spec_rollout.types import Rollouts


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Some rows of a batch of rollouts, as one forward pass takes them.

    Attributes:
        rows: Rows of the rollouts. [num_rows], int64.
        input_ids: Prompt and response without its last token, right-padded. [num_rows, length],
            int64.
        positions: Where each response token is predicted: row * length + column. [num_tokens],
            int64.
        token_ids: The response tokens, in the order of `positions`. [num_tokens], int64.
        token_index: Their places in the rollouts' packed arrays. [num_tokens], int64.
        token_rows: Row of the rollouts each belongs to. [num_tokens], int64.
    """

    rows: torch.Tensor
    input_ids: torch.Tensor
    positions: torch.Tensor
    token_ids: torch.Tensor
    token_index: torch.Tensor
    token_rows: torch.Tensor

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device, except what indexes the rollouts' own (CPU) arrays."""
        return MicroBatch(
            self.rows,
            self.input_ids.to(device),
            self.positions.to(device),
            self.token_ids.to(device),
            self.token_index,
            self.token_rows,
        )


def ranges(starts: torch.Tensor, lens: torch.Tensor) -> torch.Tensor:
    """start_0, start_0 + 1, ... (len_0 of them), start_1, ... end to end.

    [batch], [batch] int64 -> [sum(lens)], int64.
    """
    ends = lens.cumsum(0)
    total = int(ends[-1]) if lens.numel() else 0
    return torch.arange(total) + torch.repeat_interleave(starts - (ends - lens), lens)


def micro_batches(rollouts: Rollouts, rows: Sequence[int], max_tokens: int) -> Iterator[MicroBatch]:
    """Splits rows into micro-batches of at most `max_tokens` tokens, padding included.

    One row may exceed that. Rows are sorted by length, longest first, so that little is padded and
    a lack of memory shows at once.

    Args:
        rollouts: Every chosen row has a response.
        rows: Rows to take.
    """
    if len(rows) == 0:
        return
    chosen = torch.as_tensor(rows, dtype=torch.int64)
    lens = (rollouts.prompt_lens + rollouts.response_lens - 1)[chosen]
    order = torch.sort(lens, descending=True, stable=True).indices
    chosen, sizes = chosen[order], lens[order].tolist()
    start = 0
    while start < len(sizes):
        count = max(1, max_tokens // sizes[start])
        yield _micro_batch(rollouts, chosen[start : start + count], sizes[start])
        start += count


def _micro_batch(rollouts: Rollouts, rows: torch.Tensor, length: int) -> MicroBatch:
    prompt_lens, response_lens = rollouts.prompt_lens[rows], rollouts.response_lens[rows]
    prompt_ids = rollouts.prompt_ids[ranges(rollouts.cu_prompt_lens[rows], prompt_lens)]
    token_index = ranges(rollouts.cu_response_lens[rows], response_lens)
    token_ids = rollouts.response_ids[token_index]
    assembled = assemble(
        prompt_ids,
        cu_lens_from(prompt_lens),
        token_ids,
        cu_lens_from(response_lens),
        response_lens - 1,  # the last token is predicted, never fed
        layout="right",
    )
    row_starts = torch.arange(rows.numel()) * length
    return MicroBatch(
        rows=rows,
        input_ids=assembled.input_ids,
        positions=ranges(row_starts + prompt_lens - 1, response_lens),
        token_ids=token_ids.long(),
        token_index=token_index,
        token_rows=torch.repeat_interleave(rows, response_lens),
    )
