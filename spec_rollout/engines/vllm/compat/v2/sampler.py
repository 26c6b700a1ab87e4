"""vLLM's two samplers with drafts beside: of steps with draft tokens, and of steps without."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from spec_rollout.engines.vllm.admission import admit, response_limits
from spec_rollout.engines.vllm.wire import ReuseRequest
from spec_rollout.engines.vllm.worker.v2 import kernels
from spec_rollout.engines.vllm.worker.v2.rules import Rows, decide
from spec_rollout.engines.vllm.worker.v2.table import DraftTable


def samplers(
    sampler: Any, table: DraftTable, vllm_config: Any, device: torch.device
) -> tuple[ReuseSampler, ReuseRejectionSampler]:
    """Ours, in the place of vLLM's.

    Raises:
        ValueError: if vLLM's is of a kind that draws otherwise.
    """
    if type(sampler) is not Sampler:
        raise ValueError(
            f"sampler: expected vLLM's {Sampler.__name__}, got {type(sampler).__name__}, whose "
            "draws spec_rollout does not know"
        )
    ours = ReuseSampler(sampler, table)
    return ours, ReuseRejectionSampler(ours, table, vllm_config.speculative_config, device)


class ReuseSampler(Sampler):
    """vLLM's sampler, which also takes requests' drafts, and tests them in steps without proposals.

    In such a step every request has one row: the token at the end of a prompt's prefill, and the
    one after a draft that was just accepted to the end of a chunk.

    Args:
        sampler: vLLM's, whose state this one takes over.
        table: The drafts.
    """

    def __init__(self, sampler: Sampler, table: DraftTable) -> None:
        self.__dict__.update(vars(sampler))
        self.table = table

    def add_request(self, req_idx: int, sampling_params: Any) -> None:
        """A request took a slot; see `Sampler.add_request`."""
        requests, params, table = self.req_states, sampling_params, self.table
        request_id = requests.index_to_req_id.get(req_idx)
        if request_id is None:  # of 0.33's profile of memory, which fills slots without requests
            super().add_request(req_idx, params)
            return
        reuse = admit(request_id, params, on_v2=True)
        prompt_len = int(requests.prompt_len.np[req_idx])
        most, stops = response_limits(params, requests.max_model_len - prompt_len)
        if table.proposals is not None and not isinstance(reuse, ReuseRequest):
            seed = table.proposals.seed_of(request_id, max_response_len=most, stop_token_ids=stops)
            if seed is not None:
                params = copy.copy(params)
                params.seed = seed
        super().add_request(req_idx, params)
        table.add(
            req_idx,
            request_id,
            reuse if isinstance(reuse, ReuseRequest) else None,
            prompt_len=prompt_len,
            max_response_len=most,
            stop_token_ids=stops,
            is_drawn=params.temperature > 0.0,
        )
        if table.proposals is not None:
            seed = int(self.sampling_states.seeds.np[req_idx])
            table.proposals.take_slot(req_idx, request_id, seed=seed, prompt_len=prompt_len)

    def apply_staged_writes(self) -> None:
        """See `Sampler.apply_staged_writes`."""
        super().apply_staged_writes()
        self.table.apply()

    def sample(
        self,
        logits: torch.Tensor,
        expanded_idx_mapping: torch.Tensor,
        idx_mapping: torch.Tensor,
        idx_mapping_np: np.ndarray,
        pos: torch.Tensor,
        input_ids: torch.Tensor,
        expanded_local_pos: torch.Tensor,
        seq_lens_upper_bound_np: np.ndarray,
        return_logprobs: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Sampler.sample`. Tokens [num_rows], int64, and processed logits."""
        of_step = (
            logits,
            expanded_idx_mapping,
            idx_mapping,
            idx_mapping_np,
            pos,
            input_ids,
            expanded_local_pos,
            seq_lens_upper_bound_np,
        )
        num_reqs = idx_mapping_np.size
        has_draft = self.table.any_draft(idx_mapping_np)
        proposals = self.table.proposals
        is_served = proposals is not None and proposals.is_served(idx_mapping_np)
        if not (has_draft or is_served) or logits.shape[0] != num_reqs:
            return super().sample(*of_step, return_logprobs=return_logprobs)
        decisions = None
        # What is proposed, and so which steps draw a token, depends on the keyed noise. Other noise
        # in steps without proposals, as vLLM has for requests without a seed, would bias tokens.
        if is_served or self.table.rules(idx_mapping_np):
            processed = self.apply_sampling_params(*of_step)
            drawn, decisions = self.decided(
                processed, expanded_idx_mapping, idx_mapping_np, pos, expanded_local_pos
            )
        else:
            drawn, processed = super().sample(*of_step, return_logprobs=return_logprobs)
        if not has_draft:
            return drawn, processed
        self.outcome(
            idx_mapping,
            drawn,
            scheduled=drawn,
            decisions=decisions,
            cu_rows=torch.arange(num_reqs + 1, dtype=torch.int32, device=drawn.device),
            pos=pos,
        )
        return drawn, processed

    def draw(self, expanded_idx_mapping: torch.Tensor, pos: torch.Tensor) -> Callable:
        """vLLM's seeded draw, of rows of processed logits [num_rows, vocab]."""
        states = self.sampling_states

        def drawn(processed: torch.Tensor) -> torch.Tensor:
            return gumbel_sample(
                processed,
                expanded_idx_mapping,
                states.temperature.gpu,
                states.seeds.gpu,
                pos,
                apply_temperature=False,
                is_drafting=False,
                use_fp64=self.use_fp64_gumbel,
            )

        return drawn

    def decided(
        self,
        processed: torch.Tensor,
        expanded_idx_mapping: torch.Tensor,
        idx_mapping_np: np.ndarray,
        pos: torch.Tensor,
        expanded_local_pos: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The token that each row gives [num_rows], int64, and what rules say of it (`decide`)."""
        draw = self.draw(expanded_idx_mapping, pos)
        rules = self.table.rules(idx_mapping_np)
        decisions = None
        if not rules:
            given = draw(processed)
        else:
            given, decisions = decide(
                self.table,
                rules,
                Rows(expanded_idx_mapping.long(), pos, expanded_local_pos),
                processed,
                draw,
                prompt_lens=self.req_states.prompt_len.gpu,
                prefill_lens=self.req_states.prefill_len.gpu,
            )
        proposals = self.table.proposals
        if proposals is not None and proposals.is_served(idx_mapping_np):
            proposals.keep_logprobs(expanded_idx_mapping, expanded_local_pos, processed, given)
        return given, decisions

    def outcome(
        self,
        idx_mapping: torch.Tensor,
        drawn: torch.Tensor,
        *,
        scheduled: torch.Tensor,
        decisions: torch.Tensor | None,
        cu_rows: torch.Tensor,
        pos: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What each request is given (`kernels.outcome`)."""
        return kernels.outcome(
            self.table,
            idx_mapping,
            drawn=drawn,
            scheduled=scheduled,
            decisions=decisions,
            cu_rows=cu_rows,
            positions=pos,
            prompt_lens=self.req_states.prompt_len.gpu,
            prefill_lens=self.req_states.prefill_len.gpu,
            width=self.table.max_chunk + 1,
        )


class ReuseRejectionSampler(RejectionSampler):
    """vLLM's rejection sampler with another test: what is drawn in each row decides.

    The stock one tests by the ratio of probabilities and draws again where a token is rejected, by
    other noise than a step without speculation: with it, tokens depend on what was proposed.
    Chunking over rows and log-probs are inherited.

    Args:
        sampler: Ours.
        table: The drafts.
        spec_config, device: As vLLM has them.
    """

    def __init__(
        self, sampler: ReuseSampler, table: DraftTable, spec_config: Any, device: torch.device
    ) -> None:
        super().__init__(sampler, spec_config, device)
        self.table = table

    def __call__(self, logits: torch.Tensor, input_batch: Any, *args: Any, **kw: Any) -> Any:
        """See `RejectionSampler.__call__`; no wider than the step gives tokens.

        vLLM makes lists of all columns, which takes the host milliseconds where many tokens could
        have been proposed to many requests.
        """
        output = super().__call__(logits, input_batch, *args, **kw)
        most = int(input_batch.num_draft_tokens_per_req.max()) + 1
        output.sampled_token_ids = output.sampled_token_ids[:, :most].contiguous()
        return output

    def _verify(
        self,
        logits: torch.Tensor,
        draft_logits: torch.Tensor | None,
        draft_sampled: torch.Tensor,
        pos: torch.Tensor,
        cu_num_logits: torch.Tensor,
        idx_mapping: torch.Tensor,
        idx_mapping_np: np.ndarray,
        expanded_idx_mapping: torch.Tensor,
        expanded_local_pos: torch.Tensor,
        seq_lens_upper_bound_np: np.ndarray,
        verify_draft_sampled: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        sampler = self.sampler
        processed = sampler.apply_sampling_params(
            logits,
            expanded_idx_mapping,
            idx_mapping,
            idx_mapping_np,
            pos,
            draft_sampled,
            expanded_local_pos,
            seq_lens_upper_bound_np,
        )
        drawn, decisions = sampler.decided(
            processed, expanded_idx_mapping, idx_mapping_np, pos, expanded_local_pos
        )
        sampled, num_sampled = sampler.outcome(
            idx_mapping,
            drawn,
            scheduled=verify_draft_sampled,
            decisions=decisions,
            cu_rows=cu_num_logits,
            pos=pos,
        )
        return processed, sampled, num_sampled
