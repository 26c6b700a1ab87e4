"""The drafter that vLLM is given, by the name that users' configurations have.

`speculative_config={"method": "custom_class", "model": "...proposer.ReuseProposer"}`. vLLM creates
it in every worker process before the model is loaded, so it installs the worker's hooks.
"""

from __future__ import annotations

from typing import Any

from spec_rollout.engines.vllm import compat
from spec_rollout.engines.vllm.options import first_chunk
from spec_rollout.engines.vllm.worker.chunks import ChunkProposer
from spec_rollout.engines.vllm.worker.engine_side import EngineSide
from spec_rollout.engines.vllm.worker.extension import ReuseWorker
from spec_rollout.engines.vllm.worker.sharing import HistorySharing


class ReuseProposer(ChunkProposer):
    """vLLM's `custom_class` proposer interface on a `ChunkProposer`.

    Args:
        vllm_config: vLLM's `VllmConfig`. `additional_config={"spec_rollout": {"first_chunk": n}}`
            changes the first chunk (16); the rest of that section is `EngineOptions`.

    Raises:
        ValueError: if `first_chunk` is no positive integer, or a chunk does not fit into vLLM's
            token budget, or the model keeps a recurrent state or is a pipeline, or scheduling is
            asynchronous, or the folder of shared rollouts is another model's.
    """

    def __init__(self, vllm_config: Any) -> None:
        compat.install_worker()
        compat.attach_calls(ReuseWorker)
        compat.check_state(vllm_config.model_config)
        compat.check_pipeline(vllm_config.parallel_config)
        compat.check_scheduling(vllm_config.scheduler_config)
        max_chunk = vllm_config.speculative_config.num_speculative_tokens
        first = first_chunk(vllm_config.additional_config)
        budget = vllm_config.scheduler_config.max_num_batched_tokens
        if max_chunk >= budget:
            # vLLM would wait forever to admit a request whose prompt is cached but for one token.
            raise ValueError(
                f"num_speculative_tokens: expected fewer than max_num_batched_tokens ({budget}), "
                f"got {max_chunk}"
            )
        super().__init__(
            first_chunk=min(first, max_chunk), max_chunk=max_chunk, token_budget=budget
        )
        compat.keep_cpu_weights()
        engine_options = compat.configured_options(vllm_config.additional_config)
        if engine_options is not None and engine_options.is_on:
            side = EngineSide(
                engine_options,
                logprobs_mode=vllm_config.model_config.logprobs_mode,
                has_peers=compat.has_peers(vllm_config.parallel_config),
                **compat.noise_source(vllm_config),
            )
            sharing = None
            if engine_options.share:
                compat.install_sharing()
                sharing = HistorySharing.in_folder(
                    engine_options.share,
                    compat.history_identity(vllm_config),
                    engine_options.history_bytes,
                    compat.log,
                )
            self.serve_by_itself(side, compat.log, sharing)

    def load_model(self, model: Any, *args: Any, **kwargs: Any) -> None:
        """There is no model to load; vLLM hands over its own, whose weights are watched."""
        if self.live is not None:
            compat.watch_weights(model, self.live.side)
