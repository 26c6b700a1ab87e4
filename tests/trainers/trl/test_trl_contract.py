"""What the adapter uses of TRL is there, in the version that the tests run."""

from __future__ import annotations

import inspect
import re
import warnings
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from trl_stand_ins import BIASED, trainer

from spec_rollout.acceptance import Coupled, Lenient, Schedule
from spec_rollout.cache import RolloutCache

ROOT = Path(__file__).resolve().parents[3]


def test_the_installed_version_is_one_of_the_tested() -> None:
    from spec_rollout.adapters.trl_contract import TESTED_VERSIONS, VERSION

    assert metadata.version("trl") == VERSION
    assert VERSION in TESTED_VERSIONS
    pinned = re.search(r"^TRL \?= trl==(.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert pinned is not None
    assert pinned.group(1) in TESTED_VERSIONS


def _set_by(cls: type) -> set[str]:
    """Attributes that a class, or one that it derives from, gives its objects."""
    names = set(dir(cls))
    for base in cls.__mro__[:-1]:
        names |= set(re.findall(r"self\.(\w+)\b[^=\n]*=[^=]", inspect.getsource(base)))
    return names


def test_every_attribute_of_the_contract_is_one_of_a_trainer() -> None:
    from trl import GRPOTrainer
    from trl.generation.vllm_generation import VLLMGeneration

    from spec_rollout.adapters.trl_contract import GENERATION_ATTRIBUTES, TRAINER_ATTRIBUTES

    assert set(TRAINER_ATTRIBUTES) - _set_by(GRPOTrainer) == set()
    assert set(GENERATION_ATTRIBUTES) - _set_by(VLLMGeneration) == set()


def test_the_contract_names_all_that_the_adapter_takes_from_a_trainer() -> None:
    from spec_rollout.adapters import trl_contract as trl

    source = "".join(file.read_text() for file in Path(trl.__file__).parent.glob("trl*.py"))
    used = set(re.findall(r"\btrainer\.(\w+)", source))
    named = {name.rpartition(".")[2] for names in trl.CONTRACT.values() for name in names}
    optional = {"vllm_generation", "grpo_trainer"}  # only with vLLM; a module's name
    assert used - named - set(trl.TRAINER_ATTRIBUTES) - optional == set()
    used = set(re.findall(r"\bgeneration\.(\w+)", source))
    optional = {"llm", "vllm_client", "vllm_generation", "_llm_weights_sleeping"}  # of one mode
    assert used - named - set(trl.GENERATION_ATTRIBUTES) - optional == set()


def test_parameters_are_called_as_the_adapter_calls_them() -> None:
    from trl import GRPOTrainer
    from trl.generation.vllm_client import VLLMClient

    turn = inspect.signature(GRPOTrainer._generate_single_turn)
    assert list(turn.parameters)[:5] == [
        "self", "prompt_ids", "images", "multimodal_fields", "num_generations",
    ]  # fmt: skip
    generate = inspect.signature(VLLMClient.generate).parameters
    assert {"prompts", "n", "logprobs", "generation_kwargs", "structured_outputs_regex"} <= set(
        generate
    )
    from trl.generation import vllm_generation

    assert "llm = LLM(" in inspect.getsource(vllm_generation.VLLMGeneration._init_vllm)


def test_a_trl_without_a_name_is_refused_with_the_tested_versions(monkeypatch: Any) -> None:
    from spec_rollout.adapters import trl_contract as trl

    changed = {**trl.CONTRACT, "trl.trainer.grpo_trainer": ("GRPOTrainer._gone",)}
    monkeypatch.setattr(trl, "CONTRACT", changed)
    with pytest.raises(
        ImportError, match=r"GRPOTrainer\._gone \(this adapter was tested with TRL 1"
    ):
        trl.check_trl()


def test_another_version_is_warned_of(monkeypatch: Any) -> None:
    from spec_rollout.adapters import trl_contract as trl

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trl.check_trl()
    monkeypatch.setattr(trl.metadata, "version", lambda name: "9.9")
    with pytest.warns(UserWarning, match=r"tested with TRL 1\.16\.0; the installed one is 9\.9"):
        trl.check_trl()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repetition_penalty": 1.1}, r"repetition_penalty: expected 1\.0, got 1\.1"),
        ({"min_p": 0.1}, r"min_p: expected None or 0, got 0\.1"),
        (
            {"args": SimpleNamespace(generation_kwargs={"seed": 1})},
            "generation_kwargs: .* got seed",
        ),
        ({"is_fsdp_enabled": True}, "is_fsdp_enabled: expected False"),
    ],
)
def test_what_is_not_served_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    from spec_rollout.adapters.trl_contract import check_trainer

    check_trainer(trainer())
    with pytest.raises(ValueError, match=message):
        check_trainer(trainer(**changes))


