"""The logits rows of one engine step, sorted by what is to be done with them, as arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from spec_rollout.engines.vllm.worker.masks import BatchMasks
from spec_rollout.engines.vllm.worker.request_state import Row
from spec_rollout.engines.vllm.worker.transfer import to_device


@dataclass(slots=True)
class Segment:
    """Logits rows first_row..first_row + num_rows of one request, tested against some tokens."""

    request: int
    first_row: int
    num_rows: int
    index: int = 0  # response token that the first row predicts
    tokens: np.ndarray | None = None  # to test: of the draft, or proposed from history
    num_proposed: int = 0  # of these, computed in this step
    row: Row | None = None  # None: nobody reads the result
    is_draft: bool = True
    learn: bool = False  # the drafter made this proposal and wants to know how it fared
    num_own: int = 0  # of the tokens, the first ones, those of the request's own draft
    is_whole: bool = True  # all that was proposed is tested

    @property
    def num_tested(self) -> int:
        return 0 if self.tokens is None else self.tokens.size


@dataclass(slots=True)
class Known:
    """What is fixed about the requests of a batch, as arrays; made anew when the batch changes.

    Entries of requests without a key are zeros, their collect id and their history id are -1.
    """

    rows: list[Row | None]
    keys: np.ndarray
    prompt_lens: np.ndarray
    first_positions: np.ndarray
    collect_ids: np.ndarray
    history_ids: np.ndarray
    max_response_lens: np.ndarray
    any_collected: bool
    all_in_history: bool
    is_drawn: np.ndarray
    masks: BatchMasks | None
    is_plain: bool = False  # found by `needs_only_draws`
    # Step that gave the request that has run longest its first token, once all have theirs.
    oldest_step: int | None = None
    device_keys: torch.Tensor | None = None

    @classmethod
    def of(cls, rows: list[Row | None]) -> Known:
        numbers = np.array(
            [
                (0, 0, 0, -1, -1, 0)
                if row is None
                else (
                    row.key,
                    row.prompt_len,
                    row.first_position,
                    row.collect_id,
                    row.history_id,
                    row.max_response_len,
                )
                for row in rows
            ],
            np.int64,
        ).reshape(-1, 6)
        keys, prompt_lens, first_positions, collect_ids, history_ids, limits = numbers.T.copy()
        return cls(
            rows=rows,
            keys=keys,
            prompt_lens=prompt_lens,
            first_positions=first_positions,
            collect_ids=collect_ids.astype(np.int32),
            history_ids=history_ids,
            max_response_lens=limits,
            any_collected=bool((collect_ids >= 0).any()),
            all_in_history=len(rows) > 0 and bool((history_ids >= 0).all()),
            is_drawn=np.array([row is None or row.is_drawn for row in rows], bool),
            masks=BatchMasks.of([None if row is None else row.masks for row in rows]),
        )

    def needs_only_draws(self) -> bool:
        """Whether every request has a key and no draft left to verify."""
        if not self.is_plain:  # if it ever was, it still is: drafts do not come back to life
            self.is_plain = not any(row is None or row.alive for row in self.rows)
        return self.is_plain

    def keys_on(self, device: torch.device) -> torch.Tensor:
        """The keys as a tensor, which stays on the device while the batch is the same."""
        if self.device_keys is None:
            self.device_keys = to_device(self.keys, device)
        return self.device_keys


@dataclass(slots=True)
class Group:
    """Rows of logits that one call of `verify_prefix` works on, in their order; arrays by segment.

    Attributes:
        segments: Those with something to test, or that nobody reads.
        places: Where each of them stands among all; between them stand requests with nothing to
            test.
        is_read: Whether somebody reads the result.
        first_tokens: Of each segment's tokens, among those of all.
    """

    segments: list[Segment]
    places: list[int]
    requests: np.ndarray
    first_rows: np.ndarray
    num_rows: np.ndarray
    num_tested: np.ndarray
    indices: np.ndarray
    keys: np.ndarray
    positions: np.ndarray
    collect_ids: np.ndarray
    is_read: np.ndarray
    first_tokens: np.ndarray
    any_collected: bool

    @classmethod
    def of(
        cls,
        segments: list[Segment],
        plain: list[int],
        lens: np.ndarray,
        known: Known,
        first_rows: np.ndarray,
    ) -> Group:
        # What nobody reads is tested against token 0 in every row: one row of work.
        listed = np.array(
            [
                (s.request, s.first_row, s.num_rows, s.num_rows, 0)
                if s.row is None
                else (s.request, s.first_row, s.num_rows, s.num_tested, 1)
                for s in segments
            ],
            np.int64,
        ).reshape(-1, 5)
        if plain:
            columns = np.array(plain, np.int64)
            ones = np.ones_like(columns)
            rest = np.stack([columns, first_rows[columns], ones, 0 * ones, ones], axis=1)
            listed = np.concatenate([listed, rest])
            order = np.argsort(listed[:, 1], kind="stable")
            listed = listed[order]
            places = np.flatnonzero(order < len(segments)).tolist()
        else:
            places = list(range(len(segments)))
        requests, first, num_rows, num_tested, is_read = np.ascontiguousarray(listed.T)
        indices = lens[requests] - known.prompt_lens[requests]
        return cls(
            segments=segments,
            places=places,
            requests=requests,
            first_rows=first,
            num_rows=num_rows,
            num_tested=num_tested,
            indices=indices,
            keys=known.keys[requests],
            positions=indices + known.first_positions[requests],
            collect_ids=known.collect_ids[requests],
            is_read=is_read.astype(bool),
            first_tokens=np.cumsum(num_tested) - num_tested,
            any_collected=known.any_collected,
        )

    @classmethod
    def of_proposals(cls, lens: np.ndarray, indices: np.ndarray, known: Known) -> Group:
        """Every request of the batch in order, `lens` tokens of each to be tested."""
        num_rows = lens + 1
        return cls(
            segments=[],
            places=[],
            requests=np.arange(lens.size),
            first_rows=np.cumsum(num_rows) - num_rows,
            num_rows=num_rows,
            num_tested=lens,
            indices=indices,
            keys=known.keys,
            positions=indices + known.first_positions,
            collect_ids=known.collect_ids,
            is_read=np.ones(lens.size, bool),
            first_tokens=np.cumsum(lens) - lens,
            any_collected=known.any_collected,
        )

    def read_only(self) -> Group:
        """Without what nobody reads."""
        if self.is_read.all():
            return self
        new_places = np.cumsum(self.is_read) - 1
        arrays = {
            name: getattr(self, name)[self.is_read]
            for name in (
                "requests",
                "first_rows",
                "num_rows",
                "num_tested",
                "indices",
                "keys",
                "positions",
                "collect_ids",
                "is_read",
            )
        }
        num_tested = arrays["num_tested"]
        return Group(
            segments=[s for s in self.segments if s.row is not None],
            places=[
                int(new_places[i])
                for i, s in zip(self.places, self.segments, strict=True)
                if s.row is not None
            ],
            first_tokens=np.cumsum(num_tested) - num_tested,
            any_collected=self.any_collected,
            **arrays,
        )

    def numbers(self) -> np.ndarray:
        """Offsets of tokens, offsets of rows, keys, positions.

        [4, segments + 1], int64; the last entries of keys and positions mean nothing.
        """
        n = self.requests.size
        numbers = np.zeros((4, n + 1), np.int64)
        np.cumsum(self.num_tested, out=numbers[0, 1:])
        np.cumsum(self.num_rows, out=numbers[1, 1:])
        numbers[2, :n] = self.keys
        numbers[3, :n] = self.positions
        return numbers

    def drafts(self, with_logprobs: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """Tokens to test, and the log-probs they come with."""
        ids, logprobs = [np.empty(0, np.int32)], [np.empty(0, np.float32)]
        for s in self.segments:
            if s.row is None:
                ids.append(np.zeros(s.num_rows, np.int32))
                if with_logprobs:
                    logprobs.append(np.full(s.num_rows, np.inf, np.float32))
            elif s.tokens is not None and s.tokens.size:
                ids.append(s.tokens)
                if with_logprobs:
                    assert s.row.draft_logprobs is not None  # a request without is not admitted
                    logprobs.append(s.row.draft_logprobs[s.index : s.index + s.tokens.size])
        return np.concatenate(ids), np.concatenate(logprobs) if with_logprobs else None
