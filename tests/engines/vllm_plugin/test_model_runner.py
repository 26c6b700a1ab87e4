"""Which of vLLM's model runners an engine is set up for, on V1, which this folder's tests run on."""

from __future__ import annotations

from pathlib import Path

import pytest


def test_the_environment_decides_where_nobody_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from spec_rollout.engines.vllm import engine_args

    def method(**kw: str | None) -> str:
        return engine_args(8, **kw)["speculative_config"]["method"]

    for value in ("", "0"):
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", value)
        assert method() == "custom_class"
    assert method(model_runner="v2") == "ngram_gpu"
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    assert method() == "ngram_gpu"
    assert method(model_runner="v1") == "custom_class"
    with pytest.raises(ValueError, match="model_runner: expected one of v1, v2 or None, got 'v3'"):
        method(model_runner="v3")


def test_v2_where_vllm_runs_v1_is_an_error(model_dir: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from spec_rollout.engines.vllm import engine_args

    args = EngineArgs(str(model_dir), **engine_args(8, model_runner="v2"))
    with pytest.raises(ValueError, match="expected an engine on it, got one on Model Runner V1"):
        args.create_engine_config()


def test_v1_is_the_default_on_gpus_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import platforms, triton_utils

    from spec_rollout.engines.vllm import engine_args

    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    monkeypatch.setattr(platforms.current_platform, "is_cuda", lambda: True, raising=False)
    monkeypatch.setattr(triton_utils, "HAS_TRITON", True)
    assert engine_args(8)["speculative_config"]["method"] == "custom_class"
