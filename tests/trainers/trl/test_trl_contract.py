"""What the adapter uses of TRL is there, in the version that the tests run."""

from __future__ import annotations

import inspect
import json
import re
import warnings
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from spec_rollout.acceptance import Coupled, Lenient, Schedule
from spec_rollout.adapters.rows import alone
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


def trainer(**changes: Any) -> SimpleNamespace:
    """As much of a trainer as is looked at before anything is computed."""
    from spec_rollout.adapters.trl_contract import TRAINER_ATTRIBUTES

    given: dict[str, Any] = dict.fromkeys(TRAINER_ATTRIBUTES)
    given.update(
        repetition_penalty=1.0, use_vllm=False, args=SimpleNamespace(generation_kwargs=None)
    )
    return SimpleNamespace(**{**given, **changes})


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


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"cache": RolloutCache(), "logprobs": "behaviour"}, "cache, logprobs"),
        ({"drafting": False, "seed": 0}, "drafting, seed"),
        ({"num_speculative_tokens": 32, "num_slots": 8}, "num_speculative_tokens, num_slots"),
    ],
)
def test_arguments_that_a_server_does_not_heed_are_refused(
    arguments: dict[str, Any], names: str
) -> None:
    from spec_rollout.adapters.trl import SpecRollout

    def served() -> SimpleNamespace:
        info = {"additional_config": {"spec_rollout": {"mode": "coupled"}}}
        client = SimpleNamespace(get_server_info=lambda: info)
        return trainer(
            accelerator=SimpleNamespace(process_index=0, num_processes=1, is_main_process=True),
            use_vllm=True,
            vllm_mode="server",
            vllm_generation=SimpleNamespace(vllm_client=client),
        )

    SpecRollout(refresh_epochs=2, logprobs="current")._attach(served())
    with pytest.raises(ValueError, match=rf"^{names}: expected .* vllm_mode .server."):
        SpecRollout(**arguments)._attach(served())


def test_a_server_that_counts_arrivals_is_refused() -> None:
    """Evaluations would be counted, and draw the same each time."""
    from spec_rollout.adapters.trl_server import Server

    def serving(**section: str) -> Server:
        info = {"additional_config": {"spec_rollout": section}}
        client = SimpleNamespace(get_server_info=lambda: info)
        trainer = SimpleNamespace(
            accelerator=SimpleNamespace(is_main_process=True),
            vllm_generation=SimpleNamespace(vllm_client=client),
        )
        return Server(trainer, alone, 0, reuse=True, refresh_epochs=None)

    assert serving(mode="coupled").rule == Coupled()
    assert serving(mode="lenient", identity="request").rule == Lenient(0.0)
    with pytest.raises(ValueError, match=r"started with SPEC_ROLLOUT=coupled .* got mode off"):
        serving()
    with pytest.raises(ValueError, match=r"identity .request. in SPEC_ROLLOUT, .* got 'arrival'"):
        serving(mode="coupled", identity="arrival")


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


def test_further_turns_of_a_server_are_refused_by_name() -> None:
    from spec_rollout.adapters.trl import SpecRollout

    trainer = SimpleNamespace(use_vllm=True, vllm_mode="server")
    with pytest.raises(ValueError, match="vllm_mode: expected colocate with next_turn, got server"):
        SpecRollout().next_turn([[1, 2]], trainer)


class Client:
    """TRL's client of a server, whose answers are made up."""

    def __init__(self, **section: Any) -> None:
        self.section = section
        self.asked: list[dict[str, Any]] = []
        self.num_prompts: list[int] = []

    def get_server_info(self) -> dict[str, Any]:
        return {"additional_config": {"spec_rollout": self.section}}

    def generate(self, **request: Any) -> dict[str, Any]:
        self.asked.append(request["generation_kwargs"])
        self.num_prompts.append(len(request["prompts"]))
        return {
            "completion_ids": [[7, *prompt] for prompt in request["prompts"]],
            "logprobs": [[[-0.5]] * (1 + len(prompt)) for prompt in request["prompts"]],
        }


