"""What vLLM does with an engine before its first request: a profile of memory, and a warm-up."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from spec_rollout.engines.vllm.compat.v2.config import table_of


def serve_after_warm_up(worker: Any) -> None:
    """Has the warm-up of a worker (`compile_or_warm_up_model`) served, counted and learnt from by
    nobody.

    vLLM's requests for it go the way of a user's, so that kernels are compiled. On the object:
    classes of workers override the method.
    """
    original = worker.compile_or_warm_up_model

    @functools.wraps(original)
    def compile_or_warm_up_model(*args: Any, **kw: Any) -> Any:
        table = table_of(worker.model_runner)
        if table is None:
            return original(*args, **kw)
        table.is_warming_up = True
        try:
            return original(*args, **kw)
        finally:
            table.is_warming_up = False

    worker.compile_or_warm_up_model = compile_or_warm_up_model


def profiled_verification(original: Callable) -> Callable:
    """For `GPUModelRunner._dummy_sampler_run`, which only the profile of memory calls: the logits
    of a step that verifies as much as a step can.

    vLLM's own run has a row for each request. So many rows more, at most one for each token of a
    step, would be taken from what the profile gave to the KV cache.
    """

    @torch.inference_mode()
    def _dummy_sampler_run(self: Any, hidden_states: torch.Tensor) -> None:
        original(self, hidden_states)
        table = table_of(self)
        if table is None:
            return
        from vllm.v1.worker.gpu.spec_decode.rejection_sampler import get_max_chunk_logits

        num_rows = min(self.max_num_tokens, self.max_num_reqs * self.decode_query_len)
        if self.lora_config:
            # No adapter, for as many rows: the head's operators want one named for each.
            self._set_active_loras((0,) * num_rows, (0,) * num_rows, set())
        logits = self.model.compute_logits(hidden_states[:1].repeat(num_rows, 1))
        # Beside them: a chunk in float32, and what the first draft with log-probs will want.
        chunk = logits[: get_max_chunk_logits(logits.shape[1])].to(torch.float32, copy=True)
        logprobs = torch.empty_like(table.tokens, dtype=torch.float32)
        del logits, chunk, logprobs  # together up to here

    return _dummy_sampler_run
