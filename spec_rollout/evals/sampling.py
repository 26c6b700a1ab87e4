"""From rollouts to rewards, and evaluation by fresh sampling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from spec_rollout.evals.estimates import estimate
from spec_rollout.loading.data import PromptRow
from spec_rollout.rewards import Progress, Rewards, Sample
from spec_rollout.rollout import RolloutSession
from spec_rollout.types import FinishReason, Rollouts, SamplingParams


def decode_responses(
    tokenizer: Any, rollouts: Rollouts, *, keep_special_tokens: bool = False
) -> list[str]:
    """Text of each response.

    Args:
        keep_special_tokens: Special tokens are part of the text, but for the stop token that ends
            the response: it says where the text ends, not what it says. Otherwise all are left
            out.
    """
    rows = _responses(rollouts)
    if keep_special_tokens:
        finish = rollouts.finish_reasons.tolist()
        rows = [
            row[:-1] if reason == FinishReason.STOP else row
            for row, reason in zip(rows, finish, strict=True)
        ]
    texts: list[str] = tokenizer.batch_decode(
        rows, skip_special_tokens=not keep_special_tokens, clean_up_tokenization_spaces=False
    )
    return texts


def _responses(rollouts: Rollouts) -> list[list[int]]:
    ids = rollouts.response_ids.tolist()
    return [ids[start:end] for start, end in pairwise(rollouts.cu_response_lens.tolist())]


@dataclass(frozen=True, slots=True)
class Scores:
    """Rewards of responses; NaN where a response was left out.

    Attributes:
        total: Weighted sum. [num_prompts, num_samples], float64.
        by_function: What each function gave, unweighted, by its label. As `total`, each.
        num_failed, failures, num_out_of_time, logged: See `Judgement`.
    """

    total: torch.Tensor
    by_function: Mapping[str, torch.Tensor]
    num_failed: int = 0
    failures: tuple[str, ...] = ()
    num_out_of_time: int | None = None
    logged: Mapping[str, list[float]] = field(default_factory=dict)

    def means(self) -> dict[str, float]:
        """Mean of each function over the responses that it judged, as `reward_LABEL`; NaN if there
        are none."""
        return {f"reward_{k}": float(v.nanmean()) for k, v in self.by_function.items()}


def score(
    rewards: Rewards,
    tokenizer: Any,
    rollouts: Rollouts,
    rows: Sequence[PromptRow],
    num_samples: int,
    *,
    keep_special_tokens: bool = False,
    progress: Progress | None = None,
) -> Scores:
    """Rewards of all responses: those of rows[0] first, `num_samples` of each row."""
    texts = decode_responses(tokenizer, rollouts, keep_special_tokens=keep_special_tokens)
    samples = []
    for index, (text, ids) in enumerate(zip(texts, _responses(rollouts), strict=True)):
        row = rows[index // num_samples]
        samples.append(
            Sample(row.prompt, text, row.answer, row.columns, row.source, ids, row.messages)
        )
    judged = rewards.judge(samples, progress)

    def tensor(values: Sequence[float | None]) -> torch.Tensor:
        filled = [math.nan if value is None else value for value in values]
        return torch.tensor(filled, dtype=torch.float64).view(len(rows), num_samples)

    return Scores(
        tensor(judged.totals),
        {name: tensor(v) for name, v in judged.by_function.items()},
        judged.num_failed,
        judged.failures,
        judged.num_out_of_time,
        judged.logged,
    )


def judged_and_correct(rewards: torch.Tensor, correct_at: float) -> list[tuple[int, int]]:
    """Of each prompt, how many responses were judged, and how many of them are correct.

    Args:
        rewards: NaN where a response was left out. [num_prompts, num_samples].
        correct_at: A response is correct from this reward on.
    """
    judged, correct = ~torch.isnan(rewards), rewards >= correct_at
    return list(zip(judged.sum(1).tolist(), correct.sum(1).tolist(), strict=True))


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Fresh plain samples of the current weights, judged.

    Attributes:
        accuracy: pass@1, the mean over prompts of the share of responses whose reward reaches the
            bound; skipped responses are left out, and prompts of which all are; NaN if all are.
        reward: Mean reward, skipped ones left out; NaN if all are.
        seconds: Wall time of sampling.
        means: Mean of each reward function (`Scores.means`).
        num_failed, failures: See `Judgement`.
    """

    accuracy: float
    reward: float
    seconds: float
    means: Mapping[str, float] = field(default_factory=dict)
    num_failed: int = 0
    failures: tuple[str, ...] = ()


def evaluate(
    session: RolloutSession,
    rewards: Rewards,
    tokenizer: Any,
    rows: Sequence[PromptRow],
    num_samples: int,
    sampling: SamplingParams,
    *,
    step: int,
    correct_at: float,
    keep_special_tokens: bool = False,
    progress: Progress | None = None,
) -> EvalResult:
    """Samples every prompt afresh (no cache, noise of its own that changes with `step`) and scores
    the responses.

    Args:
        progress: What rewards are told of the run; None knows no more of it than `step`.
    """
    rollouts = session.evaluate([row.prompt_ids for row in rows], num_samples, sampling, step=step)
    scores = score(
        rewards,
        tokenizer,
        rollouts,
        rows,
        num_samples,
        keep_special_tokens=keep_special_tokens,
        progress=progress or Progress(step),
    )
    values = scores.total
    given = values[~torch.isnan(values)]
    found = estimate(judged_and_correct(values, correct_at))
    return EvalResult(
        math.nan if found is None else found.value,
        float(given.mean()),
        rollouts.stats.rollout_seconds,
        scores.means(),
        scores.num_failed,
        scores.failures,
    )
