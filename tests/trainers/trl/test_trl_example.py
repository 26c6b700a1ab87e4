"""The script for several GPUs, in two processes on a tiny model on the CPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "examples" / "several-gpus" / "train_grpo.py"

pytestmark = pytest.mark.slow


def test_it_runs_in_two_processes(tmp_path: Path) -> None:
    from spec_rollout.demo import model_dir
    from spec_rollout.demo.task import training_problems

    data = tmp_path / "train.jsonl"
    rows = [{"prompt": p.prompt, "answer": p.answer} for p in training_problems(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # As `accelerate launch` does it where there are GPUs; on a CPU it starts one process.
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command += [str(SCRIPT), "--model", str(model_dir()), "--lenience", "0.5", "--lora", "4"]
    command += ["--data", str(data), "--out", str(tmp_path / "out"), "--cpu", "--epochs", "2"]
    command += ["--samples", "4", "--rows", "8", "--accumulate", "1", "--max-tokens", "32"]
    command += ["--max-length", "256", "--memory", "0.1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"}
    environment.pop("SPEC_ROLLOUT", None)
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-4000:]
    steps = re.findall(r"step (\d+): reward ([\d.]+), reused (\d+)%", done.stdout)
    assert [int(step) for step, _, _ in steps] == [1, 2]
    reused = [int(share) for _, _, share in steps]
    assert reused[0] == 0
    assert reused[1] > 20
