"""Proposes tokens from earlier rollouts: those of the same prompt first, then those of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from spec_rollout._native import _C, num_threads
from spec_rollout.drafting.groups import split_large_groups
from spec_rollout.types import History

# How many proposed tokens passed, by the kind of match and the estimate. Nothing but the extension
# looks into it. An engine keeps one and gives it to the drafter of every call.
MatchShares = _C.MatchShares


@dataclass(frozen=True, slots=True)
class Proposals:
    """Tokens to test, for some requests.

    Attributes:
        token_ids: Request after request. [num_tokens], int32.
        lens: Tokens of each request. [count], int64.
        own_lens: How many of them, from the first on, come from the request's own draft
            (`follow`). [count], int64.
    """

    token_ids: np.ndarray
    lens: np.ndarray
    own_lens: np.ndarray


class HistoryDrafter:
    """Proposes for the live requests of one rollout call, and learns which proposals pass.

    Each group of requests (the samples of one prompt) has a suffix index. It holds the group's
    earlier rollouts and what its live requests have generated so far. An n-gram table holds what
    all groups said after the same few tokens.

    A lookup gives the tokens that followed the same text. The drafter proposes the one that the
    request's noise is likeliest to pick. It can tell, because the noise is known ahead. The
    log-probs that those tokens were drawn with serve as an estimate of the present ones. A proposal
    goes on while its tokens are likely enough to pass. That is estimated from the same comparison
    and from how many such proposals passed lately, of all requests and of this one
    (docs/acceptance.md).

    A proposal changes no token: it is tested against the token that sampling gives anyway.

    Args:
        history: Earlier rollouts, and the group of each request.
        stop_token_ids: These are never proposed, and nothing after them is.
        shares: How many proposals passed so far. An engine gives its own to the drafter of every
            call. None starts from nothing.
    """

    def __init__(
        self,
        history: History,
        stop_token_ids: Sequence[int] = (),
        shares: MatchShares | None = None,
    ) -> None:
        row_groups, request_groups = split_large_groups(history.row_groups, history.request_groups)
        rows = [row_groups, request_groups]
        num_groups = 1 + max((int(groups.max()) for groups in rows if groups.numel()), default=-1)
        shares = MatchShares() if shares is None else shares
        self._native = _C.HistoryDrafter(num_groups, request_groups, list(stop_token_ids), shares)
        self._native.add_history(
            history.token_ids,
            history.logprobs,
            history.cu_lens,
            row_groups,
            num_threads(),
        )

    def follow(self, request: int, token_ids: np.ndarray, logprobs: np.ndarray) -> None:
        """Gives a request its own earlier rollout, which was drawn with the same noise (`Coupled`).

        While the request generates the same tokens, the draft's next token competes with those of
        the history. It is trusted less where another token came near to being drawn, as the
        log-probs and the noise tell.

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
            logprobs: Of the tokens; NaN where one is not known, None where none is. [num_tokens],
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
        """Proposes for each request the tokens that are likely enough to pass.

        Args:
            requests: A request that `extend` has not seen gets nothing. [count], int64.
            limits: Most tokens for each. [count], int64.
            min_probability: A token is proposed if it and all before it in its proposal pass with
                at least this estimated probability.
            max_total: Most tokens for all together. Where there would be more, the longest
                proposals are cut. None is no such limit.
            keys, positions: Noise key of each request, and noise position of its next token
                (`sample_tokens`). None where tokens are not drawn with keyed noise. [count], int64
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
