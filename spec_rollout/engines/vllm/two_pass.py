"""The published design on vLLM: score the draft as a prompt, cut it, resubmit the accepted prefix.

A baseline. Against verification in flight it computes the draft to its end whatever is rejected, runs every request
through the scheduler twice, loses the KV cache of the last, incomplete block, and moves a log-prob object per draft
token through vLLM.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from spec_rollout import ops
from spec_rollout.acceptance import AcceptanceRule, RuleKind
from spec_rollout.engines.vllm.requests import Job, Responses, split
from spec_rollout.types import Drafts, FinishReason, RolloutRequests, SamplingParams, cu_lens_from

if TYPE_CHECKING:
    from spec_rollout.engines.vllm.engine import VLLMEngine


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
            f"prompt log-probs are raw), got {sampling.temperature}, {sampling.top_k}, {sampling.top_p}"
        )


def two_pass(
    engine: VLLMEngine,
    requests: RolloutRequests,
    drafts: Drafts,
    sampling: SamplingParams,
    rule: AcceptanceRule,
) -> tuple[Responses, float]:
    """Responses to all requests, and the seconds up to the cut.

    Args:
        drafts: Ended at their first stop token and cut to what a response can hold; rows as in `requests`.
    """
    check_two_pass(sampling, rule)
    start = time.perf_counter()
    prompts = split(requests.prompt_ids, requests.cu_prompt_lens)
    tokens = split(drafts.token_ids, drafts.cu_lens)
    keys = requests.keys.tolist()
    logprobs = _score(engine, prompts, tokens, keys, rule)
    accepted = ops.accept_prefix(
        drafts.logprobs,
        torch.from_numpy(logprobs),
        rule=rule,
        keys=requests.keys,
        cu_draft_lens=drafts.cu_lens,
    )
    seconds = time.perf_counter() - start

    limits = [
        min(sampling.max_tokens, engine.max_model_len - len(prompt)) - n
        for prompt, n in zip(prompts, accepted.tolist(), strict=True)
    ]
    whole = (accepted == drafts.lens) & drafts.finished
    open_rows = [r for r in range(requests.batch) if limits[r] > 0 and not whole[r]]
    job = Job(
        prompts_=[prompts[r] + tokens[r][: int(accepted[r])] for r in open_rows],
        limits=[limits[r] for r in open_rows],
        keys=[keys[r] for r in open_rows],
        first_positions=[int(accepted[r]) for r in open_rows],
        rule=rule,
        drafts=Drafts.none(len(open_rows)),
    )
    rest = engine.generate(job, sampling)
    return _join(drafts, logprobs, accepted, whole, open_rows, rest), seconds


def _score(
    engine: VLLMEngine,
    prompts: list[list[int]],
    tokens: list[list[int]],
    keys: list[int],
    rule: AcceptanceRule,
) -> np.ndarray:
    """Log-probs of all draft tokens, packed. [num_draft_tokens], float32."""
    rows = [r for r, draft in enumerate(tokens) if draft]
    if not rows:
        return np.empty(0, np.float32)
    # A request generates at least one token; the draft's last one, which need not be input to be scored, makes room.
    from vllm import SamplingParams as VLLMSamplingParams

    params = VLLMSamplingParams(
        max_tokens=1, temperature=1.0, prompt_logprobs=0, flat_logprobs=True, detokenize=False, ignore_eos=True
    )
    outputs = engine.llm.generate(
        [{"prompt_token_ids": _fitting(prompts[r] + tokens[r], engine.max_model_len)} for r in rows],
        params,
        use_tqdm=False,
    )
    del keys, rule
    scored = []
    for r, output in zip(rows, outputs, strict=True):
        first, flat = len(prompts[r]), output.prompt_logprobs
        values = np.full(len(tokens[r]), -math.inf, np.float32)
        got = [flat.logprobs[flat.start_indices[i]] for i in range(first, len(flat))]
        values[: len(got)] = got
        scored.append(values)
    return np.concatenate(scored)


def _fitting(ids: list[int], max_model_len: int) -> list[int]:
    return ids[: max_model_len - 1]


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
    ids, values, reasons = [], [], []
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