def with_server(client: Client, **generation_kwargs: Any) -> SimpleNamespace:
    return trainer(
        use_vllm=True,
        vllm_mode="server",
        accelerator=SimpleNamespace(num_processes=1, process_index=0, is_main_process=True),
        model=SimpleNamespace(training=True),
        state=SimpleNamespace(global_step=0, epoch=0.0),
        vllm_generation=SimpleNamespace(
            vllm_client=client,
            generation_kwargs=generation_kwargs,
            structured_outputs_regex=None,
        ),
    )


def test_without_reuse_a_server_is_told_no_sample() -> None:
    from spec_rollout.adapters.trl import SpecRollout

    for reuse in (True, False):
        client = Client(mode="coupled")
        turn = SpecRollout(reuse=reuse).first_turn([[5], [5]], with_server(client, seed=1))
        assert turn.completion_ids == [[7, 5], [7, 5]]
        assert ["vllm_xargs" in asked for asked in client.asked] == [reuse] * 2
        # vLLM gives samples that no name tells apart seeds of their own. Those that are named have
        # noise of their own; where a seed decides, all of them would have drawn the same.
        seeds = {asked["seed"] for asked in client.asked}
        assert seeds == ({None} if reuse else {1, 2})


def test_what_the_user_says_to_a_server_goes_with_what_we_say() -> None:
    from spec_rollout.adapters.trl import SpecRollout

    own = {"cache_salt": "s" * 128, "vllm_xargs": {"theirs": 1}, "ignore_eos": True}
    client = Client(mode="coupled")
    asked = with_server(client, **own)
    spec = SpecRollout()
    spec.first_turn([[5]], asked)
    named = client.asked[-1]
    assert named["vllm_xargs"] == {"theirs": 1, "spec_rollout": '{"sample": 0, "epoch": 0}'}
    assert {**named, "vllm_xargs": own["vllm_xargs"], "seed": None} == {**own, "seed": None}

    asked.model.training = False
    salts = []
    for salt in (own["cache_salt"], "another", None):
        asked.vllm_generation.generation_kwargs = {**own, "cache_salt": salt}
        spec.first_turn([[5]], asked)
        assert client.asked[-1]["vllm_xargs"] == own["vllm_xargs"]
        salts.append(client.asked[-1]["cache_salt"])
    assert len({*salts, own["cache_salt"]}) == 4  # each apart from the others and from training
    assert max(map(len, salts)) <= 128  # what vLLM takes


def test_vllm_takes_a_request_as_trls_client_sends_it() -> None:
    from trl.generation.vllm_client import VLLMClient
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    from spec_rollout.adapters.trl import SpecRollout

    sent: list[dict[str, Any]] = []

    class Unsent(VLLMClient):
        def __init__(self) -> None:
            self.base_url, self.model = "http://nowhere", "model"

        def get_server_info(self) -> dict[str, Any]:
            return {"additional_config": {"spec_rollout": {"mode": "coupled"}}}

        def _post(self, url: str, **fields: Any) -> dict[str, Any]:
            sent.append(fields["json"])
            tokens = {"tokens": ["token_id:7"], "token_logprobs": [-0.5], "top_logprobs": [None]}
            choice = {"prompt_token_ids": [5], "token_ids": [7], "logprobs": tokens}
            return {"choices": [choice] * len(fields["json"]["prompt"])}

    asked = with_server(Client(), seed=1, vllm_xargs={"theirs": 1}, cache_salt="s" * 128)
    asked.vllm_generation.vllm_client = Unsent()
    asked.temperature, asked.top_p, asked.top_k, asked.max_completion_length = 1.0, 1.0, 0, 4
    spec = SpecRollout()
    for training in (True, False):
        asked.model.training = training
        turn = spec.first_turn([[5], [6]], asked)
        assert (turn.completion_ids, turn.logprobs) == ([[7], [7]], [[-0.5], [-0.5]])
        request = CompletionRequest(**json.loads(json.dumps(sent.pop())))
        assert request.prompt == [[5], [6]]
        params = request.to_sampling_params(4, {})
        assert params.seed == (None if training else 1)
        assert set(params.extra_args) == {"theirs", *(["spec_rollout"] if training else [])}
    assert not sent


