"""`vllm serve` of a real model, where SPEC_ROLLOUT_REAL_MODEL names its folder.

    python tools/real_model.py /tmp/smollm --moved /tmp/smollm-moved
    SPEC_ROLLOUT_REAL_MODEL=/tmp/smollm SPEC_ROLLOUT_QUESTIONS=gsm8k.jsonl \
      python -m pytest tests/engines/vllm_plugin/test_serving_real.py

Its weights after a small change are looked for beside it, in a folder with `-moved` at the end of
its name. The questions are those of a JSONL file with a `question` in each row. On two cores it
takes minutes.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER, QUESTIONS = "SPEC_ROLLOUT_REAL_MODEL", "SPEC_ROLLOUT_QUESTIONS"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get(FOLDER), reason=f"{FOLDER} names no folder"),
]

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "benchmarks"))
client = importlib.import_module("serve_client")

NUM_PROMPTS, MAX_TOKENS, SLOTS = 64, 64, 8
TEMPERATURE = 0.5
COUPLED = json.dumps({"mode": "coupled", "identity": "arrival"})


def steps_after_a_change(variable: str, tmp_path: Path) -> tuple[int, int]:
    """Engine steps of the second pass, and of the same requests without us.

    Over a small change of the weights; the other requests go past us, which is stock's way.
    """
    model = os.environ[FOLDER]
    prompts = client.prompts_of(Path(os.environ[QUESTIONS]), model, NUM_PROMPTS)
    arguments = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "768"]
    arguments += ["--max-num-seqs", str(SLOTS)]
    same: dict[str, Any] = {"model": model, "max_tokens": MAX_TOKENS, "temperature": TEMPERATURE}
    server = client.Server(model, variable, arguments, tmp_path / "log")
    with client.servers([server]):
        client.measured(server.address, prompts, [same] * len(prompts))
        client.load_weights(server.address, f"{model}-moved")
        _, second = client.measured(server.address, prompts, [same] * len(prompts))
        passed_by = {**same, "presence_penalty": 1e-6}
        _, stock = client.measured(server.address, prompts, [passed_by] * len(prompts))
    assert stock.proposed == 0
    print(f"{variable}: {second}; without: {stock}")
    return second.steps, stock.steps


def test_drafting_takes_fewer_steps_after_a_change(vllm_installed: None, tmp_path: Path) -> None:
    second, stock = steps_after_a_change("drafting", tmp_path)
    assert second <= 0.7 * stock


def test_coupled_takes_fewer_steps_after_a_change(vllm_installed: None, tmp_path: Path) -> None:
    second, stock = steps_after_a_change(COUPLED, tmp_path)
    assert second <= 0.55 * stock
