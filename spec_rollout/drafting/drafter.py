"""Proposes tokens from what was generated before: for the same prompt first, then for any."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from spec_rollout._native import _C, num_threads
from spec_rollout.drafting import history_file
from spec_rollout.drafting.history_file import KeptRows
from spec_rollout.drafting.noise import NoiseLaw

# How many proposed tokens passed, by the kind of match and the estimate. Nothing but the extension
# looks into it. An engine keeps one and gives it to the drafter of every call.
MatchShares = _C.MatchShares

KEY_BYTES = 16
# One cache line for each of five lengths of context, 2**16 times.
TABLE_BYTES = 5 * 64 * 2**16
_LEAST_TABLE_BYTES = 5 * 64 * 2**10
_MAX_BYTES = 2**62


@dataclass(frozen=True, slots=True)
class Proposals:
    """Tokens to test, for some requests.

    Attributes:
        token_ids: Request after request. [num_tokens], int32.
        lens: Tokens of each request. [count], int64.
        own_lens: How many of them, from the first on, come from the request's own draft
            (`follow`). [count], int64.
        expected: How many of them are expected to pass. [count], float32.
    """

    token_ids: np.ndarray
    lens: np.ndarray
    own_lens: np.ndarray
    expected: np.ndarray


@dataclass(frozen=True, slots=True)
class DrafterInfo:
    """What a drafter holds, and what it has forgotten for want of room.

    Attributes:
        history_bytes: Memory of the rollouts of all groups, live ones too.
        table_bytes: Memory of the n-gram table, of which pages count that were never touched.
        num_groups: Prompts that something is known of or generated for.
        num_live: Requests that have joined and not left.
        num_sequences: Rollouts kept of requests that have left.
        num_tokens: Of kept and live rollouts.
        num_evicted_groups: Prompts forgotten with all their rollouts, so far.
        num_evicted_sequences: Rollouts forgotten, these included, so far.
        num_learned_tokens: Tokens learned from, so far.
    """

    history_bytes: int
    table_bytes: int
    num_groups: int
    num_live: int
    num_sequences: int
    num_tokens: int
    num_evicted_groups: int
    num_evicted_sequences: int
    num_learned_tokens: int


class Drafter:
    """Proposes for live requests, and learns which proposals pass. Lives as long as an engine.

    A request joins the group of its prompt, is extended by what it generates, and leaves. What it
    generated then stays as history of the prompt. Each group has a suffix index of its rollouts,
    live and kept ones. An n-gram table holds what all groups said after the same few tokens.

    A lookup gives the tokens that followed the same text. The drafter proposes the one that the
    request's noise is likeliest to pick. It can tell, because the noise is known ahead. The
    log-probs that those tokens were drawn with serve as an estimate of the present ones. A proposal
    goes on while its tokens are likely enough to pass. That is estimated from the same comparison
    and from how many such proposals passed lately, of all requests and of this one
    (docs/acceptance.md).

    A proposal changes no token: it is tested against the token that sampling gives anyway.

    Memory is bounded, whatever is served for however long. A prompt's oldest rollouts are forgotten
    when its kept ones take more than `max_group_bytes` (or are more than 4,096). When all together
    take more than `max_bytes`, prompts without live requests lose the rollouts that as many of a
    newer visit (from the first of its requests to join to the last to leave) have followed, the
    prompt used last first; then whole prompts are forgotten, the least recently used first; then
    prompts with live requests lose their kept rollouts.
    What is live is never forgotten, so it alone can exceed a bound. Every call takes time in
    proportion to the tokens it adds, or forgets.

    Calls on one drafter must not overlap.

    Args:
        max_bytes: Most memory for rollouts, about 21 bytes a token.
        max_group_bytes: Most memory for the kept rollouts of one prompt.
        max_table_bytes: Most memory for the n-gram table; the largest power of two of lines within
            it is taken.
        shares: How many proposals passed so far. None starts from nothing.
        noise: That requests are drawn with.

    Raises:
        ValueError: naming the bound that is too small.
    """

    def __init__(
        self,
        *,
        max_bytes: int = 2**30,
        max_group_bytes: int = 2**22,
        max_table_bytes: int = TABLE_BYTES,
        shares: MatchShares | None = None,
        noise: NoiseLaw = NoiseLaw.PHILOX,
    ) -> None:
        for name, value, least in (
            ("max_bytes", max_bytes, 0),
            ("max_group_bytes", max_group_bytes, 0),
            ("max_table_bytes", max_table_bytes, _LEAST_TABLE_BYTES),
        ):
            if not least <= value <= _MAX_BYTES:
                raise ValueError(f"{name}: expected {least} to {_MAX_BYTES}, got {value}")
        self._native = _C.HistoryDrafter(
            max_bytes=max_bytes,
            max_group_bytes=max_group_bytes,
            table_tokens=_MAX_BYTES,
            max_table_bytes=max_table_bytes,
            is_lasting=True,
            shares=MatchShares() if shares is None else shares,
        )
        if noise is not NoiseLaw.PHILOX:
            self._native.expect_noise(noise)

    def join(
        self, group_key: bytes, *, stop_token_ids: Sequence[int] = (), tag: int | None = None
    ) -> int:
        """A request begins.

        Args:
            group_key: Names the prompt: 16 bytes that no other has (`keys.prompt_key`, of adapter
                and cache salt too where a request has them).
            stop_token_ids: These are never proposed, and nothing after them is.
            tag: Under which `recall` finds what it generated: the noise key, or the sample index.
                Any int64 but the least one.

        Returns:
            A handle, for the other calls.

        Raises:
            ValueError: naming the argument.
        """
        tags = None if tag is None else torch.tensor([tag])
        return self._native.join(_words([group_key]), list(stop_token_ids), tags)[0]

    def leave(self, handle: int, *, keep: bool = True) -> None:
        """A request has ended. Its handle must not be used again.

        Args:
            handle: Of `join`.
            keep: Whether what it generated becomes history of its prompt. The n-gram table has
                learned from it already.

        Raises:
            ValueError: if the request is not live.
        """
        self._native.leave(handle, keep)

    def add(
        self,
        group_keys: Sequence[bytes],
        token_ids: torch.Tensor,
        cu_lens: torch.Tensor,
        logprobs: torch.Tensor | None = None,
        tags: Sequence[int] | None = None,
    ) -> None:
        """Adds rollouts made elsewhere, as if requests had generated them and left.

        Args:
            group_keys: Of each rollout, as in `join`. Groups are used in the order in which they
                come here.
            token_ids: Row after row. [num_tokens], int32.
            cu_lens: [rows + 1], int64.
            logprobs: With which they were drawn; NaN where one is not known, None where none is.
                [num_tokens], float32.
            tags: As in `join`, of each rollout.

        Raises:
            ValueError: naming the argument; nothing is added then.
        """
        words = _words(group_keys)
        known = None if tags is None else torch.tensor(list(tags), dtype=torch.int64)
        self._native.add_history(token_ids, logprobs, cu_lens, words, known, num_threads())

    def add_rows(self, rows: KeptRows) -> int:
        """As `add`, of rollouts that were read from bytes and checked there.

        Returns:
            How many.
        """
        self._native.add_history(
            torch.from_numpy(rows.token_ids),
            torch.from_numpy(rows.logprobs),
            torch.from_numpy(rows.cu_lens),
            torch.from_numpy(rows.keys),
            torch.from_numpy(rows.tags),
            num_threads(),
        )
        return rows.tags.size

    def recall(self, group_key: bytes, tag: int) -> tuple[np.ndarray, np.ndarray] | None:
        """The newest kept rollout of a prompt with this tag.

        Returns:
            Token ids [len], int32, and the log-probs they were drawn with, NaN where not known
            [len], float32. None if there is no such rollout.
        """
        return _arrays(self._native.recall(_words([group_key]), tag))

    def generated(self, handle: int) -> tuple[np.ndarray, np.ndarray] | None:
        """What a live request has generated so far, as `recall` gives it; None if nothing.

        Raises:
            ValueError: if the request is not live.
        """
        return _arrays(self._native.generated(handle))

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
        # Copies: what `recall` returns is read-only, which torch does not know.
        self._native.follow(
            request, torch.from_numpy(token_ids.copy()), torch.from_numpy(logprobs.copy())
        )

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

        Raises:
            ValueError: naming the argument; nothing is added then.
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
        favours_longest: bool = False,
        max_total: int | None = None,
        keys: np.ndarray | None = None,
        positions: np.ndarray | None = None,
        with_noise: np.ndarray | None = None,
    ) -> Proposals:
        """Proposes for each request the tokens that are likely enough to pass.

        Args:
            requests: Each at most once. A request that `extend` has not seen gets nothing.
                [count], int64.
            limits: Most tokens for each. [count], int64.
            min_probability: A token is proposed if it and all before it in its proposal pass with
                at least this estimated probability.
            favours_longest: Whether `min_probability` is of a request with a mean number of tokens
                to go. What is asked of another is in inverse proportion to its own number, between
                a quarter and four times as much. Its draft says how many those are (`follow`), or
                the kept rollouts of its prompt that were longer; else it counts as a mean one.
            max_total: Most tokens for all together. Where there would be more, the longest
                proposals are cut; where there would be more requests than that, the likeliest first
                tokens are left. None is no such limit.
            keys, positions: Noise key of each request, and noise position of its next token
                (`sample_tokens`; of vLLM's noise see `NoiseLaw`). None where tokens are not drawn
                with keyed noise. [count], int64 both.
            with_noise: Which requests are drawn with that noise; None: all. The others are proposed
                what is likeliest. [count], bool.
        """
        out = np.empty(int(np.maximum(limits, 0).sum()), dtype=np.int32)
        lens = np.empty(requests.size, dtype=np.int64)
        own_lens = np.empty(requests.size, dtype=np.int64)
        expected = np.empty(requests.size, dtype=np.float32)
        total = self._native.propose(
            torch.from_numpy(requests),
            torch.from_numpy(limits),
            None if keys is None else torch.from_numpy(keys),
            None if positions is None else torch.from_numpy(positions),
            None if with_noise is None else torch.from_numpy(with_noise),
            min_probability,
            favours_longest,
            out.size if max_total is None else max_total,
            num_threads(),
            torch.from_numpy(out),
            torch.from_numpy(lens),
            torch.from_numpy(own_lens),
            torch.from_numpy(expected),
        )
        return Proposals(out[:total], lens, own_lens, expected)

    def observe(self, requests: np.ndarray, accepted_lens: np.ndarray) -> None:
        """Says how many tokens of each request's last proposal passed. [count], int64 both."""
        self._native.observe(torch.from_numpy(requests), torch.from_numpy(accepted_lens))

    def followed_len(self, handle: int) -> int:
        """Tokens for which a request followed its draft; 0 without one."""
        return self._native.followed_len(handle)

    def has_history(self, handle: int) -> bool:
        """Whether a request's prompt has rollouts to propose from beside its own."""
        return self._native.has_history(handle)

    def info(self) -> DrafterInfo:
        """What is held. Takes time in proportion to the number of groups."""
        return DrafterInfo(**self._native.info)

    def clear(self) -> None:
        """Forgets all history, and all that the table has learned. Live requests go on, with what
        they have generated so far."""
        self._native.clear()

    def export_bytes(self) -> bytes:
        """The kept rollouts of all groups (`history_file`), to be read by `import_bytes`."""
        return history_file.packed(self._kept_rows())

    def import_bytes(self, data: bytes) -> int:
        """Adds rollouts that `export_bytes` gave, of this drafter or another.

        Returns:
            How many.

        Raises:
            ValueError: if it is not such data, whole and unchanged; nothing is added then.
        """
        return self.add_rows(history_file.unpacked(data))

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        live: Mapping[int, tuple[bytes, int | None]] | None = None,
    ) -> None:
        """As `export_bytes`, into a file, which appears complete or not at all.

        Args:
            path: Of the file.
            live: Handles of requests whose tokens so far are written as well, as the newest, with
                the group key and the tag that each joined with.
        """
        groups = list(self._native.kept_rows())
        for handle, (group, tag) in (live or {}).items():
            row = self._native.generated(handle)
            if row is not None:
                groups.append((group, [(history_file.NO_TAG if tag is None else tag, *row)]))
        history_file.write(path, KeptRows.of(groups))

    def load(self, path: str | os.PathLike[str]) -> int:
        """As `import_bytes`, from a file.

        Raises:
            OSError: if it cannot be read.
            ValueError: naming the path.
        """
        return self.add_rows(history_file.read(path))

    def _kept_rows(self) -> KeptRows:
        return KeptRows.of(self._native.kept_rows())

    @property
    def num_tokens(self) -> int:
        """Tokens indexed."""
        return self._native.num_tokens

    @property
    def num_bytes(self) -> int:
        """Memory of indices and n-gram table, of which pages count that were never touched."""
        return self._native.num_bytes


def _arrays(row: tuple[bytes, bytes] | None) -> tuple[np.ndarray, np.ndarray] | None:
    if row is None:
        return None
    return np.frombuffer(row[0], np.int32), np.frombuffer(row[1], np.float32)


def _words(group_keys: Sequence[bytes]) -> torch.Tensor:
    """[count, 2], int64."""
    for key in group_keys:
        if not isinstance(key, bytes) or len(key) != KEY_BYTES:
            raise ValueError(f"group_key: expected {KEY_BYTES} bytes, got {key!r}")
    words = np.frombuffer(b"".join(group_keys), np.int64).reshape(-1, 2)
    return torch.from_numpy(words.copy())
