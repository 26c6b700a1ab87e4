"""The engine core in a process of its own, with what vLLM loads itself and nothing else of ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from vllm_samples import make_model

pytestmark = pytest.mark.slow

_SCRIPT = """
import json, multiprocessing, sys
from dataclasses import replace
import torch
from vllm_samples import *
from spec_rollout.acceptance import Coupled
from spec_rollout.cache import MemoryStore, RolloutCache
from spec_rollout.engines.vllm import VLLMEngine
from spec_rollout.rollout import RolloutSession
from spec_rollout.types import History, SamplingParams

if __name__ == "__main__":
    folder, new_folder = sys.argv[1:]
    engine = VLLMEngine(folder, num_speculative_tokens=7, llm_args=LLM_ARGS)
    prompts, sampling = random_prompts(8), SamplingParams(max_tokens=20, stop_token_ids=(EOS,))
    plain = engine.rollout(make_requests(prompts), sampling, Coupled())
    drafts = pack_drafts(mixed_drafts(rows_of(plain)))
    reused = engine.rollout(make_requests(prompts, drafts), sampling, Coupled())
    engine.llm.collective_rpc(even_steps)
    past = History(plain.response_ids, plain.cu_response_lens, torch.arange(8) // 2, torch.arange(8) // 2)
    drafted = engine.rollout(replace(make_requests(prompts), history=past), sampling, Coupled())
    out = {"plain": rows_of(plain), "reused": rows_of(reused), "accepted": reused.accepted_lens.tolist()}
    out["drafted"], out["proposals"] = rows_of(drafted), drafted.stats.num_accepted_proposals
    out["logprob_gap"] = float((plain.logprobs - reused.logprobs).abs().max())
    from transformers import AutoModelForCausalLM
    engine.update_weights(AutoModelForCausalLM.from_pretrained(new_folder).float().named_parameters())
    out["updated"] = rows_of(engine.rollout(make_requests(prompts), sampling, Coupled()))
    out["in_process"] = hasattr(engine.llm.llm_engine.engine_core, "engine_core")
    if not out["in_process"]:
        store = MemoryStore()
        session = RolloutSession(engine, Coupled(), cache=RolloutCache(store=store))
        session.rollout(prompts, 1, sampling, step=0, epoch=0)
        before = [(key, dict(samples)) for key, samples in store.iterate()]
        (core,) = multiprocessing.active_children()
        engine.before_step = core.kill
        out["deaths"] = []
        for _ in range(2):
            try:
                session.rollout(prompts, 1, sampling, step=1, epoch=1)
            except Exception as error:
                out["deaths"].append(type(error).__name__)
        out["kept"] = before == [(key, dict(samples)) for key, samples in store.iterate()]
    print("RESULT " + json.dumps(out))
    engine.close()
"""


def _run(tmp_path: Path, multiprocessing: str, code: str = _SCRIPT) -> dict:
    script = tmp_path / "script.py"
    script.write_text(code)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    env = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": multiprocessing,
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # for functions sent to the worker
        "PYTHONPATH": path,
    }
    command = [sys.executable, str(script), str(tmp_path / "old"), str(tmp_path / "new")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert results, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(results[0].removeprefix("RESULT "))


def test_same_results_from_a_process_of_its_own(vllm_installed: None, tmp_path: Path) -> None:
    make_model(tmp_path / "old", seed=0)
    make_model(tmp_path / "new", seed=5)
    found = _run(tmp_path, "1")
    assert not found["in_process"]
    assert found["reused"] == found["drafted"] == found["plain"]
    assert found["proposals"] > 0
    assert sum(found["accepted"]) > 0
    assert found["logprob_gap"] < 2e-5
    assert found["updated"] != found["plain"]
    # Killed in mid-rollout: the step fails instead of waiting, and so does the next one.
    assert found["deaths"] == ["EngineDeadError", "EngineDeadError"]
    assert found["kept"]
    here = _run(tmp_path, "0")
    assert here["in_process"]
    for name in ("plain", "accepted", "updated"):
        assert found[name] == here[name]


_ASYNC_SCRIPT = """
import asyncio, json, sys
import numpy as np
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM
from vllm_samples import *
from spec_rollout.acceptance import Coupled
from spec_rollout.engines.vllm import ReuseRequest, engine_args, extra_args

def params(key, draft=(), **more):
    reuse = ReuseRequest(key, Coupled(), np.asarray(draft, np.int32))
    return SamplingParams(max_tokens=40, detokenize=False, extra_args=extra_args(reuse), **more)

async def main(folder):
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(folder, skip_tokenizer_init=True, **LLM_ARGS, **engine_args(8))
    )
    prompts = random_prompts(12, seed=21)

    async def run(name, i, sampling, cancel=False):
        ids = []
        async for output in engine.generate({"prompt_token_ids": prompts[i].tolist()}, sampling, name):
            ids = list(output.outputs[0].token_ids)
            if cancel:
                await engine.abort(name)
                return None
        return ids

    plain = await asyncio.gather(*[run(f"plain-{i}", i, params(i)) for i in range(12)])
    bad = SamplingParams(max_tokens=5, extra_args={"spec_rollout": b"rubbish"})
    jobs = [run(f"draft-{i}", i, params(i, plain[i]), cancel=i % 3 == 0) for i in range(12)]
    *drafted, error = await asyncio.gather(*jobs, run("the-bad-one", 0, bad), return_exceptions=True)
    after = await run("after", 5, params(5, plain[5][:7]))
    metrics = await engine.collective_rpc("spec_rollout_metrics")
    print("RESULT " + json.dumps({
        "plain": plain, "drafted": drafted, "error": str(error),
        "is_value_error": isinstance(error, ValueError), "after": after, "accepted": metrics[0]["num_accepted_tokens"],
    }))
    engine.shutdown()

