"""Steps with nothing to test: one token for each request."""

from __future__ import annotations

import numpy as np
import torch

from spec_rollout import ops
from spec_rollout.engines.vllm.worker.groups import Known
from spec_rollout.engines.vllm.worker.sampling.base import Sampled, Step
from spec_rollout.engines.vllm.worker.sampling.record import Record
from spec_rollout.engines.vllm.worker.transfer import arriving, to_device


class PlainDraws:
    """One call of an op, no wait; the keys stay on the device while the batch is the same."""

    def __init__(self, record: Record) -> None:
        self._record = record

    def serve(self, step: Step, known: Known) -> Sampled | None:
        """See `Path.serve`."""
        if not step.is_plain or step.scheduled is not None:
            return None
        record = self._record
        indices = step.lens - known.prompt_lens
        result = ops.sample_tokens(
            step.logits,
            keys=known.keys_on(step.logits.device),
            positions=to_device(indices + known.first_positions, step.logits.device),
            temperature=step.temperature,
            top_k=step.top_k,
            top_p=step.top_p,
        )
        if known.any_collected:
            record.collector.add(known.collect_ids, indices.astype(np.int32), result.logprobs)
        # It is there when vLLM has the tokens on the host, for which it waits anyway.
        for_history = () if record.history is None else (result.token_ids, result.logprobs)
        record.arriving = arriving(step.logits, *for_history)
        tokens = result.token_ids[:, None]
        if step.logprobs is None:
            return tokens, None
        every = torch.arange(len(step.rows), device=tokens.device)
        return tokens, step.logprobs.gather(
            step.logits, every, every, result.token_ids, result.logprobs
        )
