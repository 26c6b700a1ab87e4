"""A worker's proposer, and the weights of its model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from spec_rollout.engines.vllm.compat.identity import PROPOSER

if TYPE_CHECKING:
    from spec_rollout.engines.vllm.worker.chunks import ChunkProposer


def proposer_of(worker: Any) -> ChunkProposer:
    """The proposer of a vLLM worker.

    Raises:
        RuntimeError: if it has none of ours (another rank of a pipeline, or other engine
            arguments).
    """
    from spec_rollout.engines.vllm.worker.chunks import ChunkProposer

    proposer = getattr(worker.model_runner, "drafter", None)
    if not isinstance(proposer, ChunkProposer):
        raise RuntimeError(
            f"expected a worker with {PROPOSER}, got one with {type(proposer).__name__}"
        )
    return proposer


def load_weights(worker: Any, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copies weights, named as in the checkpoint, into the worker's model in place."""
    worker.model_runner.get_model().load_weights(named_tensors)


def weights_loaded(worker: Any) -> None:
    """Packs the new weights again where the platform keeps packed copies."""
    from vllm.platforms import current_platform

    from spec_rollout.engines.vllm.compat import cpu_wheels

    if current_platform.is_cpu():
        cpu_wheels.pack_again(worker.model_runner.get_model())
