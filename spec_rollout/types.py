"""The packed records that travel between cache, engines and trainers.

"Packed": rows laid end to end, row r is `values[cu_lens[r]:cu_lens[r + 1]]`; no padding. All
tensors are on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import torch

from spec_rollout.checks import cpu_tensors, integer, items, of_kind, real
from spec_rollout.counters import RolloutStats
from spec_rollout.packed import check_packed, cu_lens_from


def _check_per_token(
    record: object, token_ids: torch.Tensor, floats: Sequence[str], shorts: Sequence[str] = ()
) -> None:
    """Raises ValueError, naming the field, unless each that is not None has one float32 (`floats`)
    or int16 (`shorts`) per token."""
    for names, dtype in ((floats, torch.float32), (shorts, torch.int16)):
        for name in names:
            values = getattr(record, name)
            if values is None:
                continue
            cpu_tensors(**{name: values})
            if values.shape != token_ids.shape or values.dtype != dtype:
                raise ValueError(
                    f"{name}: expected {str(dtype).removeprefix('torch.')} of shape "
                    f"{list(token_ids.shape)}, got {values.dtype} of shape {list(values.shape)}"
                )


class FinishReason(IntEnum):
    """Why a response ended."""

    STOP = 0  # its last token is a stop token
    LENGTH = 1  # it reached max_tokens (or the engine's model length)
    ABORT = 2  # the engine gave it up; not stored in the cache


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn, the same for every row of a call.

    Attributes:
        temperature: 0 is greedy. Log-probs are of the tempered (and filtered) distribution; at 0,
            of temperature 1.
        top_k: Keep the k largest logits (ties with the k-th are kept); 0 is off.
        top_p: Then keep the smallest set whose probability reaches top_p (ties kept); 1 is off.
        max_tokens: Limit of the response length, reused tokens included.
        stop_token_ids: A response ends with the first of these, which is part of it. The model's
            own end-of-sequence token ends it only if it is one of them.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        temperature = real("temperature", self.temperature)
        if not (0.0 <= temperature < float("inf")):
            raise ValueError(f"temperature: expected a finite number >= 0, got {self.temperature}")
        top_k = integer("top_k", self.top_k)
        if top_k < 0:
            raise ValueError(f"top_k: expected >= 0 (0 is off), got {self.top_k}")
        top_p = real("top_p", self.top_p)
        if not (0.0 < top_p <= 1.0):
            raise ValueError(f"top_p: expected 0 < value <= 1, got {self.top_p}")
        max_tokens = integer("max_tokens", self.max_tokens)
        if max_tokens < 1:
            raise ValueError(f"max_tokens: expected >= 1, got {self.max_tokens}")
        stops = items("stop_token_ids", self.stop_token_ids)
        stop_token_ids = tuple(integer("stop_token_ids", token) for token in stops)
        # Python's own numbers, whatever library they came from.
        for name, value in (
            ("temperature", temperature),
            ("top_k", top_k),
            ("top_p", top_p),
            ("max_tokens", max_tokens),
            ("stop_token_ids", stop_token_ids),
        ):
            object.__setattr__(self, name, value)


@dataclass(frozen=True, slots=True)
class Drafts:
    """Cached responses of a batch; an empty row is a cache miss.

    Attributes:
        token_ids: [num_draft_tokens], int32.
        cu_lens: [batch + 1], int64.
        logprobs: Natural log, of the sampling distribution of the policy that drew them.
            [num_draft_tokens], float32; None if not known. Of a token that was reused they are
            those of the last policy that accepted it.
        finished: Whether the row's last token is a stop token (nothing follows if all of it is
            accepted). [batch], bool.
        behaviour_logprobs: Those with which each token was first drawn, however often it was reused
            since. [num_draft_tokens], float32; None if they are `logprobs`.
        ages: Epochs since each token was drawn. [num_draft_tokens], int16, at least 1; None if all
            are 1.
    """

    token_ids: torch.Tensor
    cu_lens: torch.Tensor
    logprobs: torch.Tensor | None
    finished: torch.Tensor
    behaviour_logprobs: torch.Tensor | None = None
    ages: torch.Tensor | None = None

    def __post_init__(self) -> None:
        cpu_tensors(token_ids=self.token_ids, cu_lens=self.cu_lens, finished=self.finished)
        batch = self.finished.numel()
        if self.finished.shape != (batch,) or self.finished.dtype != torch.bool:
            raise ValueError(
                f"finished: expected bool of shape [batch], got {self.finished.dtype} "
                f"{list(self.finished.shape)}"
            )
        check_packed("token_ids", self.token_ids, "cu_lens", self.cu_lens, batch)
        if self.token_ids.dtype != torch.int32:
            raise ValueError(f"token_ids: expected int32, got {self.token_ids.dtype}")
        _check_per_token(self, self.token_ids, ("logprobs", "behaviour_logprobs"), ("ages",))

    @classmethod
    def none(cls, batch: int) -> Drafts:
        """No draft for any of `batch` rows."""
        if integer("batch", batch) < 0:
            raise ValueError(f"batch: expected >= 0, got {batch}")
        return cls(
            token_ids=torch.empty(0, dtype=torch.int32),
            cu_lens=torch.zeros(batch + 1, dtype=torch.int64),
            logprobs=torch.empty(0, dtype=torch.float32),
            finished=torch.zeros(batch, dtype=torch.bool),
        )

    @property
    def lens(self) -> torch.Tensor:
        """Draft lengths. [batch], int64."""
        return self.cu_lens[1:] - self.cu_lens[:-1]

    def cut_to(self, lens: torch.Tensor) -> Drafts:
        """The first `lens` tokens of each row; a row that loses tokens is no longer finished.

        Args:
            lens: [batch], integer, 0 <= lens <= the present lengths.
        """
        cpu_tensors(lens=lens)
        if lens.is_floating_point() or lens.is_complex():
            raise ValueError(f"lens: expected integers, got {lens.dtype}")
        lens = lens.to(torch.int64)
        if lens.shape != self.finished.shape or bool(((lens < 0) | (lens > self.lens)).any()):
            raise ValueError(
                f"lens: expected {self.finished.numel()} lengths from 0 to the draft's own, "
                f"got {lens.tolist() if lens.numel() < 9 else f'shape {list(lens.shape)}'}"
            )
        if torch.equal(lens, self.lens):
            return self
        rows = [slice(a, a + n) for a, n in zip(self.cu_lens.tolist(), lens.tolist(), strict=False)]

        def cut(values: torch.Tensor) -> torch.Tensor:
            array = values.numpy()
            return torch.from_numpy(np.concatenate([array[row] for row in rows]))

        return Drafts(
            token_ids=cut(self.token_ids),
            cu_lens=cu_lens_from(lens),
            logprobs=None if self.logprobs is None else cut(self.logprobs),
            finished=self.finished & (lens == self.lens),
            behaviour_logprobs=(
                None if self.behaviour_logprobs is None else cut(self.behaviour_logprobs)
            ),
            ages=None if self.ages is None else cut(self.ages),
        )


@dataclass(frozen=True, slots=True)
class History:
    """What proposals are drawn from: earlier rollouts of the prompts, by group (the samples of a
    prompt).

    Attributes:
        token_ids: Responses, row after row. [num_history_tokens], int32.
        cu_lens: [rows + 1], int64.
        row_groups: Group of each of these rows. [rows], int64, >= 0.
        request_groups: Group of each request; requests of a group see each other's live rollouts
            too. [batch], int64, >= 0.
        logprobs: With which the tokens were drawn (as `Drafts.logprobs`), or None. With them it is
            known better which token the noise will pick. [num_history_tokens], float32.
    """

    token_ids: torch.Tensor
    cu_lens: torch.Tensor
    row_groups: torch.Tensor
    request_groups: torch.Tensor
    logprobs: torch.Tensor | None = None

    def __post_init__(self) -> None:
        cpu_tensors(token_ids=self.token_ids, cu_lens=self.cu_lens)
        if self.logprobs is not None:
            cpu_tensors(logprobs=self.logprobs)
        for name in ("row_groups", "request_groups"):
            groups = getattr(self, name)
            cpu_tensors(**{name: groups})
            if groups.dtype != torch.int64 or groups.ndim != 1:
                raise ValueError(
                    f"{name}: expected int64 of one dimension, got {groups.dtype} "
                    f"{list(groups.shape)}"
                )
            if groups.numel() and int(groups.min()) < 0:
                raise ValueError(f"{name}: expected groups >= 0, got {int(groups.min())}")
        check_packed("token_ids", self.token_ids, "cu_lens", self.cu_lens, self.row_groups.numel())
        if self.token_ids.dtype != torch.int32:
            raise ValueError(f"token_ids: expected int32, got {self.token_ids.dtype}")
        if self.token_ids.numel() and int(self.token_ids.min()) < 0:
            raise ValueError(f"token_ids: expected ids >= 0, got {int(self.token_ids.min())}")
        _check_per_token(self, self.token_ids, ("logprobs",))


@dataclass(frozen=True, slots=True)
class RolloutRequests:
    """What an engine is asked to generate: one row per rollout.

    Attributes:
        prompt_ids: [num_prompt_tokens], int32; every prompt has at least one token.
        cu_prompt_lens: [batch + 1], int64.
        keys: Noise keys (`spec_rollout.keys.noise_keys`). [batch], int64.
        drafts: Drafts to verify; `Drafts.none(batch)` for plain generation.
        history: What to propose from where there is no draft to follow; None proposes nothing.
        expected_lens: Response tokens that each request may take, as what was cached tells: engines
            begin with those that may take longest. It changes no token. [batch], int64, >= 0; None
            if nothing is known.
    """

    prompt_ids: torch.Tensor
    cu_prompt_lens: torch.Tensor
    keys: torch.Tensor
    drafts: Drafts
    history: History | None = None
    expected_lens: torch.Tensor | None = None

    def __post_init__(self) -> None:
        cpu_tensors(prompt_ids=self.prompt_ids, cu_prompt_lens=self.cu_prompt_lens, keys=self.keys)
        of_kind("drafts", self.drafts, Drafts, "Drafts (Drafts.none(batch) for none)")
        if self.history is not None:
            of_kind("history", self.history, History, "a History or None")
        batch = self.keys.numel()
        if self.keys.shape != (batch,) or self.keys.dtype != torch.int64:
            raise ValueError(
                f"keys: expected int64 of shape [batch], got {self.keys.dtype} "
                f"{list(self.keys.shape)}"
            )
        check_packed("prompt_ids", self.prompt_ids, "cu_prompt_lens", self.cu_prompt_lens, batch)
        if self.prompt_ids.dtype != torch.int32:
            raise ValueError(f"prompt_ids: expected int32, got {self.prompt_ids.dtype}")
        if bool((self.cu_prompt_lens[1:] == self.cu_prompt_lens[:-1]).any()):
            row = int((self.cu_prompt_lens[1:] == self.cu_prompt_lens[:-1]).nonzero()[0])
            raise ValueError(
                f"prompt_ids: expected at least one token per prompt, row {row} has none"
            )
        if self.drafts.finished.numel() != batch:
            raise ValueError(f"drafts: expected {batch} rows, got {self.drafts.finished.numel()}")
        if self.history is not None and self.history.request_groups.numel() != batch:
            raise ValueError(
                f"history.request_groups: expected {batch} requests, "
                f"got {self.history.request_groups.numel()}"
            )
        lens = self.expected_lens
        if lens is not None:
            cpu_tensors(expected_lens=lens)
            if lens.shape != (batch,) or lens.dtype != torch.int64 or bool((lens < 0).any()):
                raise ValueError(
                    f"expected_lens: expected int64 >= 0 of shape [{batch}], got {lens.dtype} of "
                    f"shape {list(lens.shape)}{', some below 0' if bool((lens < 0).any()) else ''}"
                )

    @property
    def batch(self) -> int:
        return self.keys.numel()

    def longest_first(self, draft_lens: torch.Tensor) -> torch.Tensor:
        """Rows in the order in which an engine best begins them; those alike stay in order.

        First those without a draft, which have a whole response to generate; in either part those
        that may take longest, so that the call does not end with a single long one.

        Args:
            draft_lens: Of the drafts that are verified. [batch], int64.

        Returns:
            [batch], int64.
        """
        lens = draft_lens
        if self.expected_lens is not None:
            lens = torch.maximum(lens, self.expected_lens)
        order = np.lexsort((-lens.numpy(), draft_lens.numpy() > 0))
        return torch.from_numpy(order.astype(np.int64))


@dataclass(frozen=True, slots=True)
class Rollouts:
    """Finished rollouts, packed, in the order of the requests.

    Attributes:
        prompt_ids, cu_prompt_lens: As in the requests.
        response_ids: Accepted prefix, then continuation. [num_response_tokens], int32.
        cu_response_lens: [batch + 1], int64.
        logprobs: Of every response token under the policy of *this* call (reused ones too), natural
            log, sampling distribution; -inf of one kept unseen that top-k or top-p leave out.
            [num_response_tokens], float32.
        accepted_lens: Tokens of each response that came from its draft. [batch], int32.
        finish_reasons: `FinishReason` values. [batch], uint8.
        policy_version: Number of weight updates the engine had seen.
        stats: What the call cost.
        running: Seconds since the engine began, and requests in verification or decoding then,
            after each of its steps; None if the engine does not say. [steps, 2], float64.
        behaviour_logprobs: Those with which each token was first drawn: `logprobs` of a fresh one,
            carried along with a reused one through any number of epochs. [num_response_tokens],
            float32; None if they are not known (drafts without log-probs).
        ages: Epochs since each token was drawn, 0 for fresh ones. [num_response_tokens], int16;
            None if not known.
    """

    prompt_ids: torch.Tensor
    cu_prompt_lens: torch.Tensor
    response_ids: torch.Tensor
    cu_response_lens: torch.Tensor
    logprobs: torch.Tensor
    accepted_lens: torch.Tensor
    finish_reasons: torch.Tensor
    policy_version: int = 0
    stats: RolloutStats = field(default_factory=RolloutStats)
    running: torch.Tensor | None = None
    behaviour_logprobs: torch.Tensor | None = None
    ages: torch.Tensor | None = None

    def __post_init__(self) -> None:
        for name in (
            "prompt_ids", "cu_prompt_lens", "response_ids", "cu_response_lens", "logprobs",
            "accepted_lens", "finish_reasons",
        ):  # fmt: skip
            cpu_tensors(**{name: getattr(self, name)})
        if self.running is not None:
            cpu_tensors(running=self.running)
            if self.running.ndim != 2 or self.running.shape[1] != 2:
                raise ValueError(
                    f"running: expected shape [steps, 2], got {list(self.running.shape)}"
                )
        integer("policy_version", self.policy_version)
        of_kind("stats", self.stats, RolloutStats, "RolloutStats")
        batch = self.accepted_lens.numel()
        for name, rows, dtype in (
            ("accepted_lens", self.accepted_lens, torch.int32),
            ("finish_reasons", self.finish_reasons, torch.uint8),
        ):
            if rows.shape != (batch,) or rows.dtype != dtype:
                raise ValueError(
                    f"{name}: expected {dtype} of shape [{batch}], got {rows.dtype} "
                    f"{list(rows.shape)}"
                )
        if bool((self.finish_reasons > max(FinishReason)).any()):
            raise ValueError(
                "finish_reasons: expected FinishReason values, got "
                f"{int(self.finish_reasons.max())}"
            )
        check_packed("prompt_ids", self.prompt_ids, "cu_prompt_lens", self.cu_prompt_lens, batch)
        check_packed(
            "response_ids", self.response_ids, "cu_response_lens", self.cu_response_lens, batch
        )
        for name, values in (("prompt_ids", self.prompt_ids), ("response_ids", self.response_ids)):
            if values.dtype != torch.int32:
                raise ValueError(f"{name}: expected int32, got {values.dtype}")
        _check_per_token(self, self.response_ids, ("logprobs", "behaviour_logprobs"), ("ages",))
        if bool((self.accepted_lens > self.response_lens).any()) or bool(
            (self.accepted_lens < 0).any()
        ):
            raise ValueError("accepted_lens: expected 0 <= accepted length <= response length")

    @property
    def batch(self) -> int:
        return self.accepted_lens.numel()

    @property
    def response_lens(self) -> torch.Tensor:
        """[batch], int64."""
        return self.cu_response_lens[1:] - self.cu_response_lens[:-1]

    @property
    def prompt_lens(self) -> torch.Tensor:
        """[batch], int64."""
        return self.cu_prompt_lens[1:] - self.cu_prompt_lens[:-1]
