"""Proposals from what was said before, by a prompt's own rollouts and by all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from spec_rollout._native import _C, num_threads
from spec_rollout.types import History

# How proposed tokens fared, by context and by chance; opaque, and kept by engines between calls.
MatchShares = _C.MatchShares


@dataclass(frozen=True, slots=True)
class Proposals:
    """Tokens to test, for some requests.

    Attributes:
        token_ids: [num_tokens], int32.
        lens: [count], int64.
        own_lens: Of these, the first ones, those that are the request's own draft (`follow`).
            [count], int64.
    """

    token_ids: np.ndarray
    lens: np.ndarray
    own_lens: np.ndarray


class HistoryDrafter:
    """Proposes for the live requests of one rollout call, and learns which proposals pass.

    Every group of requests (the samples of one prompt) has a suffix index over its earlier rollouts
    and over what its live requests have generated so far; an n-gram table knows what all groups say
    after a few tokens. Of what followed the same words there, the token is proposed that the
    request's noise is likeliest to pick: the noise is known ahead, and the log-probs that tokens
    were drawn with are an estimate of the present ones. A proposal goes on as long as its tokens
    are likely enough to pass, judged by that comparison and by how such proposals fared lately, for
    all requests and for this one (docs/acceptance.md).

    A proposal changes no token: it is tested against the token that sampling gives anyway.

    Args:
        history: Earlier rollouts, and the group of each request.
        stop_token_ids: Never proposed, nor what followed them.
        shares: What is known of how proposals fare; an engine hands its own to the drafter of every
            call. None is new ones.
    """

    def __init__(
        self,
        history: History,
        stop_token_ids: Sequence[int] = (),
        shares: MatchShares | None = None,
    ) -> None:
        rows = [history.row_groups, history.request_groups]
        num_groups = 1 + max((int(groups.max()) for groups in rows if groups.numel()), default=-1)
        shares = MatchShares() if shares is None else shares
        self._native = _C.HistoryDrafter(
            num_groups, history.request_groups, list(stop_token_ids), shares
        )
        self._native.add_history(
            history.token_ids,
            history.logprobs,
            history.cu_lens,
            history.row_groups,
            num_threads(),
        )

    def follow(self, request: int, token_ids: np.ndarray, logprobs: np.ndarray) -> None:
        """Gives a request its own earlier rollout to go by: one drawn with the same noise
        (`Coupled`).

        As long as what it generates is the same, the draft's next token competes with what the
        history says. What the log-probs and the noise say of how near another token came decides
        how far it is believed.

        Args:
            request: Before its first `extend`.
            token_ids: [draft_len], int32.
            logprobs: With which they were drawn. [draft_len], float32.
        """
        self._native.follow(request, torch.from_numpy(token_ids), torch.from_numpy(logprobs))

    def extend(
        self,
        requests: np.ndarray,
        token_ids: np.ndarray,
        lens: np.ndarray,
        logprobs: np.ndarray | None = None,
    ) -> None:
        """Adds what requests generated since the last call.

        Args:
            requests: [count], int64.
            token_ids: Row after row. [num_tokens], int32.
            lens: [count], int64.
            logprobs: Of the tokens; NaN, or None for all, where they are not known. [num_tokens],
                float32.
        """
        cu_lens = np.zeros(lens.size + 1, np.int64)
        np.cumsum(lens, out=cu_lens[1:])
        self._native.extend(
            torch.from_numpy(requests),
            torch.from_numpy(token_ids),
            None if logprobs is None else torch.from_numpy(logprobs),
            torch.from_numpy(cu_lens),
        )

    def propose(
        self,
        requests: np.ndarray,
        limits: np.ndarray,
        min_probability: float,
        *,
        max_total: int | None = None,
        keys: np.ndarray | None = None,
        positions: np.ndarray | None = None,
    ) -> Proposals:
        """Proposes for each request the tokens that pass with at least this estimated probability.

        Args:
            requests: Requests that `extend` has seen. [count], int64.
            limits: Most tokens for each. [count], int64.
            min_probability: Of a token and all before it in its proposal passing.
            max_total: Most tokens for all; where there are more, the longest proposals are cut.
            keys, positions: Noise key of each request and noise position of its next token
                (`sample_tokens`); None where tokens are not drawn with keyed noise. [count], int64
                both.
        """
        out = np.empty(int(np.maximum(limits, 0).sum()), dtype=np.int32)
        lens = np.empty(requests.size, dtype=np.int64)
        own_lens = np.empty(requests.size, dtype=np.int64)
        total = self._native.propose(
            torch.from_numpy(requests),
            torch.from_numpy(limits),
            None if keys is None else torch.from_numpy(keys),
            None if positions is None else torch.from_numpy(positions),
            min_probability,
            out.size if max_total is None else max_total,
            num_threads(),
            torch.from_numpy(out),
            torch.from_numpy(lens),
            torch.from_numpy(own_lens),
        )
        return Proposals(out[:total], lens, own_lens)

    def observe(self, requests: np.ndarray, accepted_lens: np.ndarray) -> None:
        """Says how many tokens of each request's last proposal passed. [count], int64 both."""
        self._native.observe(torch.from_numpy(requests), torch.from_numpy(accepted_lens))

    @property
    def followed_lens(self) -> np.ndarray:
        """Tokens for which each request followed its draft; 0 without one. [num_requests],
        int64."""
        return np.array(self._native.followed_lens, np.int64)

    @property
    def num_tokens(self) -> int:
        """Tokens indexed."""
        return self._native.num_tokens

    @property
    def num_bytes(self) -> int:
        """Memory of indices and n-gram table, of which pages count that were never touched."""
        return self._native.num_bytes
