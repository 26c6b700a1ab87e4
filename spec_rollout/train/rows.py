"""What a run notes of a step: its row of metrics.jsonl, its samples, its running requests."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch

from spec_rollout.evals.sampling import Scores
from spec_rollout.loading.data import PromptRow
from spec_rollout.runs.pieces import pieces
from spec_rollout.train.algorithms.base import Advantages
from spec_rollout.train.followed import Draft, rounded
from spec_rollout.train.update_result import UpdateResult
from spec_rollout.types import FinishReason, Rollouts

Row = dict[str, Any]


def step_row(
    step: int,
    epoch: int,
    rollouts: Rollouts,
    scores: Scores,
    trained: Advantages,
    update: UpdateResult,
    engine_counters: Mapping[str, float],
) -> Row:
    """The row of a training step, without the times of its parts.

    Args:
        step: Updates done with this one.
        epoch: 0-based.
        engine_counters: What only the engine counts (`EngineCounters.as_row`).
    """
    rewards = scores.total
    given = rewards[~torch.isnan(rewards)]
    truncated = rollouts.finish_reasons == FinishReason.LENGTH
    return {
        "step": step,
        "epoch": epoch,
        # NaN, which is null in the file, if no response was judged.
        "reward": float(given.mean()),
        "reward_std": float(given.std(correction=0)) if given.numel() else math.nan,
        **scores.means(),
        "num_skipped_rewards": rewards.numel() - given.numel(),
        **reward_row(scores),
        **trained.metrics,
        "response_len": float(rollouts.response_lens.double().mean()),
        "truncated_fraction": float(truncated.double().mean()),
        **rollouts.stats.as_row(),
        **engine_counters,
        **update.as_row(),
    }


def reward_row(scores: Scores) -> Row:
    """What went wrong in rewards, where anything can, and what they logged."""
    row: Row = {"num_failed_rewards": scores.num_failed}
    if scores.num_out_of_time is not None:
        row["num_answers_out_of_time"] = scores.num_out_of_time
    row.update({f"logged_{name}": fmean(values) for name, values in scores.logged.items()})
    return row


def sample_rows(
    facts: Row,
    rollouts: Rollouts,
    rewards: torch.Tensor,
    prompts: Sequence[PromptRow],
    places: Mapping[int, int],
    drafts: Mapping[int, Draft],
    decode: Callable[[list[int]], str],
) -> Iterator[Row]:
    """The first response of some prompts, token by token, for the report's viewer.

    Args:
        facts: What all of them have: step, epoch, rule.
        rollouts: Of all prompts of the step.
        rewards: Of the same. [num_prompts, num_samples].
        prompts: All prompts of the step.
        places: Which ones: the row of the data of each, by its place within the step.
        drafts: Of the responses that had one, by the same.
        decode: The tokenizer's.
    """
    for place, row in places.items():
        r = place * rewards.shape[1]
        span = slice(int(rollouts.cu_response_lens[r]), int(rollouts.cu_response_lens[r + 1]))
        reward = float(rewards[place, 0])
        yield {
            **facts,
            "row": row,
            "prompt": prompts[place].rendered,
            "tokens": pieces(rollouts.response_ids[span].tolist(), decode),
            "logprobs": rounded(rollouts.logprobs[span]),
            "accepted_tokens": int(rollouts.accepted_lens[r]),
            "finish_reason": FinishReason(int(rollouts.finish_reasons[r])).name.lower(),
            "reward": None if reward != reward else reward,
            "draft": drafts[place].as_row(decode) if place in drafts else None,
        }


def thinned(running: torch.Tensor, most: int = 200) -> dict[str, list[float]]:
    """`Rollouts.running` with about `most` points, the last one kept.

    Returns:
        {"seconds": ..., "running": ...}, of equal length.
    """
    every = -(-running.shape[0] // most) if running.shape[0] else 1
    points = running.flip(0)[::every].flip(0)
    return {
        "seconds": [round(value, 4) for value in points[:, 0].tolist()],
        "running": points[:, 1].long().tolist(),
    }
