"""verl's vLLM server and clients with our names on the requests; the session is a process."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from verl_runs import HERE, environment, run_bounded
from verl_session import CHUNK, LENGTH

from spec_rollout.adapters.turns import COUNT_NAMES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def session(folder: Path) -> dict[str, Any]:
    ray_folder = Path(tempfile.mkdtemp(prefix="ray"))
    log_path = folder / "session.log"
    options = {"mode": "coupled", "log_seconds": 0, "num_speculative_tokens": CHUNK}
    # Functions are sent to the engine as they are.
    env = {**environment(json.dumps(options)), "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    env["PYTHONPATH"] = f"{HERE}:{HERE.parents[1]}"
    command = [sys.executable, str(HERE / "verl_session.py"), str(folder), str(ray_folder)]
    try:
        status = run_bounded(command, env, log_path, cwd=folder)
    finally:
        shutil.rmtree(ray_folder, ignore_errors=True)
    text = log_path.read_text()
    assert status == 0, text[-6000:]
    lines = [line for line in text.splitlines() if line.startswith("RESULT ")]
    return {**json.loads(lines[-1].removeprefix("RESULT ")), "log": text}


def test_named_samples_are_redrawn_from_the_engines_drafts(session: dict[str, Any]) -> None:
    named = session["named"]
    assert named["second"] == named["first"]
    assert named["num_with_draft"] == 4
    # Two samples of one prompt.
    assert len({tuple(ids) for ids in named["first"]}) > 1
    # The engine counts its speculation, verl's metrics of it are not there in part.
    assert not set(itertools.chain(*named["counts"])) & set(COUNT_NAMES)


def test_validation_touches_no_history(session: dict[str, Any]) -> None:
    named = session["named"]
    assert all(named["validation"])
    assert named["served"][0] == named["served"][1] == 8
    assert named["bytes"][0] == named["bytes"][1]


def test_a_named_request_that_was_aborted_is_never_wrong(
    session: dict[str, Any], folder: Path
) -> None:
    """Log-probs of both its parts are those of the model."""
    from transformers import AutoModelForCausalLM

    named = session["named"]
    assert named["num_requests"] == 8  # of four rollouts
    model = AutoModelForCausalLM.from_pretrained(folder / "model").float().eval()
    for prompt, ids, logprobs in zip(
        session["prompts"], named["aborted"], named["aborted_logprobs"], strict=True
    ):
        assert len(ids) == len(logprobs) == LENGTH
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=0, atol=1e-3)


def test_actors_give_drafts_that_are_followed(session: dict[str, Any]) -> None:
    pooled = session["pooled"]
    assert pooled["followed"] == pooled["whole"]
    for counts in pooled["followed_counts"]:
        # In chunks, all of them accepted whole.
        steps = -(-LENGTH // CHUNK)
        assert [counts[name] for name in COUNT_NAMES] == [LENGTH, LENGTH, steps]


def test_an_aborted_request_gives_what_it_would_have_given(session: dict[str, Any]) -> None:
    """Its key goes on at its place in the response, its draft behind what it gave."""
    pooled = session["pooled"]
    assert session["num_aborted"] == [4, 4, 4]
    assert pooled["aborted"] == pooled["whole"]
    assert pooled["aborted_drafts"] == pooled["whole"]


def test_log_probs_that_nobody_asked_for_do_not_go_back(session: dict[str, Any]) -> None:
    pooled = session["pooled"]
    assert all(pooled["silent"])
    assert pooled["silent_texts"] == [ids[:5] for ids in pooled["whole"]]


def test_rollouts_go_on_without_the_actors(session: dict[str, Any]) -> None:
    pooled = session["pooled"]
    assert pooled["counters"]["failures"] == 0
    assert pooled["failures"] >= 4
    assert all(pooled["failed"])
    for counts in pooled["failed_counts"]:
        assert [counts[name] for name in COUNT_NAMES] == [0, 0, 0]
    assert session["log"].count("spec_rollout: drafts are not to be had") == 1
