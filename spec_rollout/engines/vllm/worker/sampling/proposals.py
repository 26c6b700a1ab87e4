"""Steps with nothing but the drafter's proposals, just as it made them."""

from __future__ import annotations

import numpy as np
import torch

from spec_rollout.engines.vllm.worker.groups import Group, Known
from spec_rollout.engines.vllm.worker.sampling.base import SAMPLED, Runs, Sampled, Step
from spec_rollout.engines.vllm.worker.sampling.record import Record
from spec_rollout.engines.vllm.worker.verify import verify_group


class ProposalsOnly:
    """The whole batch is one group, put together from the drafter's arrays."""

    def __init__(self, record: Record) -> None:
        self._record = record

    def serve(self, step: Step, known: Known) -> Sampled | None:
        """See `Path.serve`."""
        record = self._record
        history = record.history
        if not step.is_plain or step.scheduled is None or history is None:
            return None
        indices = step.lens - known.prompt_lens
        scheduled = history.scheduled(known, indices, step.scheduled)
        if scheduled is None:
            return None
        proposed, lens, own_lens = scheduled
        group = Group.of_proposals(lens, indices, known)
        tokens = np.full((lens.size, int(lens.max()) + 1), -1, np.int32)
        record.expect_logprobs(tokens.shape)
        sampling = (step.temperature, step.top_k, step.top_p)
        accepted, drawn, logprobs = verify_group(
            SAMPLED, group, step.logits, sampling, proposed, None
        )()
        accepted = accepted.astype(np.int64)
        emitted: Runs = []
        record.given(step, group, proposed, accepted, drawn, logprobs, tokens, emitted)
        record.proposals_tested(
            int(lens.sum()),
            int(own_lens.sum()),
            int(accepted.sum()),
            int(np.minimum(accepted, own_lens).sum()),
        )
        tested = lens > 0
        history.tested(known.history_ids[tested], accepted[tested])
        output = torch.from_numpy(tokens)
        if step.logprobs is None:
            return output, None
        return output, step.logprobs.scatter(step.logits, tokens.shape, emitted, [], None)
