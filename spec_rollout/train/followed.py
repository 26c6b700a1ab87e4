"""Responses that samples.jsonl follows through the epochs, each laid over its draft."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from spec_rollout.acceptance import AcceptanceRule, Lenient, OneHot
from spec_rollout.loading.order import PromptOrder
from spec_rollout.ops.reference.noise import accept_uniforms
from spec_rollout.packed import cu_lens_from
from spec_rollout.rollout import RolloutSession
from spec_rollout.runs.pieces import pieces
from spec_rollout.types import RolloutRequests, Rollouts

# Log-probs of the response tokens of all rows: [num_response_tokens], float32.
ScoreRows = Callable[[Rollouts], torch.Tensor]


def followed_rows(order: PromptOrder, per_step: int) -> frozenset[int]:
    """Rows of the data that are followed: the first `per_step` of each step of the first epoch.

    In the mean as many are in a step of a later one.
    """
    return frozenset(
        row for first in range(order.steps_per_epoch) for row in order.rows_of(first)[:per_step]
    )


def followed_places(order: PromptOrder, step: int, chosen: Set[int]) -> dict[int, int]:
    """Prompts of a step that are followed: the row of the data of each, by its place in the step.

    Args:
        step: 0-based.
        chosen: `followed_rows`, the same in every epoch.
    """
    return {place: row for place, row in enumerate(order.rows_of(step)) if row in chosen}


@dataclass(frozen=True, slots=True)
class Draft:
    """The draft of one response and how it was tested.

    Attributes:
        token_ids: [num_draft_tokens], int32.
        old_logprobs: Under the policy that scored it last; None if not known. [num_draft_tokens].
        new_logprobs: Under the current policy, each given the tokens before it; NaN where not
            known. [num_draft_tokens].
        thresholds: A token is kept while its draw is at most this; None under a rule that draws
            nothing of the kind. [num_draft_tokens].
        draws: In (0, 1]; None as `thresholds`. [num_draft_tokens].
    """

    token_ids: torch.Tensor
    old_logprobs: torch.Tensor | None
    new_logprobs: torch.Tensor
    thresholds: torch.Tensor | None
    draws: torch.Tensor | None

    def as_row(self, decode: Callable[[list[int]], str]) -> dict[str, Any]:
        """For samples.jsonl."""
        return {
            "tokens": pieces(self.token_ids.tolist(), decode),
            "old_logprobs": rounded(self.old_logprobs),
            "new_logprobs": rounded(self.new_logprobs),
            "thresholds": rounded(self.thresholds),
            "draws": rounded(self.draws),
        }


def rounded(values: torch.Tensor | None) -> list[float | None] | None:
    """For samples.jsonl: None for what is no number of JSON's."""
    if values is None:
        return None
    return [round(value, 4) if value - value == 0 else None for value in values.tolist()]


@dataclass(frozen=True, slots=True)
class _Row:
    prompt_ids: torch.Tensor
    token_ids: torch.Tensor
    logprobs: torch.Tensor | None
    key: torch.Tensor
    rule: AcceptanceRule


class FollowedDrafts:
    """Keeps the drafts of the followed prompts' first responses, of one step's rollouts.

    Args:
        places: Places of the prompts within the step.
        num_samples: Responses per prompt.
    """

    def __init__(self, places: Iterable[int], num_samples: int) -> None:
        self._places = tuple(places)
        self._num_samples = num_samples
        self._rows: dict[int, _Row] = {}

    @contextmanager
    def listening(self, session: RolloutSession) -> Iterator[None]:
        """Within it the first call of `session` is listened to: that of the step's own prompts."""
        session.on_requests = self._take
        try:
            yield
        finally:
            session.on_requests = None

    def _take(self, requests: RolloutRequests, rule: AcceptanceRule) -> None:
        if self._rows:
            return
        drafts = requests.drafts
        for place in self._places:
            r = place * self._num_samples
            span = slice(int(drafts.cu_lens[r]), int(drafts.cu_lens[r + 1]))
            prompt = slice(int(requests.cu_prompt_lens[r]), int(requests.cu_prompt_lens[r + 1]))
            self._rows[place] = _Row(
                requests.prompt_ids[prompt].clone(),
                drafts.token_ids[span].clone(),
                None if drafts.logprobs is None else drafts.logprobs[span].clone(),
                requests.keys[r : r + 1].clone(),
                rule,
            )

    def tested(self, rollouts: Rollouts, score: ScoreRows | None) -> dict[int, Draft]:
        """How each draft fared, by the prompt's place; a prompt without a draft is left out.

        Args:
            rollouts: Of the step.
            score: Scores rows under the policy that made the rollouts; None: it would be another
                distribution than the one sampled from.
        """
        rows = {place: row for place, row in self._rows.items() if row.token_ids.numel()}
        kept = {p: int(rollouts.accepted_lens[p * self._num_samples]) for p in rows}
        cut = [place for place, row in rows.items() if kept[place] < row.token_ids.numel()]
        scored: dict[int, torch.Tensor] = {}
        if cut and score is not None:
            parts = score(_as_rollouts([rows[place] for place in cut]))
            lens = [rows[place].token_ids.numel() for place in cut]
            scored = dict(zip(cut, parts.split(lens), strict=True))
        found = {}
        for place, row in rows.items():
            new = torch.full(row.token_ids.shape, torch.nan, dtype=torch.float32)
            if place in scored:
                new = scored[place].clone()
            # What the engine itself said, where it did.
            start = int(rollouts.cu_response_lens[place * self._num_samples])
            new[: kept[place]] = rollouts.logprobs[start : start + kept[place]]
            thresholds = _thresholds(row.rule, row.logprobs, new)
            draws = None
            if thresholds is not None:
                positions = torch.arange(new.numel())
                draws = accept_uniforms(row.key, positions)
            found[place] = Draft(row.token_ids, row.logprobs, new, thresholds, draws)
        return found


def _thresholds(
    rule: AcceptanceRule, old: torch.Tensor | None, new: torch.Tensor
) -> torch.Tensor | None:
    """Probability with which each token is kept; the rules' definitions in
    `spec_rollout.acceptance`."""
    if isinstance(rule, OneHot):
        return new.double().exp()
    if not isinstance(rule, Lenient) or old is None or not rule.needs_draft_logprobs:
        return None
    ratio = new.double() - old.double()
    threshold = (rule.scale * (rule.kernel_params[1] + ratio)).exp().clamp(max=1.0)
    return torch.where(new.double().exp() > rule.min_target_prob, threshold, 0.0)


def _as_rollouts(rows: Sequence[_Row]) -> Rollouts:
    """Drafts in the place of responses, for whatever scores those."""
    ids = torch.cat([row.token_ids for row in rows])
    return Rollouts(
        prompt_ids=torch.cat([row.prompt_ids for row in rows]),
        cu_prompt_lens=cu_lens_from(torch.tensor([row.prompt_ids.numel() for row in rows])),
        response_ids=ids,
        cu_response_lens=cu_lens_from(torch.tensor([row.token_ids.numel() for row in rows])),
        logprobs=torch.zeros(ids.numel(), dtype=torch.float32),
        accepted_lens=torch.zeros(len(rows), dtype=torch.int32),
        finish_reasons=torch.zeros(len(rows), dtype=torch.uint8),
    )
