"""One suite, sampled and judged: its figures and its responses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from spec_rollout.evals.estimates import Estimate, estimate
from spec_rollout.evals.sampling import Scores, decode_responses, judged_and_correct, score
from spec_rollout.loading.data import PromptRow
from spec_rollout.rewards import Progress, Rewards
from spec_rollout.rollout import RolloutSession
from spec_rollout.types import FinishReason, Rollouts, RolloutStats, SamplingParams


@dataclass(frozen=True, slots=True)
class EvalSettings:
    """How a suite is sampled and judged.

    Attributes:
        num_samples: Responses per problem.
        sampling: How their tokens are drawn.
        step: Of the noise (`RolloutSession.evaluate`).
        correct_at: A response counts as correct from this reward on.
        keep_special_tokens: See `RewardConfig`.
        drafting: See `RolloutSession.evaluate_rows`.
        portion: Responses sampled in one call: how often progress is told. Samples do not depend on
            it.
        progress: What rewards are told of the run; None knows no more of it than `step`.
    """

    num_samples: int
    sampling: SamplingParams
    step: int = 0
    correct_at: float = 1.0
    keep_special_tokens: bool = False
    drafting: bool = False
    portion: int = 1024
    progress: Progress | None = None


@dataclass(slots=True)
class SuiteResult:
    """What a suite gave.

    Attributes:
        name: Of the suite.
        counts: (judged samples, correct ones) of each problem; a response that no reward function
            judged is left out.
        num_skipped: Such responses.
        num_failed: Of these, responses for which a function failed.
        failures: What failed, with function and row, a line each.
        num_truncated: Responses that reached `max_tokens`.
        stats: Of sampling.
    """

    name: str
    counts: list[tuple[int, int]] = field(default_factory=list)
    num_skipped: int = 0
    num_failed: int = 0
    failures: list[str] = field(default_factory=list)
    num_truncated: int = 0
    stats: RolloutStats = field(default_factory=RolloutStats)

    def pass_at(self, k: int, confidence: float) -> Estimate | None:
        """See `estimates.estimate`."""
        return estimate(self.counts, k, confidence=confidence)

    def figures(self, pass_at: Sequence[int], confidence: float) -> dict[str, Any]:
        """For JSON and the table."""
        figures: dict[str, Any] = {"suite": self.name, "num_problems": len(self.counts)}
        for k in pass_at:
            found = self.pass_at(k, confidence)
            figures[f"pass@{k}"] = None if found is None else found.value
            figures[f"pass@{k}_interval"] = None if found is None else [found.low, found.high]
            figures[f"pass@{k}_num_problems"] = sum(judged >= k for judged, _ in self.counts)
        stats = self.stats
        num_responses = max(1, stats.num_rollouts)
        return {
            **figures,
            "num_responses": stats.num_rollouts,
            "num_skipped": self.num_skipped,
            "num_failed_rewards": self.num_failed,
            "response_len": stats.num_response_tokens / num_responses,
            "truncated_fraction": self.num_truncated / num_responses,
            "num_response_tokens": stats.num_response_tokens,
            "num_decode_steps": stats.num_decode_steps,
            "sampling_seconds": stats.rollout_seconds,
        }


def run_suite(
    name: str,
    session: RolloutSession,
    rewards: Rewards,
    tokenizer: Any,
    rows: Sequence[PromptRow],
    settings: EvalSettings,
    *,
    on_portion: Callable[[SuiteResult, int], None] | None = None,
    on_response: Callable[[dict[str, Any]], None] | None = None,
) -> SuiteResult:
    """Samples every problem afresh and judges the responses.

    With the same session, seed, step and sampling as a training run's, they are those of the
    trainer's own evaluation (`evals.sampling.evaluate`).

    Args:
        name: For the results.
        session: With the weights to be judged.
        rows: The problems.
        on_portion: Called with the result so far and the number of responses that were added.
        on_response: Called with each response, in the order of rows and samples.
    """
    result = SuiteResult(name)
    num_samples = settings.num_samples
    # As in `RolloutSession.rollout`: a problem that comes twice has other samples the second time.
    seen: Counter[bytes] = Counter()
    first_ids = []
    for row in rows:
        key = row.prompt_ids.tobytes()
        first_ids.append(seen[key] * num_samples)
        seen[key] += 1
    size = max(1, settings.portion // num_samples)
    for start in range(0, len(rows), size):
        chosen = rows[start : start + size]
        rollouts = session.evaluate_rows(
            [row.prompt_ids for row in chosen for _ in range(num_samples)],
            [first + i for first in first_ids[start : start + size] for i in range(num_samples)],
            settings.sampling,
            step=settings.step,
            drafting=settings.drafting,
        )
        scores = score(
            rewards,
            tokenizer,
            rollouts,
            chosen,
            num_samples,
            keep_special_tokens=settings.keep_special_tokens,
            progress=settings.progress or Progress(settings.step),
        )
        _add(result, rollouts, scores, settings)
        if on_response is not None:
            texts = decode_responses(
                tokenizer, rollouts, keep_special_tokens=settings.keep_special_tokens
            )
            _tell(on_response, name, start, chosen, rollouts, texts, scores.total, settings)
        if on_portion is not None:
            on_portion(result, rollouts.batch)
    return result


def _add(result: SuiteResult, rollouts: Rollouts, scores: Scores, settings: EvalSettings) -> None:
    result.counts += judged_and_correct(scores.total, settings.correct_at)
    result.num_skipped += int(torch.isnan(scores.total).sum())
    result.num_failed += scores.num_failed
    result.failures += scores.failures
    result.num_truncated += int((rollouts.finish_reasons == FinishReason.LENGTH).sum())
    result.stats += rollouts.stats


def _tell(
    on_response: Callable[[dict[str, Any]], None],
    name: str,
    start: int,
    rows: Sequence[PromptRow],
    rollouts: Rollouts,
    texts: Sequence[str],
    rewards: torch.Tensor,
    settings: EvalSettings,
) -> None:
    finish = rollouts.finish_reasons.tolist()
    lens = rollouts.response_lens.tolist()
    values = rewards.flatten().tolist()
    for index, text in enumerate(texts):
        problem, sample = divmod(index, settings.num_samples)
        row = rows[problem]
        reward = None if values[index] != values[index] else values[index]
        on_response(
            {
                "suite": name,
                "problem": start + problem,
                "sample": sample,
                "prompt": row.rendered,
                "answer": row.answer,
                "response": text,
                "reward": reward,
                "correct": None if reward is None else reward >= settings.correct_at,
                "num_tokens": lens[index],
                "finish_reason": FinishReason(finish[index]).name.lower(),
            }
        )


def mean_of(results: Sequence[SuiteResult], k: int) -> float | None:
    """Mean of pass@k over suites, each with equal weight, as the published tables average; None if
    one of them has none."""
    found = [result.pass_at(k, 0.95) for result in results]
    values = [estimate.value for estimate in found if estimate is not None]
    return sum(values) / len(values) if values and len(values) == len(results) else None


def table(results: Sequence[SuiteResult], pass_at: Sequence[int], confidence: float) -> str:
    """The results as text for a terminal.

    Where responses were left out, with how many, and with how many problems a pass@k is of if it is
    not of all.
    """
    left_out = any(result.num_skipped for result in results)
    head = ["suite", "problems", "samples", *(["left out"] if left_out else [])]
    empty = [""] * (len(head) - 1)
    head += [f"pass@{k} ({confidence:.0%} interval)" for k in pass_at]
    lines = [[*head, "tokens", "cut off", "seconds"]]
    for result in results:
        figures = result.figures(pass_at, confidence)
        cells = [result.name, str(len(result.counts)), str(figures["num_responses"])]
        cells += [str(result.num_skipped)] if left_out else []
        cells += [_pass_at_cell(figures, k) for k in pass_at]
        cells += [f"{figures['response_len']:.0f}", f"{figures['truncated_fraction']:.0%}"]
        lines.append([*cells, f"{figures['sampling_seconds']:.1f}"])
    if len(results) > 1:
        means = [mean_of(results, k) for k in pass_at]
        cells = ["-" if mean is None else f"{mean:.3f}" for mean in means]
        lines.append(["mean", *empty, *cells, "", "", ""])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _pass_at_cell(figures: Mapping[str, Any], k: int) -> str:
    value, interval = figures[f"pass@{k}"], figures[f"pass@{k}_interval"]
    if value is None:
        return "-"
    text = f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"
    num_problems = figures[f"pass@{k}_num_problems"]
    return text if num_problems == figures["num_problems"] else f"{text} of {num_problems} problems"
