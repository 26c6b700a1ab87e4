"""From rollouts to rewards, and evaluation by fresh sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from spec_rollout.loading.data import PromptRow
from spec_rollout.rewards.rewards import Rewards
from spec_rollout.rollout import RolloutSession
from spec_rollout.types import Rollouts, SamplingParams


def decode_responses(tokenizer: Any, rollouts: Rollouts) -> list[str]:
    """Text of each response, special tokens left out."""
    ids = rollouts.response_ids.tolist()
    cu = rollouts.cu_response_lens.tolist()
    rows = [ids[start:end] for start, end in pairwise(cu)]
    decode = tokenizer.batch_decode
    return decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def score(
    rewards: Rewards,
    tokenizer: Any,
    rollouts: Rollouts,
    rows: Sequence[PromptRow],
    num_samples: int,
) -> torch.Tensor:
    """Rewards of all responses. [len(rows), num_samples], float64; NaN where the rewards skip a
    response."""
    values: list[float] = []
    for index, response in enumerate(decode_responses(tokenizer, rollouts)):
        row = rows[index // num_samples]
        value = rewards(row.prompt, response, row.answer, row.columns, row.source)
        values.append(float("nan") if value is None else value)
    return torch.tensor(values, dtype=torch.float64).view(len(rows), num_samples)


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Fresh plain samples of the current weights, judged.

    Attributes:
        accuracy: Share of responses whose reward reaches the bound; skipped ones left out, 0 if all
            are.
        reward: Mean reward, skipped ones left out; 0 if all are.
        seconds: Wall time of sampling.
    """

    accuracy: float
    reward: float
    seconds: float


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
) -> EvalResult:
    """Samples every prompt afresh (no cache, noise of its own that changes with `step`) and scores
    the responses."""
    rollouts = session.evaluate([row.prompt_ids for row in rows], num_samples, sampling, step=step)
    values = score(rewards, tokenizer, rollouts, rows, num_samples)
    given = values[~torch.isnan(values)]
    accuracy = float((given >= correct_at).double().mean()) if given.numel() else 0.0
    reward = float(given.mean()) if given.numel() else 0.0
    return EvalResult(accuracy, reward, rollouts.stats.rollout_seconds)
