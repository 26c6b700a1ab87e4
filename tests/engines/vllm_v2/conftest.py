"""Engines on vLLM's Model Runner V2, in this process, on a tiny model. `make test-v2` runs them all."""

from __future__ import annotations

import gc
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def v2_here() -> Iterator[None]:
    """Model Runner V2 in this process, where engines come and go without taking others along."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    import v2_on_cpu

    if reason := v2_on_cpu.why_not():
        pytest.skip(reason)
    v2_on_cpu.prepare()
    from vllm.v1.engine import core

    v2_on_cpu.patch()
    original = core.cleanup_dist_env_and_memory
    core.cleanup_dist_env_and_memory = gc.collect
    yield
    core.cleanup_dist_env_and_memory = original


@pytest.fixture(scope="session", autouse=True)
def even_steps(v2_here: None) -> Iterator[None]:
    """Every step takes as long as every other: what is proposed from history depends on it."""
    from spec_rollout.engines.vllm.worker.step_times import StepTimes

    readings = itertools.count(0.0, 2.0**-10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepTimes, "clock", staticmethod(lambda: next(readings)))
        yield


@pytest.fixture(scope="session")
def model_dir(v2_here: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from v2_samples import make_model

    folder = tmp_path_factory.mktemp("tiny_qwen3")
    make_model(folder)
    return folder


MakeLLM = Callable[..., Any]


@pytest.fixture(scope="session")
def make_llm(model_dir: Path) -> Iterator[MakeLLM]:
    """`make_llm(num_speculative_tokens, **llm_args)`, 0 for stock; equal arguments share an `LLM`."""
    from v2_samples import LLM_ARGS
    from vllm import LLM

    from spec_rollout.engines.vllm import engine_args

    llms: dict[str, Any] = {}

    def make(num_speculative_tokens: int = 0, first_chunk: int | None = None, **args: Any) -> Any:
        name = repr((num_speculative_tokens, first_chunk, sorted(args.items())))
        if name not in llms:
            plugin = {"logprobs_mode": "processed_logprobs"}
            if num_speculative_tokens:
                plugin = engine_args(num_speculative_tokens, first_chunk=first_chunk)
            llms[name] = LLM(str(model_dir), **{**LLM_ARGS, **plugin, **args})
        return llms[name]

    yield make
    llms.clear()


@pytest.fixture(scope="session")
def stock(make_llm: MakeLLM) -> Any:
    """vLLM without speculation."""
    return make_llm()


@pytest.fixture(scope="session")
def reuse(make_llm: MakeLLM) -> Any:
    """vLLM with the plugin."""
    return make_llm(8)


@pytest.fixture(
    params=[False, pytest.param(True, marks=pytest.mark.v2_large)], ids=["sync", "async"]
)
def either(request: pytest.FixtureRequest, make_llm: MakeLLM) -> Any:
    """vLLM with the plugin, with synchronous scheduling and with asynchronous."""
    return make_llm(8, async_scheduling=True) if request.param else make_llm(8)