if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
"""


def test_async_engine_serves_the_others(vllm_installed: None, tmp_path: Path) -> None:
    """Drafts, aborts and a malformed request at the same time, in the engine of `vllm serve`."""
    make_model(tmp_path / "old", seed=0)
    found = _run(tmp_path, "1", _ASYNC_SCRIPT)
    assert all(len(ids) > 0 for ids in found["plain"])
    for i, (ids, expected) in enumerate(zip(found["drafted"], found["plain"], strict=True)):
        assert ids == (None if i % 3 == 0 else expected)
    # Not wrapped into an error of the server's: the client is told what is wrong.
    assert found["is_value_error"]
    assert found["error"].startswith("request the-bad-one")
    assert found["after"] == found["plain"][5]
    assert found["accepted"] > sum(map(len, found["plain"])) // 3


_RANKS_SCRIPT = """
import json, os, sys
from vllm_samples import *

if __name__ == "__main__":
    os.environ.update(SPEC_ROLLOUT="drafting", VLLM_CPU_OMP_THREADS_BIND="nobind")
    from vllm import LLM, SamplingParams
    out = {}
    for ranks in (1, 2):
        args = {**LLM_ARGS, "tensor_parallel_size": ranks, "distributed_executor_backend": "mp"}
        llm = LLM(sys.argv[1], **args, skip_tokenizer_init=True)
        prompts = [{"prompt_token_ids": p.tolist()} for p in random_prompts(3) for _ in range(4)]
        params = [
            SamplingParams(max_tokens=40, temperature=0.7, detokenize=False, seed=i)
            for i in range(12)
        ]
        llm.collective_rpc(even_steps)
        passes, found = [], []
        for _ in range(2):
            outputs = llm.generate(prompts, params, use_tqdm=False)
            passes.append([list(output.outputs[0].token_ids) for output in outputs])
            found.append(llm.collective_rpc("spec_rollout_metrics", args=(True,)))
        out[ranks] = {"passes": passes, "metrics": found}
        del llm
    print("RESULT " + json.dumps(out))
"""


def test_two_ranks_of_tensor_parallelism_draw_the_tokens_of_one(
    vllm_installed: None, tmp_path: Path
) -> None:
    """vLLM takes what rank 0 proposes, and all test it."""
    make_model(tmp_path / "old", seed=0)
    found = _run(tmp_path, "1", _RANKS_SCRIPT)
    one, two = found["1"], found["2"]
    assert one["passes"][0] == one["passes"][1] == two["passes"][0] == two["passes"][1]
    for first, second in zip(*two["metrics"], strict=True):
        assert second["num_engine_steps"] < first["num_engine_steps"]
        assert second["num_accepted_proposals"] > 0
    assert len(two["metrics"][0]) == 2
