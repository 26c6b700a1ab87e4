"""The published design on vLLM: score the draft as a prompt, cut it, resubmit the accepted prefix.

A baseline. Against verification in flight it computes the draft to its end whatever is rejected,
runs every request through the scheduler twice, loses the KV cache of the last, incomplete block,
and moves a log-prob object per draft token through vLLM.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from spec_rollout import ops
from spec_rollout.acceptance import AcceptanceRule, RuleKind
from spec_rollout.engines.vllm import compat
from spec_rollout.engines.vllm.client.requests import Job, Responses, split
from spec_rollout.packed import cu_lens_from
from spec_rollout.types import Drafts, FinishReason, SamplingParams

# A job's responses.
Generate = Callable[[Job, SamplingParams], Responses]
# vLLM's outputs for prompts, all with the same parameters (vLLM's SamplingParams).
Submit = Callable[[list[dict[str, list[int]]], Any], list[Any]]


def check_two_pass(sampling: SamplingParams, rule: AcceptanceRule) -> None:
    """Raises ValueError for what cannot be decided from vLLM's prompt log-probs."""
    if rule.kind is not RuleKind.LENIENT:
        raise ValueError(
            f"rule: expected Lenient or a baseline for the strategy two_pass, got {rule}; "
            "it needs the whole distribution, which two_pass does not have (use inflight)"
        )
    if (sampling.temperature, sampling.top_k, sampling.top_p) != (1.0, 0, 1.0):
        raise ValueError(
            "sampling: expected temperature 1, top_k 0, top_p 1 for the strategy two_pass (vLLM's "
            f"prompt log-probs are raw), got {sampling.temperature}, {sampling.top_k}, "
            f"{sampling.top_p}"
        )


def two_pass(
    job: Job, sampling: SamplingParams, *, generate: Generate, submit: Submit, max_model_len: int
) -> tuple[Responses, float]:
    """Responses to all rows of a job, and the seconds up to the cut.

    Args:
        job, sampling: As `check_two_pass` lets them pass.
        generate, submit: The engine's.
        max_model_len: Most tokens of prompt and response together.
    """
    start = time.perf_counter()
    drafts = job.drafts
    tokens = split(drafts.token_ids, drafts.cu_lens)
    logprobs = _score(submit, job.prompt_ids, tokens, max_model_len)
    accepted = ops.accept_prefix(
        drafts.logprobs,
        torch.from_numpy(logprobs),
        rule=job.rule,
        keys=torch.tensor(job.keys, dtype=torch.int64),
        cu_draft_lens=drafts.cu_lens,
    )
    seconds = time.perf_counter() - start

    lens = accepted.tolist()
    whole = (accepted == drafts.lens) & drafts.finished
    open_rows = [r for r in range(job.batch) if lens[r] < job.limits[r] and not whole[r]]
    continuations = Job(
        prompt_ids=[job.prompt_ids[r] + tokens[r][: lens[r]] for r in open_rows],
        limits=[job.limits[r] - lens[r] for r in open_rows],
        keys=[job.keys[r] for r in open_rows],
        first_positions=[lens[r] for r in open_rows],
        rule=job.rule,
        drafts=Drafts.none(len(open_rows)),
    )
    rest = generate(continuations, sampling)
    return _join(drafts, logprobs, accepted, whole, open_rows, rest), seconds


def _score(
    submit: Submit, prompts: list[list[int]], tokens: list[list[int]], max_model_len: int
) -> np.ndarray:
    """Log-probs of all draft tokens, packed. [num_draft_tokens], float32.

    A prompt leaves room for one generated token, so a draft token at the very end of the model's
    length is not scored, and rejected.
    """
    rows = [r for r, draft in enumerate(tokens) if draft]
    if not rows:
        return np.empty(0, np.float32)
    texts = [(prompts[r] + tokens[r])[: max_model_len - 1] for r in rows]
    outputs = submit([{"prompt_token_ids": ids} for ids in texts], compat.scoring_params())
    scored = []
    for r, output in zip(rows, outputs, strict=True):
        known = compat.scored_prompt_tokens(output, len(prompts[r]))
        values = np.full(len(tokens[r]), -math.inf, np.float32)
        values[: known.size] = known
        scored.append(values)
    return np.concatenate(scored)


def _join(
    drafts: Drafts,
    logprobs: np.ndarray,
    accepted: torch.Tensor,
    whole: torch.Tensor,
    open_rows: list[int],
    rest: Responses,
) -> Responses:
    """Accepted prefixes, each followed by its continuation where there is one."""
    cu = drafts.cu_lens.tolist()
    rest_cu = rest.cu_lens.tolist()
    index = {row: i for i, row in enumerate(open_rows)}
    ids: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    reasons: list[int] = []
    for row, n in enumerate(accepted.tolist()):
        ids.append(drafts.token_ids[cu[row] : cu[row] + n])
        values.append(torch.from_numpy(logprobs[cu[row] : cu[row] + n]))
        i = index.get(row)
        if i is None:
            reasons.append(FinishReason.STOP if whole[row] else FinishReason.LENGTH)
            continue
        ids.append(rest.ids[rest_cu[i] : rest_cu[i + 1]])
        values.append(rest.logprobs[rest_cu[i] : rest_cu[i + 1]])
        reasons.append(int(rest.finish_reasons[i]))
    lens = accepted.to(torch.int64).clone()
    lens[open_rows] += rest.cu_lens.diff()
    return Responses(
        ids=torch.cat(ids) if ids else rest.ids,
        logprobs=torch.cat(values) if values else rest.logprobs,
        cu_lens=cu_lens_from(lens),
        accepted_lens=accepted,
        finish_reasons=torch.tensor(reasons, dtype=torch.uint8),
    )
