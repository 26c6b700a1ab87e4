"""Engines for the tests of the vLLM plugin: in this process, on the CPU, on a tiny model."""

from __future__ import annotations

import gc
import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Read by vLLM when it is imported.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# vLLM compiles a helper for token ranks: a minute, once per process.
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")


# The folder is not called vllm: pytest puts its parent on the path, and `import vllm` would find
# the tests.
@pytest.fixture(scope="session", autouse=True)
def vllm_installed() -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")


@pytest.fixture(scope="session", autouse=True)
def engines_stand_alone(vllm_installed: None) -> Iterator[None]:
    """An `LLM` that is closed or collected leaves the other engines of this process running.

    vLLM's takes its process groups with it, which all of them share.
    """
    from vllm.v1.engine import core

    original = core.cleanup_dist_env_and_memory
    core.cleanup_dist_env_and_memory = gc.collect
    yield
    core.cleanup_dist_env_and_memory = original


@pytest.fixture
def even_steps(even_steps: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step takes as long, with proposals and without: also those of vLLM's workers here."""
    from spec_rollout.engines.vllm.worker.step_times import StepTimes

    readings = itertools.count(0.0, 2.0**-10)
    monkeypatch.setattr(StepTimes, "clock", staticmethod(lambda: next(readings)))


@pytest.fixture(scope="session")
def model_dir(vllm_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vllm_samples import make_model

    folder = tmp_path_factory.mktemp("tiny_qwen3")
    make_model(folder)
    return folder


@pytest.fixture(scope="session")
def hf_model(model_dir: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir).float().eval()


MakeEngine = Callable[..., Any]


@pytest.fixture(scope="session")
def make_engine(model_dir: Path) -> Iterator[MakeEngine]:
    """`make_engine(num_speculative_tokens=64, **llm_args)`; equal arguments share an engine."""
    from vllm_samples import LLM_ARGS

    from spec_rollout.engines.vllm import VLLMEngine

    engines: dict[str, Any] = {}

    def make(
        *,
        num_speculative_tokens: int = 64,
        first_chunk: int | None = None,
        strategy: Any = "inflight",
        **llm_args: Any,
    ) -> Any:
        name = repr((num_speculative_tokens, first_chunk, strategy, sorted(llm_args.items())))
        if name not in engines:
            engines[name] = VLLMEngine(
                str(model_dir),
                strategy=strategy,
                num_speculative_tokens=num_speculative_tokens,
                first_chunk=first_chunk,
                llm_args={**LLM_ARGS, **llm_args},
            )
        return engines[name]

    yield make
    engines.clear()


@pytest.fixture(scope="session")
def engine(make_engine: MakeEngine) -> Any:
    return make_engine()
