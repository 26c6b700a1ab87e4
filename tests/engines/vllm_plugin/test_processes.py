"""The engine core in a process of its own, with nothing of ours imported there but what vLLM loads itself."""

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
import json, sys
import torch
from vllm_samples import *
from spec_rollout.acceptance import Coupled
from spec_rollout.engines.vllm import VLLMEngine
from spec_rollout.types import SamplingParams

if __name__ == "__main__":
    folder, new_folder = sys.argv[1:]
    engine = VLLMEngine(folder, num_speculative_tokens=7, llm_args=LLM_ARGS)
    prompts, sampling = random_prompts(8), SamplingParams(max_tokens=20, stop_token_ids=(EOS,))
    plain = engine.rollout(make_requests(prompts), sampling, Coupled())
    drafts = pack_drafts(mixed_drafts(rows_of(plain)))
    reused = engine.rollout(make_requests(prompts, drafts), sampling, Coupled())
    out = {"plain": rows_of(plain), "reused": rows_of(reused), "accepted": reused.accepted_lens.tolist()}
    out["logprob_gap"] = float((plain.logprobs - reused.logprobs).abs().max())
    from transformers import AutoModelForCausalLM
    engine.update_weights(AutoModelForCausalLM.from_pretrained(new_folder).float().named_parameters())
    out["updated"] = rows_of(engine.rollout(make_requests(prompts), sampling, Coupled()))
    out["in_process"] = hasattr(engine.llm.llm_engine.engine_core, "engine_core")
    print("RESULT " + json.dumps(out))
    engine.close()
"""


def _run(tmp_path: Path, multiprocessing: str) -> dict:
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": multiprocessing, "PYTHONPATH": path}
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
    assert found["reused"] == found["plain"]
    assert sum(found["accepted"]) > 0
    assert found["logprob_gap"] < 2e-5
    assert found["updated"] != found["plain"]
    here = _run(tmp_path, "0")
    assert here["in_process"]
    for name in ("plain", "accepted", "updated"):
        assert found[name] == here[name]
