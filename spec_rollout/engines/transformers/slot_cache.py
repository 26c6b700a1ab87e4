"""KV storage whose rows grow independently: written at per-row positions, never concatenated."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from spec_rollout import ops
from spec_rollout._native import _C, num_threads

# Widths handed to the attention are multiples of this: whole vectors on CPU, aligned masks on CUDA.
WIDTH_MULTIPLE = 16


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


class SlotCache(Cache):
    """Preallocated keys and values of `num_rows` sequences, all layers.

    `place` says where the next forward writes; each layer's `update` then writes there and returns
    the first `width` positions of the first rows. What lies beyond a row's own length is left from
    earlier and must be masked. Layers are allocated at their first update, when their head count,
    head size and dtype are known.

    Args:
        num_layers: Decoder layers of the model.
        num_rows: Sequences held at a time.
        capacity: Positions per row.
        by_span: Forwards say by span where their rows lie. A row more than `num_rows` is kept for
            tokens that only fill up a batch.
    """

    def __init__(
        self, num_layers: int, num_rows: int, capacity: int, *, by_span: bool = False
    ) -> None:
        self.num_rows = num_rows
        self.by_span = by_span
        self.capacity = round_up(capacity, WIDTH_MULTIPLE)
        self.width = 0
        self._positions: torch.Tensor | None = None
        self.spans: torch.Tensor | None = None
        self._indices: dict[int, torch.Tensor] = {}
        self._slots = [SlotLayer(self) for _ in range(num_layers)]
        super().__init__(layers=list(self._slots))

    def place(self, positions: torch.Tensor, width: int, spans: torch.Tensor | None = None) -> None:
        """Sets where the next forward's tokens go.

        Args:
            positions: Of each token in its row; row r of the forward is row r here.
                [rows, tokens per row], int64.
            width: Positions that the attention sees, a multiple of `WIDTH_MULTIPLE`.
            spans: For a cache `by_span`, on CPU: where each row of the forward lies, whatever rows
                these are; `positions` is not read, padding is not written, and `update` returns
                all rows.
                [rows, 4], int64: first and last position, a number that is not read, row here.
        """
        self._positions = positions
        self.spans = spans
        self._indices = {}
        self.width = width

    def write_index(self, num_heads: int) -> torch.Tensor:
        """Flat index over [num_rows * num_heads * capacity] of each (row, token, head) written."""
        index = self._indices.get(num_heads)
        if index is None:
            assert self._positions is not None
            positions = self._positions
            rows = torch.arange(positions.shape[0], device=positions.device)
            heads = torch.arange(num_heads, device=positions.device)
            first = (rows[:, None] * num_heads + heads) * self.capacity
            index = (first[:, None, :] + positions[:, :, None]).flatten()
            self._indices[num_heads] = index
        return index

    def tensors(self) -> list[list[torch.Tensor]]:
        """Keys and values of all layers, grouped by shape, as `ops.splice_kv` takes them."""
        groups: dict[tuple[torch.Size, torch.dtype], list[torch.Tensor]] = {}
        for layer in self._slots:
            if layer.is_initialized:
                for tensor in (layer.keys, layer.values):
                    groups.setdefault((tensor.shape[1::2], tensor.dtype), []).append(tensor)
        return list(groups.values())

    def allocate_like(self, other: SlotCache) -> None:
        """Allocates the layers that `other` has, so that rows can be copied here."""
        for mine, theirs in zip(self._slots, other._slots, strict=True):
            if theirs.is_initialized and not mine.is_initialized:
                mine.lazy_initialization(theirs.keys, theirs.values)

    def move_rows(self, src_rows: list[int], dst_rows: list[int], lens: list[int]) -> None:
        """Copies the first `lens` positions of rows to other rows; the ranges must not conflict."""
        copy_rows(self, self, src_rows, dst_rows, lens)


class SlotLayer(CacheLayerMixin):
    """One layer of a `SlotCache`, of use as long as that is there."""

    is_compileable = False
    is_sliding = False
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        # A cycle would keep keys and values until the collector of cycles runs, which knows nothing
        # of a GPU's memory.
        self._cache: SlotCache = weakref.proxy(cache)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        def storage(like: torch.Tensor) -> torch.Tensor:
            num_rows = self._cache.num_rows + self._cache.by_span
            shape = (num_rows, like.shape[1], self._cache.capacity, like.shape[3])
            tensor = torch.empty(shape, dtype=like.dtype, device=like.device)
            _C.prefer_huge_pages(tensor)
            if not self._cache.by_span:
                # What a mask hides is multiplied by zero, which NaN would survive.
                tensor.zero_()
            return tensor

        self.keys, self.values = storage(key_states), storage(value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes [rows, heads, tokens, head_dim] states and returns all that the attention sees."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, num_heads = key_states.shape[:2]
        for storage, states in ((self.keys, key_states), (self.values, value_states)):
            if self._cache.by_span:
                _C.write_kv(states, storage, self._cache.spans, num_threads())
                continue
            head_dim = states.shape[-1]
            # Projections come as [rows, tokens, heads, head_dim] underneath: no copy here.
            flat = states.transpose(1, 2).reshape(-1, head_dim)
            index = self._cache.write_index(num_heads)
            storage.view(-1, head_dim).index_copy_(0, index, flat)
        if self._cache.by_span:
            rows = self.keys.shape[0]
        width = self._cache.width
        return self.keys[:rows, :, :width], self.values[:rows, :, :width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.width, 0

    def get_seq_length(self) -> int:
        return self._cache.width

    def get_max_length(self) -> int:
        return self._cache.capacity

    def get_max_cache_shape(self) -> int:  # the name of get_max_length in earlier transformers
        return self._cache.capacity


def copy_rows(
    src: SlotCache, dst: SlotCache, src_rows: list[int], dst_rows: list[int], lens: list[int]
) -> None:
    """Copies the first `lens` positions of rows of `src` into rows of `dst`; both may be one."""
    if not src_rows:
        return
    dst.allocate_like(src)
    starts = torch.zeros(len(src_rows), dtype=torch.int64)
    for src_tensors, dst_tensors in zip(src.tensors(), dst.tensors(), strict=True):
        device = src_tensors[0].device
        ops.splice_kv(
            src_tensors,
            dst_tensors,
            src_rows=torch.tensor(src_rows).to(device),
            src_starts=starts.to(device),
            dst_rows=torch.tensor(dst_rows).to(device),
            dst_starts=starts.to(device),
            lens=torch.tensor(lens).to(device),
        )
