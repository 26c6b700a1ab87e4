"""What a step learns from: rollouts of its prompts, judged, and of others where it takes more."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from spec_rollout.evals.sampling import Scores, score
from spec_rollout.loading.data import PromptRow
from spec_rollout.train.components import Components
from spec_rollout.train.merge import chosen, joined
from spec_rollout.types import Rollouts

# Keeps the draws of other prompts apart from the shuffles of the data.
_REFILL_SALT = 0x5EED


@dataclass(frozen=True, slots=True)
class Experience:
    """The rollouts of a step.

    Attributes:
        rows: Every prompt rolled out.
        rollouts, scores: Of all of them; what the step logs.
        trained, rewards: Of the groups that the update takes.
        seconds: Wall time of rewards.
        metrics: By their names in metrics.jsonl.
    """

    rows: list[PromptRow]
    rollouts: Rollouts
    scores: Scores
    trained: Rollouts
    rewards: torch.Tensor
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)


Roll = Callable[[Sequence[PromptRow]], Rollouts]


def gather(parts: Components, step: int, roll: Roll) -> Experience:
    """Rolls the prompts of a step out and judges them.

    With `Needs.refill_rounds`, groups whose rewards are all equal are replaced by groups of other
    prompts: as many as are missing are drawn, at random from the whole data, until none is missing
    or the rounds are used up. If no group at all differs, there are no rewards for the update: it
    would follow what the algorithm adds to them, a penalty for length say, and nothing else.

    Args:
        step: 0-based.
        roll: Rolls prompts out, `rollout.num_samples` times each.
    """
    size = parts.config.rollout.num_samples
    wanted = [parts.data.rows[i] for i in parts.order.rows_of(step)]
    num_wanted = len(wanted)
    rounds = parts.algorithm.needs.refill_rounds
    others = refill_rows(parts, step) if rounds else []
    rows: list[PromptRow] = []
    calls: list[Rollouts] = []
    scored: list[Scores] = []
    differ: list[bool] = []
    seconds = 0.0
    while wanted:
        rollouts = roll(wanted)
        start = time.perf_counter()
        scores = score(
            parts.rewards,
            parts.policy.tokenizer,
            rollouts,
            wanted,
            size,
            keep_special_tokens=parts.config.reward.keep_special_tokens,
            progress=parts.progress(step),
        )
        seconds += time.perf_counter() - start
        rows += wanted
        calls.append(rollouts)
        scored.append(scores)
        differ += differing(scores.total).tolist()
        num_missing = num_wanted - sum(differ) if len(calls) <= rounds else 0
        wanted, others = [parts.data.rows[i] for i in others[:num_missing]], others[num_missing:]
    everything, scores = joined(calls), _joined_scores(scored)
    trained, rewards = everything, scores.total
    metrics: dict[str, float] = {}
    if size > 1:
        num_judged = int((~torch.isnan(scores.total)).any(1).sum())
        share = sum(differ) / num_judged if num_judged else math.nan
        metrics["zero_variance_fraction"] = 1 - share
    if rounds:
        metrics["num_refilled_prompts"] = len(rows) - num_wanted
        if not any(differ):
            rewards = torch.full_like(scores.total, torch.nan)
        elif not all(differ):
            groups = torch.tensor(differ).nonzero().flatten()
            trained = chosen(everything, (groups[:, None] * size + torch.arange(size)).flatten())
            rewards = scores.total[groups]
    return Experience(rows, everything, scores, trained, rewards, seconds, metrics)


def differing(rewards: torch.Tensor) -> torch.Tensor:
    """Whether a group has rewards that are not all equal; skipped ones (NaN) do not count.

    [num_groups, group_size], float64 -> [num_groups], bool.
    """
    given = ~torch.isnan(rewards)
    highest = torch.where(given, rewards, -torch.inf).amax(1)
    lowest = torch.where(given, rewards, torch.inf).amin(1)
    return highest > lowest


def refill_rows(parts: Components, step: int) -> list[int]:
    """Every row that is not in the step, in an order that follows from seed and step alone."""
    generator = np.random.default_rng((parts.config.train.seed % 2**63, _REFILL_SALT, step))
    own = set(parts.order.rows_of(step))
    return [row for row in generator.permutation(len(parts.data)).tolist() if row not in own]


def _joined_scores(parts: Sequence[Scores]) -> Scores:
    if len(parts) == 1:
        return parts[0]
    names = parts[0].by_function
    return Scores(
        torch.cat([part.total for part in parts]),
        {name: torch.cat([part.by_function[name] for part in parts]) for name in names},
        sum(part.num_failed for part in parts),
        tuple(line for part in parts for line in part.failures),
        None if parts[0].num_out_of_time is None else sum(p.num_out_of_time or 0 for p in parts),
        {
            name: [value for part in parts for value in part.logged.get(name, ())]
            for name in {name: None for part in parts for name in part.logged}
        },
    )
