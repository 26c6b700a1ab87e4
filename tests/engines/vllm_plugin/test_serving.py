"""`vllm serve` with SPEC_ROLLOUT set, and a client over HTTP that knows nothing of us."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from laws import SMALLEST_P, assert_law, p_value
from serving_laws import NextTokens, moved_weights

from spec_rollout.demo import model_dir
from spec_rollout.demo.task import training_problems

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "benchmarks"))
client = importlib.import_module("serve_client")

MODEL = str(model_dir())
NUM_PROMPTS, GROUP = 16, 8
NUM_SAMPLES, LENGTH, STOP = 2000, 4, 1  # of tests of laws; the demo's end of sequence
COUPLED = json.dumps({"mode": "coupled", "identity": "arrival"})
# Of a size that vLLM's own sampler has to draw, and that changes no probability.
PASSED_BY = {"presence_penalty": 1e-6}


@pytest.fixture(scope="module")
def addresses(vllm_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Of two servers of the demo's model, by mode. Their steps all take as long."""
    folder = tmp_path_factory.mktemp("logs")
    here = str(Path(__file__).parent)
    environment = {
        "OMP_NUM_THREADS": "1",  # results that do not depend on the batch
        "PYTHONPATH": os.pathsep.join(
            [here, str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        ),
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    arguments = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]
    arguments += ["--worker-extension-cls", "serving_worker.ServingWorker", client.COUNT_REQUESTS]
    started = {
        mode: client.Server(MODEL, variable, arguments, folder / mode, environment)
        for mode, variable in (("drafting", "drafting"), ("coupled", COUPLED))
    }
    with client.servers(list(started.values())):
        for server in started.values():
            client.call(server.address, "even_steps")
        yield {mode: server.address for mode, server in started.items()}
    for mode in started:
        log = (folder / mode).read_text()
        assert f"SPEC_ROLLOUT={mode}: requests are proposed what this engine generated" in log


@pytest.fixture(scope="module")
def opening(vllm_installed: None) -> list[int]:
    """A prompt and the first words of its response: what follows is open."""
    from transformers import AutoTokenizer

    prompt = training_problems(1)[0].prompt
    text = f"{prompt}from {prompt.split()[0]}"
    return AutoTokenizer.from_pretrained(MODEL)(text)["input_ids"]


def requests(**params: Any) -> tuple[list[str], list[dict[str, Any]]]:
    """Every sample of every prompt, as a request of its own."""
    prompts = [problem.prompt for problem in training_problems(NUM_PROMPTS) for _ in range(GROUP)]
    same = {"model": MODEL, "max_tokens": 200, "temperature": 1.0, "return_token_ids": True}
    return prompts, [{**same, **params} for _ in prompts]


def served_by(address: str, **params: Any) -> tuple[list[dict[str, Any]], Any]:
    """Responses to `requests`, and what they took: vLLM's own counts."""
    return client.measured(address, *requests(**params), together=True)


def info(address: str) -> dict[str, Any]:
    """Once the engine has let go of the last request, which takes it one more step."""
    for _ in range(100):
        found = client.call(address, "spec_rollout_history")
        if found["num_live"] == 0:
            break
        time.sleep(0.1)
    return found


def tokens_of(choices: list[dict[str, Any]]) -> list[tuple[int, ...]]:
    return [tuple(choice["token_ids"]) for choice in choices]


def forget(address: str) -> None:
    client.call(address, "spec_rollout_history", "clear")
    client.post(address, "/reset_prefix_cache", {})


def samples_of_one_prompt(address: str, prompt: list[int], count: int) -> list[tuple[int, ...]]:
    """The first tokens of many samples, asked for in one request."""
    body = {"model": MODEL, "prompt": prompt, "n": count, "max_tokens": LENGTH}
    body |= {"temperature": 1.0, "return_token_ids": True}
    return tokens_of(client.post(address, "/v1/completions", body)["choices"])


def accepted(address: str) -> float:
    return client.metrics(address)["vllm:spec_decode_num_accepted_tokens_total"]


def test_steps_fall_from_the_first_pass_on(addresses: dict[str, str]) -> None:
    address = addresses["drafting"]
    before = info(address)
    choices, stock = served_by(address, **PASSED_BY)
    # The steps of a vLLM without us: one token of each request in each of them.
    assert stock.proposed == 0
    assert stock.steps >= max(map(len, tokens_of(choices)))
    forget(address)
    # The longest response of a pass decides its steps, and differs from pass to pass.
    first, *later = (served_by(address)[1] for _ in range(4))
    assert first.steps <= 0.75 * stock.steps
    assert later[0].steps <= 0.55 * stock.steps
    assert min(served.steps for served in later) <= 0.45 * stock.steps
    after = info(address)
    assert after["num_passed_by"] == before["num_passed_by"] + NUM_PROMPTS * GROUP
    assert after["num_served"] == before["num_served"] + 4 * NUM_PROMPTS * GROUP
    assert after["num_groups"] == NUM_PROMPTS
    assert after["num_live"] == 0


def test_requests_with_a_seed_repeat_exactly_whatever_is_remembered(
    addresses: dict[str, str],
) -> None:
    address = addresses["drafting"]
    forget(address)
    prompts, each = requests()
    each = [{**params, "seed": i} for i, params in enumerate(each)]
    first, _ = client.measured(address, prompts, each)
    second, served = client.measured(address, prompts, each)
    assert tokens_of(second) == tokens_of(first)
    assert served.accepted > 0.5 * served.tokens
    assert len(set(tokens_of(first))) == len(prompts)


def test_samples_follow_the_models_law(addresses: dict[str, str], opening: list[int]) -> None:
    address = addresses["drafting"]
    forget(address)
    law = NextTokens(MODEL, opening, LENGTH, STOP)
    for _ in range(2):  # the second time the prompt's history is there
        before = accepted(address)
        assert_law(law.counts(samples_of_one_prompt(address, opening, NUM_SAMPLES)), law.law)
        assert accepted(address) > before + NUM_SAMPLES // 2


@pytest.mark.parametrize(
    "params",
    [
        {"structured_outputs": {"regex": "[0-9]{3}"}},
        {"repetition_penalty": 1.2},
        {"frequency_penalty": 0.5, "temperature": 0.0},
        {"bad_words": ["answer"]},
    ],
    ids=lambda params: next(iter(params)),
)
def test_what_we_cannot_serve_is_answered_and_counted(
    addresses: dict[str, str], params: dict[str, Any]
) -> None:
    """Side by side with requests that are served."""
    address = addresses["drafting"]
    before = info(address)
    prompts, each = requests(max_tokens=30, seed=5)
    each[::2] = [{**one, **params} for one in each[::2]]
    texts = [choice["text"] for choice in client.ask(address, prompts, each)]
    after = info(address)
    assert after["num_passed_by"] == before["num_passed_by"] + len(prompts) // 2
    assert after["num_served"] == before["num_served"] + len(prompts) // 2
    if "structured_outputs" in params:
        assert all(re.fullmatch("[0-9]{3}", text) for text in texts[::2])
    # Of one prompt all served requests have the same seed, and so the same text.
    assert all(len(set(texts[i + 1 : i + GROUP : 2])) == 1 for i in range(0, len(texts), GROUP))


def test_samples_that_arrive_again_follow_their_last_rollout(
    addresses: dict[str, str], tmp_path: Path
) -> None:
    address = addresses["coupled"]
    _, stock = served_by(address, **PASSED_BY)
    first, served = served_by(address)
    assert served.steps <= 0.75 * stock.steps
    client.load_weights(address, MODEL)
    second, served = served_by(address)
    assert served.steps <= 0.2 * stock.steps
    # Which request is which sample is decided by which comes first.
    for i in range(0, len(first), GROUP):
        assert Counter(tokens_of(second[i : i + GROUP])) == Counter(tokens_of(first[i : i + GROUP]))
    client.load_weights(address, moved_weights(MODEL, tmp_path / "moved", 0.01))
    third, served = served_by(address)
    assert served.steps <= 0.5 * stock.steps
    assert Counter(tokens_of(third)) != Counter(tokens_of(second))
    assert info(address)["num_repeated"] == 0
    assert info(address)["num_live"] == 0


def test_samples_drawn_again_follow_the_law_of_the_new_weights(
    addresses: dict[str, str], opening: list[int], tmp_path: Path
) -> None:
    address = addresses["coupled"]
    moved = moved_weights(MODEL, tmp_path / "moved", 0.2)
    old, new = (NextTokens(folder, opening, LENGTH, STOP) for folder in (MODEL, moved))
    client.load_weights(address, MODEL)
    assert_law(old.counts(samples_of_one_prompt(address, opening, NUM_SAMPLES)), old.law)
    client.load_weights(address, moved)
    before = info(address)["num_with_draft"]
    rows = samples_of_one_prompt(address, opening, NUM_SAMPLES)
    assert info(address)["num_with_draft"] == before + NUM_SAMPLES
    assert_law(new.counts(rows), new.law)
    # The two laws differ by more than such a sample can hide.
    assert p_value(old.counts(rows), old.law) < SMALLEST_P