def test_a_colocated_engine_of_several_ranks_is_refused() -> None:
    from spec_rollout.adapters import trl_contract

    given = {**dict.fromkeys(trl_contract.GENERATION_ATTRIBUTES), "tensor_parallel_size": 2}
    with pytest.raises(ValueError, match=r"vllm_tensor_parallel_size: expected 1 .*, got 2$"):
        trl_contract.check_trainer(
            trainer(use_vllm=True, vllm_mode="colocate", vllm_generation=SimpleNamespace(**given))
        )


def test_a_trainer_without_an_attribute_is_refused_with_the_tested_versions() -> None:
    from spec_rollout.adapters.trl_contract import check_trainer

    broken = trainer()
    del broken.eos_token_ids
    with pytest.raises(
        ValueError, match=r"a GRPOTrainer as in TRL 1\.16\.0, .* without eos_token_ids"
    ):
        check_trainer(broken)


def test_logprobs_is_one_of_three() -> None:
    from spec_rollout.adapters.trl import SpecRollout

    with pytest.raises(
        ValueError, match="logprobs: expected auto, current or behaviour, got 'old'"
    ):
        SpecRollout(logprobs="old")  # type: ignore[arg-type]


@pytest.mark.parametrize("runner", ["0", "1"])
@pytest.mark.parametrize("drafting", [True, False])
def test_an_engine_of_trls_schedules_so_that_a_history_can_be_used(
    runner: str, drafting: bool, monkeypatch: Any
) -> None:
    """TRL lets no argument through, and vLLM's Model Runner V2 schedules asynchronously."""
    from trl.generation import vllm_generation

    from spec_rollout.adapters.trl import SpecRollout

    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    monkeypatch.setattr(vllm_generation, "LLM", lambda **given: given)
    SpecRollout(drafting=drafting)
    given: Any = vllm_generation.LLM(model="a")
    assert given["model"] == "a"
    told = {"async_scheduling": False} if runner == "1" and drafting else {}
    assert {name: given[name] for name in given if name == "async_scheduling"} == told


