"""A vLLM server that remembers, asked through TRL's own client.

TRL hands weights to a server by NCCL, so no trainer can run on it here: a stand-in says what a
trainer says. Server, client and what is sent between them are real.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spec_rollout.demo import model_dir
from spec_rollout.demo.task import training_problems

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
MODEL = str(model_dir())


@pytest.fixture(scope="module")
def client() -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    return importlib.import_module("serve_client")


@pytest.fixture(scope="module")
def addresses(client: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Of servers of the demo's model, by the value of SPEC_ROLLOUT."""
    folder = tmp_path_factory.mktemp("logs")
    arguments = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]
    arguments += ["--logprobs-mode", "processed_logprobs"]
    started = {
        mode: client.Server(MODEL, mode, arguments, folder / mode, {"OMP_NUM_THREADS": "1"})
        for mode in ("coupled", "off")
    }
    with client.servers(list(started.values())):
        yield {mode: server.address for mode, server in started.items()}


def trainer(address: str) -> Any:
    from trl.generation.vllm_client import VLLMClient

    return SimpleNamespace(
        accelerator=SimpleNamespace(num_processes=1, process_index=0, is_main_process=True),
        args=SimpleNamespace(seed=0, generation_kwargs=None),
        eos_token_ids=[1],
        max_completion_length=64,
        min_p=None,
        model=SimpleNamespace(training=True),
        repetition_penalty=1.0,
        rollout_func=None,
        state=SimpleNamespace(global_step=0, epoch=0.0),
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        use_vllm=True,
        vllm_mode="server",
        vllm_generation=SimpleNamespace(
            vllm_client=VLLMClient(base_url=address),
            # Of all samples of a prompt; theirs decide.
            generation_kwargs={"seed": 7, "vllm_xargs": {"theirs": 1}, "cache_salt": "theirs"},
            structured_outputs_regex=None,
        ),
    )


def test_a_server_is_told_the_samples_and_finds_their_drafts(
    addresses: dict[str, str], client: Any
) -> None:
    from transformers import AutoTokenizer

    from spec_rollout.adapters.trl import SpecRollout

    def info() -> dict[str, Any]:
        return client.call(addresses["coupled"], "spec_rollout_history")

    asked, spec = trainer(addresses["coupled"]), SpecRollout()
    texts = [problem.prompt for problem in training_problems(4) for _ in range(4)]
    prompt_ids = AutoTokenizer.from_pretrained(MODEL)(texts)["input_ids"]
    first = spec.first_turn(prompt_ids, asked)
    assert len({tuple(ids) for ids in first.completion_ids}) > 12
    assert all(
        len(ids) == len(logprobs) <= 64 and max(logprobs) <= 0
        for ids, logprobs in zip(first.completion_ids, first.logprobs, strict=True)
    )
    assert info()["num_named"] == 16
    assert info()["num_with_draft"] == 0

    # The same weights come again: the same noise draws the same, in whatever order it is asked.
    client.load_weights(addresses["coupled"], MODEL)
    asked.state = SimpleNamespace(global_step=1, epoch=1.0)
    order = [*range(8, 16), *range(8)]
    second = spec.first_turn([prompt_ids[row] for row in order], asked)
    assert second.completion_ids == [first.completion_ids[row] for row in order]
    assert info()["num_with_draft"] == 16
    assert info()["num_repeated"] == 0

    asked.model = SimpleNamespace(training=False)
    groups = info()["num_groups"]
    judged = spec.first_turn(prompt_ids, asked)
    assert info()["num_named"] == 32
    assert info()["num_groups"] == groups + 4  # remembered apart from what is trained on
    assert not set(map(tuple, judged.completion_ids)) & set(map(tuple, first.completion_ids))


def test_a_server_that_does_not_remember_is_refused(addresses: dict[str, str]) -> None:
    from spec_rollout.adapters.trl import SpecRollout

    with pytest.raises(ValueError, match=r"started with SPEC_ROLLOUT=coupled .* got mode off"):
        SpecRollout().first_turn([[5, 6]], trainer(addresses["off"]))