def test_all_rows_are_with_the_server_at_once() -> None:
    """One request for each number of a sample, with the rows of all prompts in it."""
    from spec_rollout.adapters.trl import SpecRollout

    client, rows = Client(mode="coupled"), [[prompt] for prompt in range(300) for _ in range(3)]
    turn = SpecRollout().first_turn(rows, with_server(client))
    assert client.num_prompts == [300] * 3
    names = [json.loads(asked["vllm_xargs"]["spec_rollout"])["sample"] for asked in client.asked]
    assert sorted(names) == [0, 1, 2]
    assert turn.completion_ids == [[7, *prompt] for prompt in rows]
    assert turn.logprobs == [[-0.5, -0.5]] * 900


def test_what_a_server_answers_goes_to_each_rank_once(monkeypatch: Any) -> None:
    """Gathered from all ranks, it would take as many times the memory."""
    from spec_rollout.adapters import trl_server

    rows = [[[1], [2]], [], [[1], [3], [4]]]  # of the ranks
    samples = [np.array([0, 0]), np.array([], np.int64), np.array([1, 0, 0])]
    everyone = [
        list(zip(*rank, strict=True))
        for rank in zip(rows, map(np.ndarray.tolist, samples), strict=True)
    ]
    sent: list[Any] = []

    def broadcast(value: Any) -> Any:
        sent.append(value)
        return sent[0]

    monkeypatch.setattr(trl_server, "broadcast_object", broadcast)
    client = Client(mode="coupled")
    for rank in range(3):
        gathered: list[Any] = []
        asked = with_server(client)
        asked.accelerator = SimpleNamespace(num_processes=3, is_main_process=rank == 0)

        def gather(value: Any, gathered: list[Any] = gathered) -> list[Any]:
            gathered.append(value)
            return everyone

        server = trl_server.Server(asked, gather, rank, reuse=True, refresh_epochs=None)
        ids, logprobs = server.generate(rows[rank], samples[rank], is_eval=False)
        assert ids == [[7, *prompt] for prompt in rows[rank]]
        assert logprobs == [[-0.5, -0.5]] * len(ids)
        assert gathered == [everyone[rank]]
    assert client.num_prompts == [4, 1]  # asked by the first rank alone


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
    ("section", "rule", "got"),
    [
        ({"mode": "coupled"}, Lenient(0.5), r"Coupled\(log_lenience=0.0.* got Lenient"),
        ({"mode": "lenient"}, Coupled(), r"Lenient\(log_lenience=0.0.* got Coupled"),
        (
            {"mode": "lenient", "log_lenience": 0.5},
            Lenient(0.0),
            r"log_lenience=0.5.*log_lenience=0.0",
        ),
        (
            {"mode": "lenient"},
            Schedule(Lenient(), 1.0, 10),
            r"log_lenience=0.0.*log_lenience=1.0",
        ),
    ],
)
def test_another_rule_than_the_servers_is_refused(
    section: dict[str, Any], rule: Any, got: str
) -> None:
    from spec_rollout.adapters.trl import SpecRollout

    with pytest.raises(ValueError, match=f"^rule: expected that of the server, .*{got}"):
        SpecRollout(rule).first_turn([[5, 6]], with_server(Client(**section)))


BIASED = "trained on as if the current policy had drawn them: TRL"


@pytest.mark.parametrize(
    ("section", "rule", "reuse", "is_told"),
    [
        ({"mode": "coupled"}, None, True, False),
        ({"mode": "coupled"}, Coupled(), True, False),
        ({"mode": "coupled", "log_lenience": 0.5}, None, True, True),
        ({"mode": "lenient"}, None, True, True),
        ({"mode": "lenient"}, None, False, False),
        ({"mode": "lenient", "log_lenience": 0.5}, Lenient(0.5), True, True),
    ],
)
def test_the_bias_of_a_servers_rule_is_told_once(
    section: dict[str, Any], rule: Any, reuse: bool, is_told: bool
) -> None:
    from spec_rollout.adapters.trl import SpecRollout

    spec, asked = SpecRollout(rule, reuse=reuse), with_server(Client(**section))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            spec.first_turn([[5, 6]], asked)
    assert [BIASED in str(each.message) for each in caught] == [True] * is_told


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
    from spec_rollout.cache import RolloutCache
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
