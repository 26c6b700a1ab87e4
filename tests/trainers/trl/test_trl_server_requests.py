"""What a vLLM server of TRL's is asked, and which servers are refused; nothing is generated."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from trl_stand_ins import BIASED, Client, trainer, with_server

from spec_rollout.acceptance import Coupled, Lenient, Schedule
from spec_rollout.adapters.rows import alone
from spec_rollout.cache import RolloutCache


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


def test_further_turns_of_a_server_are_refused_by_name() -> None:
    from spec_rollout.adapters.trl import SpecRollout

    trainer = SimpleNamespace(use_vllm=True, vllm_mode="server")
    with pytest.raises(ValueError, match="vllm_mode: expected colocate with next_turn, got server"):
        SpecRollout().next_turn([[1, 2]], trainer)


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
