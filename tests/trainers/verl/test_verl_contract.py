"""What the adapter uses of verl is there, and what is wrong with a configuration is said."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


def config(**changes: Any) -> Any:
    """A part of verl's configuration."""
    from omegaconf import OmegaConf

    values = {
        "actor_rollout_ref": {
            "rollout": {
                "name": "vllm",
                "engine_kwargs": {"vllm": {}},
                "checkpoint_engine": {"backend": "naive"},
            }
        }
    }
    made = OmegaConf.merge(OmegaConf.create(values), OmegaConf.from_dotlist([]))
    for key, value in changes.items():
        OmegaConf.update(made, key.replace("__", "."), value, force_add=True)
    return made


def test_the_installed_verl_has_what_is_used() -> None:
    from spec_rollout.adapters import verl
    from spec_rollout.adapters.verl_plugin import TESTED

    assert metadata.version("verl") in TESTED
    assert verl.unmet_contract() == []


def test_what_is_missing_is_named() -> None:
    from spec_rollout.adapters import verl

    contract = {
        "verl.workers.rollout.replica": {"TokenOutput": ("token_ids", "answers"), "Tokens": ()},
        "verl.workers.nothing": {"Any": ()},
        "verl.trainer.ppo.v1.agent_loop_tq": {"AgentLoopWorkerTQ.rest": ()},
    }
    assert verl.unmet_contract(contract) == [
        "verl.workers.rollout.replica.TokenOutput(answers)",
        "verl.workers.rollout.replica.Tokens",
        "verl.workers.nothing (No module named 'verl.workers.nothing')",
        "verl.trainer.ppo.v1.agent_loop_tq.AgentLoopWorkerTQ.rest",
    ]


def test_import_fails_with_the_tested_versions() -> None:
    script = (
        "import verl.workers.rollout.llm_server as s\n"
        "del s.LLMServerClient._acquire_server, s.FullyAsyncLLMServerClient._acquire_server\n"
        "import spec_rollout.adapters.verl\n"
    )
    found = python(script)
    assert found.returncode != 0
    assert "ImportError: spec_rollout.adapters.verl: expected verl 0.9.1, got one without" in (
        found.stderr
    )
    assert "LLMServerClient._acquire_server" in found.stderr


def python(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    from verl_runs import environment

    env = {**environment(None), **variables}
    return subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=600
    )


def test_import_verl_loads_the_plugin_which_says_so() -> None:
    found = python("import verl", SPEC_ROLLOUT="coupled")
    assert found.returncode == 0
    assert "spec_rollout: SPEC_ROLLOUT=coupled; drafts per sample by " in found.stderr


def test_a_wrong_variable_is_said_before_anything_is_started() -> None:
    found = python("import verl", SPEC_ROLLOUT="draughts")
    assert found.returncode == 0
    assert "spec_rollout: SPEC_ROLLOUT: mode: expected one of off, drafting" in found.stderr


def test_the_manager_is_where_the_plugin_says() -> None:
    from verl.utils.import_utils import load_class_from_fqn

    from spec_rollout.adapters.verl import ReuseManager
    from spec_rollout.adapters.verl_plugin import MANAGER

    assert load_class_from_fqn(MANAGER) is ReuseManager


def test_agent_loops_are_verls_and_nothing_is_registered() -> None:
    """A loop both registered and configured loses its arguments in verl: ours is neither."""
    from verl.experimental.agent_loop.agent_loop import _agent_loop_registry

    import spec_rollout.adapters.verl  # noqa: F401

    assert set(_agent_loop_registry) == {"single_turn_agent", "tool_agent"}


