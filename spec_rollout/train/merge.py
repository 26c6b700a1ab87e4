"""Rollouts of several calls as one, and some groups of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from spec_rollout.packed import cu_lens_from
from spec_rollout.types import Rollouts, RolloutStats


def joined(parts: Sequence[Rollouts]) -> Rollouts:
    """Rows of all calls, one after the other; counts and seconds added up.

    `running` is that of the first call. What one call does not know (behaviour log-probs, ages)
    is not known of the whole.

    Args:
        parts: At least one, under the same policy.
    """
    if len(parts) == 1:
        return parts[0]

    def end_to_end(name: str) -> torch.Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    def optional(name: str) -> torch.Tensor | None:
        return None if any(getattr(part, name) is None for part in parts) else end_to_end(name)

    return replace(
        parts[0],
        prompt_ids=end_to_end("prompt_ids"),
        cu_prompt_lens=cu_lens_from(torch.cat([part.prompt_lens for part in parts])),
        response_ids=end_to_end("response_ids"),
        cu_response_lens=cu_lens_from(torch.cat([part.response_lens for part in parts])),
        logprobs=end_to_end("logprobs"),
        accepted_lens=end_to_end("accepted_lens"),
        finish_reasons=end_to_end("finish_reasons"),
        stats=sum((part.stats for part in parts), RolloutStats()),
        behaviour_logprobs=optional("behaviour_logprobs"),
        ages=optional("ages"),
    )


def chosen(rollouts: Rollouts, rows: torch.Tensor) -> Rollouts:
    """Some rows, in the order given. `stats` and `running` stay those of the whole.

    Args:
        rows: [num_rows], int64.
    """

    def of(cu_lens: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        spans = list(zip(cu_lens[rows].tolist(), cu_lens[rows + 1].tolist(), strict=True))
        return lambda values: torch.cat([values[:0], *(values[a:b] for a, b in spans)])

    prompts, responses = of(rollouts.cu_prompt_lens), of(rollouts.cu_response_lens)
    behaviour, ages = rollouts.behaviour_logprobs, rollouts.ages
    return replace(
        rollouts,
        prompt_ids=prompts(rollouts.prompt_ids),
        cu_prompt_lens=cu_lens_from(rollouts.prompt_lens[rows]),
        response_ids=responses(rollouts.response_ids),
        cu_response_lens=cu_lens_from(rollouts.response_lens[rows]),
        logprobs=responses(rollouts.logprobs),
        accepted_lens=rollouts.accepted_lens[rows],
        finish_reasons=rollouts.finish_reasons[rows],
        behaviour_logprobs=None if behaviour is None else responses(behaviour),
        ages=None if ages is None else responses(ages),
    )
