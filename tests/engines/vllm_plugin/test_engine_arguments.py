"""Arguments of the user's own beside those that put the plugin into an engine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm_samples import LLM_ARGS


def test_arguments_of_the_users_own_are_joined_with_the_plugins() -> None:
    from spec_rollout.engines.vllm import engine_args
    from spec_rollout.engines.vllm.client.arguments import merged

    ours = engine_args(8, first_chunk=2, model_runner="v1")
    assert merged(ours, {})["additional_config"] == {"spec_rollout": {"first_chunk": 2}}
    own = {"additional_config": {"other": 1, "spec_rollout": "coupled"}, "seed": 3}
    joined = merged(ours, own)
    assert joined["additional_config"] == {
        "other": 1,
        "spec_rollout": {"first_chunk": 2, "mode": "coupled"},
    }
    assert joined["seed"] == 3
    assert own["additional_config"]["spec_rollout"] == "coupled"
    theirs_first = merged(ours, {"additional_config": {"spec_rollout": {"first_chunk": 4}}})
    assert theirs_first["additional_config"]["spec_rollout"] == {"first_chunk": 4}
    platforms_own = SimpleNamespace()  # vLLM takes such objects
    plain = engine_args(8, model_runner="v1")
    assert merged(plain, {"additional_config": platforms_own})["additional_config"] is platforms_own
    with pytest.raises(ValueError, match="additional_config: expected a mapping, got SimpleName"):
        merged(ours, {"additional_config": platforms_own})


def test_arguments_that_undo_the_plugin_are_refused_when_the_engine_is_made(
    model_dir: Path,
) -> None:
    from spec_rollout.engines.vllm import VLLMEngine

    with pytest.raises(ValueError, match=r"llm: expected .* got one with speculative_config None"):
        VLLMEngine(str(model_dir), llm_args={**LLM_ARGS, "speculative_config": None})
