"""Proposes the next tokens of each request's draft, on the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.distributed.parallel_state import get_tp_group
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from spec_rollout.engines.vllm.worker.v2 import kernels
from spec_rollout.engines.vllm.worker.v2.step import StepState
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
        proposals = table.proposals
        if proposals is None and not table.is_warming_up:
            table.step(input_batch.num_tokens)
        proposed = kernels.propose(
            table,
            input_batch.idx_mapping,
            num_sampled=num_sampled,
            total_lens=requests.total_len.gpu,
            prompt_lens=requests.prompt_len.gpu,
            last_sampled=last_sampled.view(-1),
        )
        if proposals is None or table.is_warming_up:
            return proposed
        slots, scheduled = input_batch.idx_mapping_np, input_batch.num_draft_tokens_per_req
        step = StepState(
            slots=slots,
            device_slots=input_batch.idx_mapping,
            num_scheduled=np.zeros(slots.size, np.int64) if scheduled is None else scheduled,
            num_tokens=input_batch.num_tokens,
            num_logits=input_batch.logits_indices.shape[0],
            num_sampled=num_sampled,
            total_lens=requests.total_len.gpu,
            prompt_lens=requests.prompt_len.gpu,
            token_ids=requests.all_token_ids.gpu,
        )
        return self._agreed(proposals.propose(step, proposed, table.counts), input_batch)

    def _agreed(self, proposed: torch.Tensor, input_batch: Any) -> torch.Tensor:
        """What the first tensor-parallel rank proposes: how much depends on its clock."""
        group = get_tp_group()
        if group.world_size == 1:
            return proposed
        counts, slots = self.table.counts, input_batch.idx_mapping.long()
        both = torch.cat([counts[slots][:, None].long(), proposed], dim=1)
        both = group.broadcast(both, src=0)
        counts[slots] = both[:, 0].to(counts.dtype)
        return both[:, 1:].contiguous()
