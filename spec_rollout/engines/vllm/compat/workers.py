"""A worker's proposer, and the weights of its model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spec_rollout.engines.vllm.compat import cpu_wheels
from spec_rollout.engines.vllm.compat.identity import PROPOSER
from spec_rollout.engines.vllm.compat.reload import WeightUpdate, refresh_derived
from spec_rollout.engines.vllm.compat.v2.config import table_of

if TYPE_CHECKING:
    from spec_rollout.engines.vllm.worker.chunks import ChunkProposer
    from spec_rollout.engines.vllm.worker.engine_side import EngineSide
    from spec_rollout.engines.vllm.worker.live import LiveRequests
    from spec_rollout.engines.vllm.worker.v2.table import DraftTable


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


def call_of(worker: Any) -> ChunkProposer | DraftTable:
    """What a worker of either model runner is told of rollout calls.

    Raises:
        RuntimeError: as `proposer_of`.
    """
    table = table_of(worker.model_runner)
    return proposer_of(worker) if table is None else table


def live_requests(worker: Any) -> LiveRequests | None:
    """The requests that a worker's engine serves by itself, as of now; None if it serves none so.

    Raises:
        RuntimeError: as `proposer_of`.
    """
    from spec_rollout.engines.vllm.compat.sampling import sweep

    table = table_of(worker.model_runner)
    if table is not None:
        if table.proposals is None:
            return None
        table.proposals.settle()
        return table.proposals.live
    proposer = proposer_of(worker)
    sweep(worker.model_runner, proposer)
    return proposer.live


def _side(runner: Any) -> EngineSide | None:
    """Of either model runner; None where its engine serves nothing by itself, or is not ours."""
    from spec_rollout.engines.vllm.compat.sampling import side_of

    table = table_of(runner)
    if table is None:
        return side_of(runner)
    live = None if table.proposals is None else table.proposals.live
    return None if live is None else live.side


def start_update(worker: Any) -> WeightUpdate:
    """Begins an update of the weights of the worker's model."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        cpu_wheels.note_packing()
    return WeightUpdate(worker)


def finish_update(worker: Any, update: WeightUpdate) -> None:
    """Ends an update; the platform's packed copies are of the new weights then."""
    from vllm.platforms import current_platform

    update.finish()
    if current_platform.is_cpu():
        cpu_wheels.pack_again(worker.model_runner.get_model())


def weights_loaded(worker: Any) -> None:
    """After weights that others loaded: what is made from weights is made anew.

    It is a change of weights, also where they came past the model's `load_weights`.
    """
    from vllm.platforms import current_platform

    if (side := _side(worker.model_runner)) is not None:
        side.weights_changed()
    model = worker.model_runner.get_model()
    if current_platform.is_cpu():
        cpu_wheels.note_packing()
        cpu_wheels.pack_again(model)
    refresh_derived(model)
