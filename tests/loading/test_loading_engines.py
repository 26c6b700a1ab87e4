"""Which engine a config gets; runs on vLLM are tested with the plugin."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from spec_rollout import cli
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
    engines.check_engine(make_config().rollout, "eager")


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention", "spda"])
def test_an_attention_that_is_not_for_the_engine_is_named(
    make_config, monkeypatch, attention: str
) -> None:
    config = make_config(model={"attention": attention, "path": "not even a model"})
    with pytest.raises(
        ConfigError,
        match=rf'^model\.attention: expected "sdpa" or "eager" with .*, got "{attention}"',
    ):
        run(config)
    monkeypatch.setattr(engines, "find_spec", lambda _name: True)
    engines.check_engine(make_config(rollout={"engine": "vllm"}).rollout, attention)


def test_an_attention_that_is_not_for_the_engine_is_named_by_its_option(
    model_dir, write_rows, capsys
) -> None:
    argv = ["--prompts", str(write_rows([{"prompt": "1 2 =?"}])), "--model", str(model_dir)]
    argv += ["--attention", "flex_attention"]
    assert cli.main(["eval", *argv, "--reward", "last_number"]) == 2
    assert '--attention: expected "sdpa" or "eager" with --engine' in capsys.readouterr().err
