"""Proposes the next tokens of each request's draft, on the device."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from spec_rollout.engines.vllm.worker.v2 import kernels
from spec_rollout.engines.vllm.worker.v2.table import DraftTable


class ReuseSpeculator(BaseSpeculator):
    """vLLM's interface of a speculator on a `DraftTable`.

    Args:
        table: The drafts.
        req_states: vLLM's `RequestState`.
    """

    supports_mm_inputs = False
    draft_logits = None

    def __init__(self, table: DraftTable, req_states: Any) -> None:
        self.table = table
        self._requests = req_states

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """There is no model whose graphs would have to be captured."""

    def capture(self) -> None:
        """As above."""

    @torch.inference_mode()
    def propose(
        self,
        input_batch: Any,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: Any,
        aux_hidden_states: Any,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        *args: Any,
        dummy_run: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        """See `BaseSpeculator.propose`. [num_reqs, num_speculative_tokens], int64."""
        table, requests = self.table, self._requests
        if dummy_run:
            shape = (input_batch.num_reqs, table.max_chunk)
            return torch.zeros(shape, dtype=torch.int64, device=table.device)
        table.step(input_batch.num_tokens)
        return kernels.propose(
            table,
            input_batch.idx_mapping,
            num_sampled=num_sampled,
            total_lens=requests.total_len.gpu,
            prompt_lens=requests.prompt_len.gpu,
            last_sampled=last_sampled.view(-1),
        )
