"""Two `vllm serve` of one machine: what one generated, the other drafts from."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spec_rollout.demo import model_dir
from spec_rollout.demo.task import training_problems

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "benchmarks"))
client = importlib.import_module("serve_client")

MODEL = str(model_dir())
NUM_PROMPTS, GROUP, NUM_PASSES = 16, 8, 3
NUM_REQUESTS = NUM_PROMPTS * GROUP


@pytest.fixture(scope="module")
def addresses(vllm_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Of two replicas. Their steps all take as long."""
    folder = tmp_path_factory.mktemp("shared")
    variable = json.dumps({"mode": "drafting", "share": str(folder / "rollouts")})
    environment = {
        "OMP_NUM_THREADS": "1",  # results that do not depend on the batch
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parent), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        ),
    }
    arguments = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]
    arguments += ["--worker-extension-cls", "serving_worker.ServingWorker", client.COUNT_REQUESTS]
    started = [
        client.Server(MODEL, variable, arguments, folder / f"log-{n}", environment) for n in (0, 1)
    ]
    with client.servers(started):
        for server in started:
            client.call(server.address, "even_steps")
        yield [server.address for server in started]


def served(address: str, first_seed: int | None, **params: Any) -> Any:
    """What every sample of every prompt took. Each has a seed of its own, if any has one."""
    prompts = [problem.prompt for problem in training_problems(NUM_PROMPTS) for _ in range(GROUP)]
    same = {"model": MODEL, "max_tokens": 200, "temperature": 1.0, **params}
    each = [
        same if first_seed is None else {**same, "seed": first_seed + i}
        for i in range(NUM_REQUESTS)
    ]
    return client.measured(address, prompts, each, together=True)[1]


def info(address: str) -> dict[str, Any]:
    return client.call(address, "spec_rollout_history")


def test_a_replica_drafts_from_prompts_that_only_the_other_has_seen(addresses: list[str]) -> None:
    first, second = addresses
    for number in range(NUM_PASSES):
        served(first, number * NUM_REQUESTS)
    start = time.monotonic()
    while info(second)["num_received"] < NUM_PASSES * NUM_REQUESTS:
        assert time.monotonic() - start < 60.0
        time.sleep(0.05)
    print(f"after {time.monotonic() - start:.2f} seconds the second has all of the first")
    found = served(second, NUM_PASSES * NUM_REQUESTS)  # seeds that the first has not had
    # What our sampler passes by, vLLM serves as if we were not there: one token in each step.
    # Without seeds: with them, vLLM fails on CPUs where a prompt is computed in chunks.
    stock = served(second, None, presence_penalty=1e-6)
    print(f"first time: {found}; stock: {stock}")
    assert stock.proposed == 0
    assert found.steps <= 0.5 * stock.steps
    assert info(second)["num_served"] == NUM_REQUESTS
    # And back: the first has what the second generated.
    while info(first)["num_received"] < NUM_REQUESTS:
        assert time.monotonic() - start < 300.0
        time.sleep(0.05)
    assert info(first)["num_damaged_records"] == info(first)["num_share_errors"] == 0
