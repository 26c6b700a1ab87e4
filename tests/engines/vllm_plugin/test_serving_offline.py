"""Engines with SPEC_ROLLOUT set that a script builds: `LLM.generate` with n = 8, and `AsyncLLM`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from laws import assert_law
from serving_laws import NextTokens

from spec_rollout.demo import model_dir
from spec_rollout.demo.task import training_problems

pytestmark = pytest.mark.slow

MODEL = str(model_dir())
NUM_PROMPTS, GROUP = 8, 8
NUM_SAMPLES, LENGTH, STOP = 2000, 4, 1  # of tests of laws; the demo's end of sequence
COUPLED = json.dumps({"mode": "coupled", "identity": "arrival"})
# Such requests are vLLM's own sampler's, and no probability changes.
PASSED_BY = {"presence_penalty": 1e-6}

MakeLLM = Callable[[str], Any]


@pytest.fixture(scope="module")
def make_llm(vllm_installed: None) -> Iterator[MakeLLM]:
    """`make_llm(variable)`: an `LLM` of the demo's model as users build it."""
    from vllm import LLM

    made: dict[str, Any] = {}

    def make(variable: str) -> Any:
        if variable not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("SPEC_ROLLOUT", variable)
                made[variable] = LLM(
                    MODEL,
                    dtype="float32",
                    enforce_eager=True,
                    max_model_len=256,
                    max_num_seqs=128,
                    num_gpu_blocks_override=512,
                    seed=0,
                )
        made[variable].collective_rpc("spec_rollout_history", args=("clear",))
        made[variable].reset_prefix_cache()
        return made[variable]

    yield make
    made.clear()


def prompts() -> list[str]:
    return [problem.prompt for problem in training_problems(NUM_PROMPTS)]


def opening() -> list[int]:
    """A prompt and the first words of its response: what follows is open."""
    from transformers import AutoTokenizer

    prompt = training_problems(1)[0].prompt
    text = f"{prompt}from {prompt.split()[0]}"
    return AutoTokenizer.from_pretrained(MODEL)(text)["input_ids"]


def generate(llm: Any, **params: Any) -> tuple[list[Counter], int]:
    """The responses of each prompt, and the engine's steps."""
    from vllm import SamplingParams

    sampling = SamplingParams(**{"n": GROUP, "max_tokens": 200, "temperature": 1.0, **params})
    llm.collective_rpc("spec_rollout_metrics", args=(True,))
    outputs = llm.generate(prompts(), sampling, use_tqdm=False)
    steps = llm.collective_rpc("spec_rollout_metrics")[0]["num_engine_steps"]
    return [Counter(tuple(o.token_ids) for o in output.outputs) for output in outputs], steps


def test_steps_fall_from_the_first_pass_on(make_llm: MakeLLM, even_steps: None) -> None:
    llm = make_llm("drafting")
    responses, stock = generate(llm, **PASSED_BY)
    # The steps of a vLLM without us: one token of each request in each of them.
    assert stock >= max(len(row) for group in responses for row in group)
    (_, first), (_, second) = generate(llm), generate(llm)
    assert first <= 0.75 * stock
    assert second <= 0.5 * stock