@pytest.mark.parametrize(
    ("changes", "rule", "reuse", "is_told"),
    [
        ({"use_vllm": False}, Coupled(), True, False),
        ({"use_vllm": False}, Lenient(0.5), True, True),
        ({"use_vllm": False}, Lenient(0.5), False, False),
        ({"use_vllm": False}, Schedule(Coupled(), 0.5, 10), True, True),
        ({"use_vllm": True, "vllm_mode": "colocate"}, Lenient(0.5), True, False),
    ],
)
def test_the_bias_of_a_rule_is_told_where_trl_corrects_nothing(
    changes: dict[str, Any], rule: Any, reuse: bool, is_told: bool, monkeypatch: Any
) -> None:
    from spec_rollout.adapters import trl, trl_contract

    monkeypatch.setattr(trl.SpecRollout, "_make_engine", lambda self, trainer: None)
    monkeypatch.setattr(trl, "RolloutSession", lambda *args, **kwargs: None)
    generation = {**dict.fromkeys(trl_contract.GENERATION_ATTRIBUTES), "tensor_parallel_size": 1}
    given = trainer(
        accelerator=SimpleNamespace(num_processes=1, process_index=0, is_main_process=True),
        args=SimpleNamespace(seed=0, generation_kwargs=None),
        vllm_generation=SimpleNamespace(**generation),
        **changes,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trl.SpecRollout(rule, reuse=reuse)._attach(given)
    assert [BIASED in str(each.message) for each in caught] == [True] * is_told


@pytest.mark.parametrize(
    ("sleeps", "ranks", "sharded", "is_refused"),
    [
        (True, 2, "fsdp", True),
        (True, 2, "zero 3", True),
        (True, 2, "zero 2", False),
        (True, 2, "", False),
        (True, 1, "fsdp", False),
        (False, 2, "fsdp", False),
    ],
)
def test_further_turns_that_wait_for_all_ranks_are_refused(
    sleeps: bool, ranks: int, sharded: str, is_refused: bool
) -> None:
    from spec_rollout.adapters.trl import SpecRollout

    zero = {"zero 2": 2, "zero 3": 3}.get(sharded)
    plugin = None if zero is None else SimpleNamespace(zero_stage=zero)
    state = SimpleNamespace(deepspeed_plugin=plugin)
    given = trainer(
        use_vllm=True,
        vllm_mode="colocate",
        is_fsdp_enabled=sharded == "fsdp",
        accelerator=SimpleNamespace(num_processes=ranks, state=state),
        vllm_generation=SimpleNamespace(enable_sleep_mode=sleeps),
    )
    match = "vllm_enable_sleep_mode: expected False" if is_refused else "a row of the last turn"
    with pytest.raises(ValueError, match=match):
        SpecRollout().next_turn([[1, 2]], given)


def test_fresh_noise_is_not_that_which_drew_a_cache_that_was_loaded(monkeypatch: Any) -> None:
    """A run of the same seed, whose steps had the same numbers, may have drawn it."""
    import torch

    from spec_rollout.acceptance import Lenient
    from spec_rollout.adapters.trl import SpecRollout
    from spec_rollout.keys import prompt_key
    from spec_rollout.types import FinishReason, Rollouts

    rollouts = Rollouts(
        prompt_ids=torch.tensor([1], dtype=torch.int32),
        cu_prompt_lens=torch.tensor([0, 1]),
        response_ids=torch.tensor([2, 3], dtype=torch.int32),
        cu_response_lens=torch.tensor([0, 2]),
        logprobs=torch.tensor([-1.0, -2.0]),
        accepted_lens=torch.zeros(1, dtype=torch.int32),
        finish_reasons=torch.tensor([FinishReason.STOP], dtype=torch.uint8),
        policy_version=0,
    )
    filled = RolloutCache()
    filled.store([prompt_key([1])], [0], rollouts)
    given = trainer(
        accelerator=SimpleNamespace(process_index=0, num_processes=1, is_main_process=True),
        args=SimpleNamespace(seed=0, generation_kwargs=None),
    )
    engine = SimpleNamespace(rollout=lambda *_: None, supports_history=True)
    for cache, expected in ((RolloutCache(), 0), (filled, filled.fingerprint())):
        spec = SpecRollout(Lenient(0.0), cache=cache)
        monkeypatch.setattr(spec, "_make_engine", lambda _: engine)
        spec._attach(given)
        assert spec._session is not None
        assert spec._session.noise_offset == expected
    # Another call of `train` counts its steps from the start again, with the same prompts.
    first, second = SimpleNamespace(global_step=0), SimpleNamespace(global_step=0)
    for state, is_another in ((first, False), (first, False), (second, True), (second, False)):
        last = spec._session.noise_offset
        spec._begin_run(state)
        assert (spec._session.noise_offset != last) == is_another
    # Of a pool that all ranks share one number, if any of them found something there.
    monkeypatch.setattr(RolloutCache, "is_shared", True)
    for sizes, expected in (((0, 0), 0), ((0, 3), 11)):
        told = list(zip(sizes, (11, 12), strict=True))
        monkeypatch.setattr(spec, "_gather", lambda _, told=told: told)
        assert spec._noise_offset() == expected
