"""Which engine a config gets; runs on vLLM are tested with the plugin."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from spec_rollout.config.sections import ConfigError
from spec_rollout.loading import engines
from spec_rollout.train.trainer import run


def test_missing_vllm_is_said_before_anything_is_loaded(make_config, monkeypatch) -> None:
    monkeypatch.setattr(
        engines, "find_spec", lambda name: None if name == "vllm" else find_spec(name)
    )
    config = make_config(rollout={"engine": "vllm"}, model={"path": "not even a model"})
    with pytest.raises(ConfigError, match=r"rollout\.engine: .*vllm<0.*no module"):
        run(config)
    assert not Path(config.log.run_dir).exists()


def test_the_engine_transformers_needs_no_vllm(make_config, monkeypatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda _name: None)
    engines.check_engine(make_config().rollout)
