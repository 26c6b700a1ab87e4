"""Restrictions of requests' vocabularies that do not depend on the tokens drawn."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from spec_rollout.engines.vllm.worker.transfer import to_device
from spec_rollout.packed import ranges


class LogitMasks:
    """min_p, min_tokens, logit_bias and allowed_token_ids of one request; see `BatchMasks`.

    Args:
        params: vLLM's SamplingParams.

    Attributes:
        allowed: Token ids, or empty: all. [n], int64.
        bias_ids, bias_values: What is added to which logits. [n], int64 and float32.
        min_tokens, stop_ids: Tokens that may not be among the first so many of the response.
            [n], int64.
        floor: A logit may be less than the row's largest by no more than this (not positive).
            -inf: any.
    """

    __slots__ = (
        "_forbidden",
        "allowed",
        "bias_ids",
        "bias_values",
        "floor",
        "min_tokens",
        "stop_ids",
    )

    def __init__(self, params: Any) -> None:
        self.allowed = np.array(sorted(params.allowed_token_ids or ()), np.int64)
        bias = params.logit_bias or {}
        self.bias_ids = np.array(list(bias), np.int64)
        self.bias_values = np.array(list(bias.values()), np.float32)
        self.min_tokens = params.min_tokens
        self.stop_ids = np.array(sorted(params.all_stop_token_ids), np.int64)
        # p < min_p * p_max, with p of logits / temperature
        self.floor = params.temperature * math.log(params.min_p) if params.min_p > 0 else -math.inf
        self._forbidden: torch.Tensor | None = None

    @classmethod
    def of(cls, params: Any) -> LogitMasks | None:
        """None if the request restricts nothing."""
        on = (
            params.min_p > 0.0 or params.logit_bias or params.allowed_token_ids or params.min_tokens
        )
        return cls(params) if on else None

    def forbidden(self, vocab: int, device: torch.device) -> torch.Tensor:
        """Which tokens are not allowed; made once. [vocab], bool."""
        if self._forbidden is None:
            self._forbidden = torch.ones(vocab, dtype=torch.bool, device=device)
            self._forbidden[to_device(self.allowed, device)] = False
        return self._forbidden


class BatchMasks:
    """The restrictions of all requests of a batch, in vLLM's order.

    On a GPU the number of operations depends on the kinds of restrictions and not on the number of
    requests. What they take lies on the device, and is put together anew only when the rows are
    others.

    Args:
        masks: Of each request of the batch, or None.
    """

    def __init__(self, masks: list[LogitMasks | None]) -> None:
        def those(test: Callable[[LogitMasks], Any]) -> tuple[np.ndarray, list[LogitMasks]]:
            found = [(r, m) for r, m in enumerate(masks) if m is not None and test(m)]
            return np.array([r for r, _ in found], np.int64), [m for _, m in found]

        requests, self._allowed = those(lambda m: m.allowed.size)
        self._allowed_rows = _Rows(requests)
        self._forbidden: torch.Tensor | None = None
        requests, biased = those(lambda m: m.bias_ids.size)
        self._bias = _Pairs(requests, [m.bias_ids for m in biased], [m.bias_values for m in biased])
        requests, stopped = those(lambda m: m.min_tokens > 0 and m.stop_ids.size)
        self._stops = _Pairs(requests, [m.stop_ids for m in stopped])
        self._min_tokens = np.array([m.min_tokens for m in stopped], np.int64)
        requests, floored = those(lambda m: m.floor > -math.inf)
        self._floor_rows = _Rows(requests)
        self._floors = np.array([m.floor for m in floored], np.float32)
        self._row_floors = torch.empty(0, dtype=torch.float32)
        self._in_every_step = bool(self._allowed or biased or floored)

    @classmethod
    def of(cls, masks: list[LogitMasks | None]) -> BatchMasks | None:
        """None if there are none."""
        return cls(masks) if any(m is not None for m in masks) else None

    def restrict(self, positions: np.ndarray) -> bool:
        """Whether there is anything to apply; not where all have reached their `min_tokens`.

        Args:
            positions: From the start of the response, of the token that each request's first row
                predicts. [batch], int64.
        """
        return self._in_every_step or bool(
            (positions[self._stops.requests] < self._min_tokens).any()
        )

    def apply(
        self,
        logits: torch.Tensor,
        first_rows: np.ndarray,
        num_rows: np.ndarray,
        positions: np.ndarray,
    ) -> None:
        """Changes logits in place.

        Args:
            logits: Of all requests. [num_rows, vocab].
            first_rows, num_rows: Rows that belong to each request. [batch], int64.
            positions: From the start of the response, of the token that the first of them predicts.
                Those after it predict the tokens after that one. [batch], int64.
        """
        where = first_rows, num_rows
        rows = self._allowed_rows
        if rows.requests.size:
            rows.find(*where, logits.device)
            self._keep_allowed(logits)
        pairs = self._bias
        if pairs.requests.size:
            pairs.find(*where, logits.device)
            # No row has a token twice.
            logits[pairs.index] += pairs.values.to(logits.dtype)
        pairs = self._stops
        if pairs.requests.size:
            early = np.zeros_like(num_rows)
            early[pairs.requests] = self._min_tokens - positions[pairs.requests]
            pairs.find(first_rows, np.clip(early, 0, num_rows), logits.device)
            if pairs.count:
                logits[pairs.index] = -math.inf
        rows = self._floor_rows
        if rows.requests.size:
            if rows.find(*where, logits.device):
                self._row_floors = to_device(self._floors[rows.host_owners], logits.device)[:, None]
            rows.forbid(logits, self._below_floor)

    def _keep_allowed(self, logits: torch.Tensor) -> None:
        rows = self._allowed_rows
        if self._forbidden is None:
            vocab, device = logits.shape[1], logits.device
            self._forbidden = torch.stack([m.forbidden(vocab, device) for m in self._allowed])
        forbidden = self._forbidden if rows.one_each else self._forbidden[rows.owners]
        rows.forbid(logits, lambda _, at: forbidden[at])

    def _below_floor(self, logits: torch.Tensor, at: slice) -> torch.Tensor:
        floor = logits.amax(dim=-1, keepdim=True) + self._row_floors[at]
        return logits < floor.to(logits.dtype)


def _copies_rows(device: torch.device) -> bool:
    """Whether to copy rows that lie apart costs less than operations for each run of them."""
    return device.type != "cpu"


class _Rows:
    """The logits rows of some requests of a batch.

    Args:
        requests: Their places in the batch, in order. [n], int64.

    Attributes:
        count: How many rows.
        index: The rows. [count], int64, on the device.
        owners: Of each the request's place among these requests. [count], int64, on the device.
        host_owners: The same as a numpy array.
        one_each: Each request has one row.
    """

    def __init__(self, requests: np.ndarray) -> None:
        self.requests = requests
        self._first_rows = self._num_rows = np.empty(0, np.int64)
        self.count = 0
        self.one_each = False
        self.host_owners = np.empty(0, np.int64)
        self.index = self.owners = torch.empty(0, dtype=torch.int64)
        # Of rows that lie side by side: the first one, and which of the rows these are.
        self._runs: list[tuple[int, slice]] = []

    def find(self, first_rows: np.ndarray, num_rows: np.ndarray, device: torch.device) -> bool:
        """Sets the attributes.

        Args:
            first_rows, num_rows: Of each request of the batch. [batch], int64.
            device: Of the logits.

        Returns:
            Whether they are others than the last time.
        """
        first_rows, num_rows = first_rows[self.requests], num_rows[self.requests]
        if np.array_equal(num_rows, self._num_rows) and np.array_equal(
            first_rows, self._first_rows
        ):
            return False
        self._first_rows, self._num_rows = first_rows, num_rows
        rows = np.repeat(first_rows, num_rows) + ranges(num_rows)
        self.count = rows.size
        self.one_each = bool((num_rows == 1).all())
        self.host_owners = np.repeat(np.arange(num_rows.size), num_rows)
        self.index, self.owners = to_device(np.stack([rows, self.host_owners]), device)
        begins = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
        ends = np.flatnonzero(np.diff(rows, append=-2) != 1) + 1
        self._runs = []
        if begins.size == 1 or not _copies_rows(device):
            self._runs = [
                (first, slice(begin, end))
                for first, begin, end in zip(
                    rows[begins].tolist(), begins.tolist(), ends.tolist(), strict=True
                )
            ]
        return True

    def forbid(
        self, logits: torch.Tensor, where: Callable[[torch.Tensor, slice], torch.Tensor]
    ) -> None:
        """Sets logits of these rows to -inf.

        Args:
            logits: Of all requests. [num_rows, vocab].
            where: Logits of some of these rows, and which of them these are -> which are set, bool.
                [rows, vocab] both.
        """
        for first, at in self._runs:
            part = logits[first : first + at.stop - at.start]
            part.masked_fill_(where(part, at), -math.inf)
        if self.count and not self._runs:
            part = logits[self.index]
            part.masked_fill_(where(part, slice(None)), -math.inf)
            logits.index_copy_(0, self.index, part)


class _Pairs:
    """Token ids of some requests of a batch, in each of their logits rows.

    Args:
        requests: Their places in the batch, in order. [n], int64.
        ids: Of each request, at least one. int64.
        values: Of each a number for each id, if any. float32.

    Attributes:
        count: How many pairs of a row and a token.
        index: The rows and the tokens. [count], int64 both, on the device.
        values: [count], float32, on the device, if there are any.
    """

    def __init__(
        self, requests: np.ndarray, ids: list[np.ndarray], values: list[np.ndarray] | None = None
    ) -> None:
        self.requests = requests
        self._rows = _Rows(requests)
        self._lens = np.array([i.size for i in ids], np.int64)
        self._ids = np.concatenate(ids) if ids else np.empty(0, np.int64)
        self._values = np.concatenate(values) if values else None
        self._on_device: tuple[torch.Tensor, ...] | None = None
        self.count = 0
        self.index = (self._rows.index, self._rows.index)
        self.values = torch.empty(0, dtype=torch.float32)

    def find(self, first_rows: np.ndarray, num_rows: np.ndarray, device: torch.device) -> None:
        """Sets the attributes; arguments as in `_Rows.find`."""
        rows = self._rows
        if not rows.find(first_rows, num_rows, device):
            return
        self.count = int((self._lens * num_rows[self.requests]).sum())
        if not self.count:
            return
        if self._on_device is None:
            arrays = [self._lens, np.cumsum(self._lens) - self._lens, self._ids]
            if self._values is not None:
                arrays.append(self._values)
            self._on_device = tuple(to_device(array, device) for array in arrays)
        lens, starts, ids, *values = self._on_device
        # On the device, for there may be many ids.
        counts = lens[rows.owners]
        of = torch.repeat_interleave(counts, output_size=self.count)
        behind = starts[rows.owners] - (counts.cumsum(0) - counts)
        where = torch.arange(self.count, device=device) + behind[of]
        self.index = rows.index[of], ids[where]
        if values:
            self.values = values[0][where]