@pytest.mark.parametrize(
    ("variable", "changes", "match"),
    [
        ("off", {}, "SPEC_ROLLOUT: expected coupled or lenient with drafts kept by the engine, got off"),
        ("drafting", {}, "SPEC_ROLLOUT: expected coupled or lenient .* got drafting"),
        ("off", {"spec_rollout__drafts": "actors"}, "SPEC_ROLLOUT: expected drafting with drafts kept by"),
        ("coupled", {"spec_rollout__rule": "x"}, "spec_rollout.rule: expected one of"),
        ("coupled", {"actor_rollout_ref__rollout__name": "sglang"}, "rollout.name: expected vllm, got sglang"),
        (
            "coupled",
            {"actor_rollout_ref__rollout__checkpoint_engine__backend": "delta_sharded"},
            "checkpoint_engine.backend: expected another than delta_sharded",
        ),
    ],
)  # fmt: skip
def test_configurations_that_cannot_work(
    variable: str, changes: dict[str, Any], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spec_rollout.adapters.verl import reuse_settings

    monkeypatch.setenv("SPEC_ROLLOUT", variable)
    with pytest.raises(ValueError, match=match):
        reuse_settings(config(**changes))


def test_the_engines_own_arguments_count_before_the_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from spec_rollout.adapters.verl import reuse_settings

    section = "actor_rollout_ref__rollout__engine_kwargs__vllm__additional_config"
    monkeypatch.setenv("SPEC_ROLLOUT", "off")
    settings = reuse_settings(config(**{section: {"spec_rollout": {"mode": "coupled"}}}))
    assert settings.drafts == "engine"


def test_rows_are_named_by_content_and_session() -> None:
    from spec_rollout.adapters.verl import rollout_name

    row = {"data_source": "maths", "index": 7, "session_id": 3, "uid": "a", "global_steps": 5}
    name = rollout_name({"step": 5, "validate": False}, row)
    assert (name.sample, name.step, name.is_validation) == (3, 5, False)
    again = rollout_name({"step": 9, "validate": False}, {**row, "uid": "b", "global_steps": 9})
    assert again.user_key == name.user_key
    for other in ({"index": 8}, {"data_source": "code"}):
        assert (
            rollout_name({"step": 5, "validate": True}, {**row, **other}).user_key != name.user_key
        )


class Remote:
    """A method of an actor, called here."""

    def __init__(self, call: Any) -> None:
        self.remote = call


def test_a_step_begins_when_the_drafts_are_written(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its rollouts would wait for their drafts behind it."""
    import ray

    from spec_rollout.adapters import verl

    events: list[str] = []

    def get(name: str) -> None:
        events.append(f"written {name}")
        if name == "a":
            raise OSError("disk full")

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "wait", lambda names, **_: (names, []))
    monkeypatch.setattr(
        verl.AgentLoopManagerTQ, "generate_sequences", lambda self, prompts: events.append("begun")
    )
    manager = object.__new__(verl.ReuseManager)
    manager._save_freq, manager._told_step = 2, 1
    manager._shards = [SimpleNamespace(save=Remote(lambda name=name: name)) for name in "ab"]
    monkeypatch.setattr(manager, "counters", lambda: events.append("counted"))
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3, 3, 3):  # the third has groups that are filled again
            manager.generate_sequences({"global_steps": step})
        manager.generate_sequences({"global_steps": 4, "validate": True})
    assert events == [
        *["begun", "counted", "begun", "counted", "written a", "written b", "begun"],
        *["begun"] * 3,
    ]
    told = [
        record.message
        for record in caplog.records
        if record.message.startswith("spec_rollout: drafts not")
    ]
    assert told == ["spec_rollout: drafts not written: disk full"]


@pytest.mark.parametrize("kind", ["named", "keyed"])
def test_verls_own_seed_draws_no_named_request(kind: str) -> None:
    """It is one for all samples of a prompt, and Model Runner V2 draws by it."""
    import verl as installed

    from spec_rollout.adapters import verl
    from spec_rollout.adapters.settings import ReuseSettings
    from spec_rollout.adapters.turns import NamedTurn, Reuse, fresh_turn

    server = Path(installed.__file__).parent / "workers/rollout/vllm_rollout/vllm_async_server.py"
    assert 'sampling_params.setdefault("seed", ' in server.read_text()

    def generate(**request: Any) -> Any:
        request["sampling_params"].setdefault("seed", 42)
        return request["sampling_params"]["seed"]

    asked = verl._Server(
        SimpleNamespace(generate=Remote(generate)), Reuse(ReuseSettings(), max_chunk=31)
    )

    def drawn_by(turn: Any, **params: Any) -> Any:
        token = verl._TURN.set(turn)
        try:
            return asked.generate.remote(prompt_ids=[5, 6], sampling_params=params)
        finally:
            verl._TURN.reset(token)

    turn = NamedTurn({"sample": 3}) if kind == "named" else fresh_turn([5, 6])
    assert drawn_by(turn) is None
    assert drawn_by(turn, seed=7) == 7  # the user's own
    assert drawn_by(None) == 42


@pytest.mark.parametrize("is_on", [False, True])
def test_workers_repeat_their_noise_where_verl_is_to_repeat_itself(
    is_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spec_rollout.adapters import verl

    told: list[tuple[int, int]] = []

    async def repeat(*seed_and_number: int) -> None:
        told.append(seed_and_number)

    async def start(self: Any) -> None:
        worker = SimpleNamespace(spec_rollout_repeat=Remote(repeat))
        self.agent_loop_workers = [worker, worker]

    monkeypatch.setattr(verl.AgentLoopManagerTQ, "_init_agent_loop_workers", start)
    manager = object.__new__(verl.ReuseManager)
    rollout = "actor_rollout_ref__rollout"
    manager.config = config(**{f"{rollout}__seed": 42, f"{rollout}__full_determinism": is_on})
    asyncio.run(manager._init_agent_loop_workers())
    assert told == ([(42, 0), (42, 1)] if is_on else [])
    assert verl.repeated_seed(config()) is None
