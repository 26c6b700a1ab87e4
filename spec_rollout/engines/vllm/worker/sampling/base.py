"""A step of the model runner, and what a way of sampling it has to offer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from spec_rollout.acceptance import Coupled
from spec_rollout.engines.vllm.worker.groups import Known
from spec_rollout.engines.vllm.worker.logprobs import SampledLogprobs
from spec_rollout.engines.vllm.worker.request_state import Row

SAMPLED = Coupled()  # passes what keyed sampling gives at that position

# Token ids [batch, most tokens], int32, -1 where a request got fewer; vLLM's LogprobsTensors or
# None.
Sampled = tuple[torch.Tensor, Any]
# (request, first logits row, its tokens, their log-probs) of the requests served in one step.
Runs = list[tuple[int, int, np.ndarray, np.ndarray]]


@dataclass(slots=True)
class Step:
    """What the sampler needs of one step of the model runner.

    Attributes:
        rows: Per request of the batch, in its order: our state of it, or None for a request without
            a key.
        lens: Tokens of prompt and response so far. [batch], int64 (numpy).
        scheduled: Draft tokens vLLM scheduled, per request (its own inventions included).
        discard: Whether vLLM throws the sample away (prefill not finished). [batch], bool (numpy).
        logits: [sum(len(scheduled) + 1), vocab]. `ReuseSampler` changes them in place where
            requests restrict their vocabulary.
        temperature, top_k, top_p: As the ops take them: a number, or [batch] on the logits' device.
        sample_stock: Logits [batch, vocab] -> vLLM's own sampler output for them.
        logprobs: What vLLM wants returned, or None.
        is_plain: Every request has a key and no draft left to verify, and every sample is kept. Set
            by `ReuseSampler`.
    """

    rows: list[Row | None]
    lens: np.ndarray
    scheduled: list[list[int]] | None
    discard: np.ndarray
    logits: torch.Tensor
    temperature: float | torch.Tensor
    top_k: int | torch.Tensor
    top_p: float | torch.Tensor
    sample_stock: Callable[[torch.Tensor], Any]
    logprobs: SampledLogprobs | None
    is_plain: bool = False


class Path(Protocol):
    """A way to sample steps of some kind."""

    def serve(self, step: Step, known: Known) -> Sampled | None:
        """Samples a step, and writes down what it gave (`record.Record`).

        Args:
            step: The step.
            known: What is fixed about its requests.

        Returns:
            The tokens; or None, with nothing changed, if the step is not of the kind served here.
        """
        ...
