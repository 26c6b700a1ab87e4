"""What the variable and an engine's own config make of the engine's arguments; none is started."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm_samples import LLM_ARGS

pytestmark = pytest.mark.slow


def test_the_engines_config_counts_before_the_variable(model_dir: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    def proposed(section: dict[str, Any]) -> int | None:
        """Most tokens in a step."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SPEC_ROLLOUT", "coupled")
            args = {**LLM_ARGS, "skip_tokenizer_init": True}
            args["additional_config"] = {"spec_rollout": section}
            config = EngineArgs(str(model_dir), **args).create_engine_config()
        speculative = config.speculative_config
        return None if speculative is None else speculative.num_speculative_tokens

    assert proposed({"first_chunk": 8}) == 31  # the variable's
    assert proposed({"history_bytes": 1 << 24}) == 15  # of `drafting`
    assert proposed({"mode": "off", "history_bytes": 1 << 24}) is None


def test_the_line_at_the_start_gives_the_engines_own_number(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import logger
    from vllm.engine.arg_utils import EngineArgs

    from spec_rollout.engines.vllm import engine_args

    lines: list[str] = []
    to_lines = SimpleNamespace(info=lambda text, *values: lines.append(text % values))
    init = logger.init_logger
    monkeypatch.setattr(
        logger, "init_logger", lambda name: to_lines if "spec_rollout" in name else init(name)
    )
    monkeypatch.setenv("SPEC_ROLLOUT", '{"mode": "coupled", "num_speculative_tokens": 24}')
    for args, expected in (({}, 24), (engine_args(8), 8)):
        config = EngineArgs(
            str(model_dir), **{**LLM_ARGS, "skip_tokenizer_init": True, **args}
        ).create_engine_config()
        assert config.speculative_config.num_speculative_tokens == expected
        assert f"up to {expected} tokens a step" in lines[-1]


@pytest.mark.parametrize(
    ("variable", "llm_args", "message"),
    [
        (
            "drafting",
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "SPEC_ROLLOUT=drafting: expected an engine without speculative_config, got .* ngram",
        ),
        (
            "drafting",
            {"async_scheduling": True},
            "SPEC_ROLLOUT=drafting: expected an engine without async_scheduling, got True",
        ),
        ("drafting", {"pipeline_parallel_size": 2}, "expected pipeline_parallel_size 1, got 2"),
        (
            '{"share": "/tmp/shared"}',
            {"tensor_parallel_size": 2},
            "share: expected tensor_parallel_size 1 with it, got 2",
        ),
        (
            "drafting",
            {"tensor_parallel_size": 2, "distributed_executor_backend": "external_launcher"},
            "tensor_parallel_size: expected 1 with .* external_launcher on Model Runner V1, got 2",
        ),
        ("drafting", {"logits_processors": ["a:B"]}, "expected an engine without logits_proc"),
        (
            '{"share": "/nowhere"}',
            {
                "speculative_config": {"method": "ngram_gpu", "num_speculative_tokens": 2},
                "additional_config": {"spec_rollout": {"model_runner": "v2"}},
            },
            "share: expected Model Runner V1 with it, got V2",
        ),
        (
            "drafting",
            {"weight_transfer_config": {"backend": "verl_delta_ipc"}},
            "expected a weight transfer that goes with speculation, got verl_delta_ipc .*delta_sh",
        ),
        ("draughting", {}, "SPEC_ROLLOUT: mode: expected one of off, drafting"),
        (
            "drafting",
            {"spec_tokens": 7},
            "SPEC_ROLLOUT=drafting: .* got num_speculative_tokens 7; .* option of that name",
        ),
        (
            "drafting",
            {"spec_method": "ngram", "spec_tokens": 7},
            "SPEC_ROLLOUT=drafting: expected an engine without speculative_config, got .* ngram",
        ),
        (
            "drafting",
            {"additional_config": {"spec_rollout": None}},
            "additional_config.spec_rollout: expected a mapping, a mode .* got None",
        ),
    ],
)
def test_engines_in_which_it_cannot_work_are_refused(
    model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    llm_args: dict[str, Any],
    message: str,
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setenv("SPEC_ROLLOUT", variable)
    with pytest.raises(ValueError, match=message):
        EngineArgs(str(model_dir), **llm_args).create_engine_config()


def test_vllms_short_forms_of_our_proposer_are_the_engines_own(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from spec_rollout.engines.vllm.compat.switch_on import switch_on
    from spec_rollout.engines.vllm.options import PROPOSER

    monkeypatch.setenv("SPEC_ROLLOUT", "drafting")
    given = {"spec_method": "custom_class", "spec_model": PROPOSER, "spec_tokens": 7}
    config = EngineArgs(str(model_dir), **given).create_engine_config()
    assert config.speculative_config.model == PROPOSER
    assert config.speculative_config.num_speculative_tokens == 7
    assert config.additional_config["spec_rollout"] == {"mode": "drafting"}
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    args = EngineArgs(str(model_dir), **given)
    switch_on(args, None)
    assert args.speculative_config == {"method": "ngram_gpu", "num_speculative_tokens": 7}
    assert args.spec_method is args.spec_model is args.spec_tokens is None


def test_the_engines_config_may_be_the_variables_text(model_dir: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    args = EngineArgs(str(model_dir), additional_config={"spec_rollout": "coupled", "other": 1})
    config = args.create_engine_config()
    assert config.additional_config == {"spec_rollout": {"mode": "coupled"}, "other": 1}
    assert config.speculative_config.num_speculative_tokens == 31
