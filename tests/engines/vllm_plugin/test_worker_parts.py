"""What a worker does beside its steps, on stand-ins for vLLM's model runners."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spec_rollout.engines.vllm.options import EngineOptions
from spec_rollout.engines.vllm.wire import SampleName
from spec_rollout.engines.vllm.worker.chunks import ChunkProposer
from spec_rollout.engines.vllm.worker.engine_side import Arrival, EngineSide


def serving(mode: str) -> ChunkProposer:
    """The proposer of an engine that serves requests by itself."""
    proposer = ChunkProposer(first_chunk=4, max_chunk=8, token_budget=64)
    side = EngineSide(EngineOptions(mode=mode), engine_seed=0, replica=0)
    proposer.serve_by_itself(side, lambda line: None)
    return proposer


def v1_runner(proposer: ChunkProposer | None) -> dict[str, Any]:
    return {"drafter": proposer}


def v2_runner(proposer: ChunkProposer) -> dict[str, Any]:
    from spec_rollout.engines.vllm.compat.v2.config import TABLE

    table = SimpleNamespace(proposals=SimpleNamespace(live=proposer.live))
    return {"req_states": SimpleNamespace(**{TABLE: table})}


def say_loaded(runner: dict[str, Any]) -> None:
    """As `collective_rpc` does, with a model of no layers."""
    from spec_rollout.engines.vllm.worker import ReuseWorker

    model_runner = SimpleNamespace(**runner, get_model=torch.nn.Module)
    worker: Any = SimpleNamespace(model_runner=model_runner)
    ReuseWorker.spec_rollout_weights_loaded(worker)


@pytest.mark.parametrize("runner", [v1_runner, v2_runner])
def test_weights_that_came_past_the_model_count_as_changed_once_they_are_told_of(
    runner: Any,
) -> None:
    proposer = serving("coupled")
    assert proposer.live is not None
    side = proposer.live.side
    params = SimpleNamespace(temperature=1.0, seed=None, logprobs=None)

    def ask() -> int:
        served = side.admit(Arrival([5, 6], params, "", SampleName(3)))
        assert served is not None
        assert side.samples is not None
        side.samples.end(served.group, 3)
        return served.sample

    assert ask() == 3
    say_loaded(runner(proposer))
    say_loaded(runner(proposer))
    assert side.weights_version == 1
    assert ask() == 3
    assert ask() == -1  # the same weights still
    side.weights_changed()  # these came through the model, too
    say_loaded(runner(proposer))
    assert side.weights_version == 2


def test_of_engines_that_serve_nothing_by_themselves_nothing_is_counted() -> None:
    say_loaded(v1_runner(None))
    say_loaded(v1_runner(ChunkProposer(first_chunk=4, max_chunk=8, token_budget=64)))


def test_every_chunk_of_a_streamed_prompt_has_parameters_of_its_own() -> None:
    from vllm import SamplingParams

    from spec_rollout.engines.vllm.compat import sampling

    def params(**values: Any) -> Any:
        return SamplingParams(**{"max_tokens": 4, "temperature": 1.0, **values})

    state = SimpleNamespace(
        req_id="streamed",
        prompt_token_ids=[5, 6, 7],
        num_prompt_tokens=3,
        sampling_params=params(),
        prompt_embeds=None,
        lora_request=None,
        mm_features=[],
        generator=None,
    )
    proposer = serving("drafting")
    assert proposer.live is not None
    runner = SimpleNamespace(
        drafter=proposer,
        requests={state.req_id: state},
        input_batch=SimpleNamespace(req_ids=[state.req_id], generators={}),
        max_model_len=64,
        device=torch.device("cpu"),
    )

    @sampling.chunk_by_chunk
    def update(self: Any, req_id: str, prompt: list[int], sampling_params: Any) -> Any:
        state = self.requests[req_id]  # which vLLM changes in place, too
        state.prompt_token_ids, state.num_prompt_tokens = prompt, len(prompt)
        state.sampling_params = sampling_params
        return state

    (first,) = sampling._rows(runner, proposer)
    assert first is not None
    assert (first.prompt_len, first.max_response_len) == (3, 4)
    assert sampling._rows(runner, proposer) == [first]
    assert update(runner, state.req_id, [5, 6, 7, 8, 9], params(max_tokens=11)) is state
    (second,) = sampling._rows(runner, proposer)
    assert second is not None
    assert (second.prompt_len, second.max_response_len) == (5, 11)
    assert second.key != first.key
    assert len(proposer.live) == 1
    update(runner, state.req_id, [5, 6, 7, 8, 9, 3], params(repetition_penalty=1.3))
    assert sampling._rows(runner, proposer) == [None]  # vLLM's to sample
    assert len(proposer.live) == 0
