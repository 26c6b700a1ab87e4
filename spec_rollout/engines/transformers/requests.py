"""Requests as the engine works on them: checked, drafts cut to what could be kept, prompt and draft
in one stream."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from spec_rollout.acceptance import AcceptanceRule
from spec_rollout.packed import lens_to_stop, ranges
from spec_rollout.types import Drafts, RolloutRequests, SamplingParams


@dataclass(frozen=True, slots=True)
class Plan:
    """What is known of every request before anything is computed.

    Attributes:
        stream_ids: Prompt, then draft, of each request. [num_stream_tokens], int64.
        stream_starts: Where each request's stream begins. [batch], int64.
        prompt_lens, draft_lens: Tokens of each, the draft cut. [batch], int64.
        draft_logprobs: Aligned with `stream_ids`, NaN on prompts; None if not needed. float32.
        rooms: Most response tokens of each request. [batch], int64.
        draft_ends: Whether nothing follows a wholly accepted draft. [batch], bool.
        keys: Noise keys. [batch], int64.
        expected_lens: As in `RolloutRequests`; 0 where nothing is known. [batch], int64.
    """

    stream_ids: np.ndarray
    stream_starts: np.ndarray
    prompt_lens: np.ndarray
    draft_lens: np.ndarray
    draft_logprobs: np.ndarray | None
    rooms: np.ndarray
    draft_ends: np.ndarray
    keys: np.ndarray
    expected_lens: np.ndarray

    @classmethod
    def of(
        cls,
        requests: RolloutRequests,
        sampling: SamplingParams,
        rule: AcceptanceRule,
        *,
        vocab_size: int,
        head_size: int,
        max_model_len: int | None,
    ) -> Plan:
        """Checks the requests and cuts the drafts.

        Args:
            vocab_size: Ids that a prompt may have.
            head_size: Ids that can be drawn: those of drafts, history and stop tokens.

        Raises:
            ValueError: if an id is outside the vocabulary, a prompt leaves no room for a token
                within `max_model_len`, or the rule reads draft log-probs that are not there.
        """
        drafts = requests.drafts if rule.uses_drafts else Drafts.none(requests.batch)
        if rule.needs_draft_logprobs and drafts.logprobs is None and drafts.token_ids.numel():
            raise ValueError(f"drafts.logprobs: expected log-probs, as {rule} needs, got None")
        _check_ids("prompt_ids", requests.prompt_ids, vocab_size)
        _check_ids("drafts.token_ids", drafts.token_ids, head_size)
        if requests.history is not None:
            _check_ids("history.token_ids", requests.history.token_ids, head_size)
        _check_ids("stop_token_ids", torch.tensor(sampling.stop_token_ids), head_size)
        prompt_lens = np.diff(requests.cu_prompt_lens.numpy())
        rooms = np.full(requests.batch, sampling.max_tokens, dtype=np.int64)
        if max_model_len is not None:
            rooms = np.minimum(rooms, max_model_len - prompt_lens)
            if rooms.size and rooms.min() < 1:
                row = int(rooms.argmin())
                raise ValueError(
                    f"prompt_ids: expected prompts shorter than max_model_len ({max_model_len}), "
                    f"row {row} has {prompt_lens[row]} tokens"
                )
        draft_lens, at_stop = _usable_lens(drafts, sampling.stop_token_ids, rooms)
        prompt_starts, draft_starts = (
            requests.cu_prompt_lens[:-1].numpy(),
            drafts.cu_lens[:-1].numpy(),
        )
        stream_lens = prompt_lens + draft_lens
        stream_starts = np.cumsum(stream_lens) - stream_lens
        stream_ids = np.empty(int(stream_lens.sum()), dtype=np.int64)
        _scatter(stream_ids, stream_starts, requests.prompt_ids.numpy(), prompt_starts, prompt_lens)
        after = stream_starts + prompt_lens
        _scatter(stream_ids, after, drafts.token_ids.numpy(), draft_starts, draft_lens)
        draft_logprobs = None
        if rule.needs_draft_logprobs and drafts.logprobs is not None:
            draft_logprobs = np.full(stream_ids.shape, np.nan, dtype=np.float32)
            _scatter(draft_logprobs, after, drafts.logprobs.numpy(), draft_starts, draft_lens)
        return cls(
            stream_ids=stream_ids,
            stream_starts=stream_starts,
            prompt_lens=prompt_lens,
            draft_lens=draft_lens,
            draft_logprobs=draft_logprobs,
            rooms=rooms,
            draft_ends=at_stop | (draft_lens == rooms),
            keys=requests.keys.numpy(),
            expected_lens=np.zeros(requests.batch, dtype=np.int64)
            if requests.expected_lens is None
            else requests.expected_lens.numpy(),
        )

    @property
    def batch(self) -> int:
        return self.keys.size

    @property
    def has_draft(self) -> np.ndarray:
        """Whether there is a draft to verify. [batch], bool."""
        return self.draft_lens > 0

    @property
    def feed_lens(self) -> np.ndarray:
        """Tokens to compute if the whole draft is accepted: the last of a finished one needs no
        KV."""
        return self.prompt_lens + self.draft_lens - self.draft_ends

    def order(self) -> np.ndarray:
        """Requests as they are best taken: what may take longest first, rows of a batch alike.

        A request without a draft has its whole response to decode, and those come first that were
        long the last time; among the rest, long rows first.
        """
        to_decode = np.where(self.has_draft, 0, self.expected_lens)
        return np.lexsort((-self.feed_lens, -to_decode, self.has_draft))

    def prompt_ids(self, request: int) -> np.ndarray:
        """The prompt. [prompt_len], int64."""
        start = self.stream_starts[request]
        return self.stream_ids[start : start + self.prompt_lens[request]]

    def draft_ids(self, request: int) -> np.ndarray:
        """The cut draft. [draft_len], int64."""
        start = self.stream_starts[request] + self.prompt_lens[request]
        return self.stream_ids[start : start + self.draft_lens[request]]


def _check_ids(name: str, ids: torch.Tensor, vocab_size: int) -> None:
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size):
        raise ValueError(
            f"{name}: expected 0 <= id < {vocab_size}, got {int(ids.min())} to {int(ids.max())}"
        )


def _usable_lens(
    drafts: Drafts, stop_token_ids: tuple[int, ...], rooms: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Lengths up to the first stop token and within the room, and whether they end with a stop."""
    cu = drafts.cu_lens.numpy()
    lens, stopped = lens_to_stop(drafts.token_ids.numpy(), cu, stop_token_ids)
    return np.minimum(lens, rooms), stopped & (lens <= rooms)


def _scatter(
    out: np.ndarray,
    out_starts: np.ndarray,
    values: np.ndarray,
    value_starts: np.ndarray,
    lens: np.ndarray,
) -> None:
    """out[out_starts[r] + i] = values[value_starts[r] + i] for i < lens[r]."""
    offsets = ranges(lens)
    out[np.repeat(out_starts, lens) + offsets] = values[np.repeat(value_starts, lens) + offsets]
