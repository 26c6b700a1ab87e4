"""Synchronous scheduling on V2 is told how many of the proposed tokens are the draft's."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.worker.gpu.async_utils import async_copy_to_np
from vllm.v1.worker.gpu.spec_decode.utils import DraftTokensHandler

from spec_rollout.engines.vllm.worker.v2.table import DraftTable


class CountingHandler(DraftTokensHandler):
    """vLLM's, which would plan the whole width of the proposal for every request.

    Args:
        device: Of the model.
        table: Has the counts.
    """

    def __init__(self, device: torch.device, table: DraftTable) -> None:
        super().__init__(device)
        self._table = table
        self._counts: np.ndarray = np.zeros(0, np.int32)

    def set_draft_tokens(self, input_batch: Any, draft_tokens: torch.Tensor) -> None:
        """See `DraftTokensHandler`; the counts are copied beside."""
        super().set_draft_tokens(input_batch, draft_tokens)
        counts = self._table.counts[input_batch.idx_mapping]
        self.copy_stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.copy_stream):
            self._counts = async_copy_to_np(counts)
            counts.record_stream(self.copy_stream)
            self.copy_event.record()

    def get_draft_tokens(self) -> DraftTokenIds | None:
        """As vLLM's, each request's cut to what was proposed to it; waits for the counts."""
        self.copy_event.synchronize()
        found = super().get_draft_tokens()
        if found is None:
            return None
        tokens = found.draft_token_ids
        cut = [ids[:n] for ids, n in zip(tokens, self._counts.tolist(), strict=True)]
        return DraftTokenIds(found.req_ids, cut)