def test_samples_follow_the_models_law(make_llm: MakeLLM, even_steps: None) -> None:
    from vllm import SamplingParams

    llm, prompt = make_llm("drafting"), opening()
    law = NextTokens(MODEL, prompt, LENGTH, STOP)
    params = SamplingParams(n=NUM_SAMPLES, max_tokens=LENGTH, temperature=1.0)
    for _ in range(2):  # the second time the prompt's history is there
        llm.collective_rpc("spec_rollout_metrics", args=(True,))
        (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        assert_law(law.counts(tuple(o.token_ids) for o in output.outputs), law.law)
        found = llm.collective_rpc("spec_rollout_metrics")[0]
        assert found["num_accepted_proposals"] > NUM_SAMPLES // 2


def test_samples_that_arrive_again_follow_their_last_rollout(
    make_llm: MakeLLM, even_steps: None
) -> None:
    llm = make_llm(COUPLED)
    _, stock = generate(llm, **PASSED_BY)
    expected, first = generate(llm)
    assert first <= 0.75 * stock
    for _ in range(2):
        llm.collective_rpc(_load_the_same_weights)
        found, steps = generate(llm)
        assert found == expected
        assert steps <= 0.2 * stock
    assert llm.collective_rpc("spec_rollout_history")[0]["num_repeated"] == 0


def _load_the_same_weights(worker: Any) -> None:
    """A weight update as a trainer makes it, with the weights that are there."""
    worker.model_runner.get_model().load_weights(())


_ASYNC_SCRIPT = """
import asyncio, json, sys
from contextlib import suppress
from prometheus_client import REGISTRY
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from test_serving_offline import *

def steps():
    # vLLM's own count, which a server shows on /metrics
    samples = [s for metric in REGISTRY.collect() for s in metric.samples]
    return sum(s.value for s in samples if s.name == "vllm:iteration_tokens_total_count")

async def main():
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(
        MODEL, dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=128, seed=0,
        worker_extension_cls="serving_worker.ServingWorker",
    ))
    await engine.collective_rpc("even_steps")
    names = (f"request-{i}" for i in range(10**6))

    async def run(prompt, abort=None, **params):
        kind = RequestOutputKind.CUMULATIVE
        sampling = SamplingParams(max_tokens=200, temperature=1.0, output_kind=kind, **params)
        name, rows = next(names), []
        async for output in engine.generate(prompt, sampling, name):
            rows = [list(choice.token_ids) for choice in output.outputs]
            if abort == "abort" and len(rows[0]) > 20:
                await engine.abort(name)
            if abort == "cancel" and len(rows[0]) > 20:
                raise asyncio.CancelledError
        return rows

    async def served(**params):
        before = steps()
        groups = await asyncio.gather(*[run(prompt, n=GROUP, **params) for prompt in prompts()])
        return steps() - before, max(len(row) for rows in groups for row in rows)

    async def info():
        # The engine lets go of requests in the step after their last one.
        for _ in range(100):
            found = (await engine.collective_rpc("spec_rollout_history"))[0]
            if found["num_live"] == 0:
                break
            await asyncio.sleep(0.1)
        return found

    out = {"stock": await served(**PASSED_BY), "first": await served(), "second": await served()}
    out["info"] = await info()
    ends = ["abort", "cancel", None]
    jobs = [run(p, ends[i % 3], ignore_eos=True, seed=i) for i, p in enumerate(prompts())]
    rows = await asyncio.gather(*jobs, return_exceptions=True)
    out["ends"] = [type(r).__name__ if isinstance(r, BaseException) else len(r[0]) for r in rows]
    out["after_aborts"] = await info()
    out["served_after"], _ = await served()
    out["samples"] = []
    for _ in range(2):
        sampling = SamplingParams(n=NUM_SAMPLES, max_tokens=LENGTH, temperature=1.0)
        async for output in engine.generate({"prompt_token_ids": opening()}, sampling, next(names)):
            pass
        out["samples"].append([list(choice.token_ids) for choice in output.outputs])
    print("RESULT " + json.dumps(out))
    engine.shutdown()

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_async_engine_gains_lets_go_and_keeps_the_law(vllm_installed: None, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(_ASYNC_SCRIPT)
    environment = {
        **os.environ,
        "SPEC_ROLLOUT": "drafting",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=900
    )
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert results, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads(results[0].removeprefix("RESULT "))
    (stock, longest), (first, _), (second, _) = (
        found[name] for name in ("stock", "first", "second")
    )
    assert stock >= longest
    assert first <= 0.75 * stock
    assert second <= 0.5 * stock
    assert found["info"]["num_served"] == 2 * NUM_PROMPTS * GROUP
    assert found["info"]["num_passed_by"] == NUM_PROMPTS * GROUP
    for i, end in enumerate(found["ends"]):
        if i % 3 == 1:
            assert end == "CancelledError"
        else:
            assert (end < 200) if i % 3 == 0 else (end == 200)
    assert found["info"]["num_live"] == found["after_aborts"]["num_live"] == 0
    assert found["served_after"] <= 0.5 * stock
    law = NextTokens(MODEL, opening(), LENGTH, STOP)
    for rows in found["samples"]:
        assert_law(law.counts(map(tuple, rows)), law.law)
