"""OpenRLHF with nothing but SPEC_ROLLOUT set: its engines propose what they generated before."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("openrlhf_rollouts.py")
NUM_ROLLOUTS = 16  # an epoch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def openrlhf_installed() -> None:
    # This folder has its name, too: a namespace without an origin.
    spec = importlib.util.find_spec("openrlhf")
    if spec is None or spec.origin is None:
        pytest.skip("openrlhf is not installed")


@functools.cache
def epochs_with(variable: str) -> list[dict[str, Any]]:
    """What two epochs were with this value of SPEC_ROLLOUT in the environment of the driver."""
    folder = Path(tempfile.mkdtemp(prefix="orlhf"))  # short: Ray's sockets are in it
    environment = {
        **os.environ,
        "SPEC_ROLLOUT": variable,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "TORCH_COMPILE_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_enable_worker_prestart": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "RAY_memory_monitor_refresh_ms": "0",
    }
    log = folder / "log"
    try:
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, str(SCRIPT), str(folder), str(folder / "ray")],
                env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                status = process.wait(1800)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        assert status == 0, log.read_text(errors="replace")[-6000:]
        return json.loads((folder / "result.json").read_text())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


DRAFTING = "drafting"
ARRIVAL = '{"mode": "coupled", "identity": "arrival"}'


@pytest.mark.parametrize("variable", [DRAFTING, ARRIVAL])
def test_proposals_are_accepted_and_steps_fall(variable: str) -> None:
    first, second = epochs_with(variable)
    for number, epoch in enumerate((first, second), 1):
        assert epoch["history"]["num_served"] == number * NUM_ROLLOUTS
        assert epoch["history"]["num_passed_by"] == 0
        assert epoch["num_logprobs"] == epoch["num_actions"]
    steps = [first["metrics"]["num_engine_steps"]]
    steps.append(second["metrics"]["num_engine_steps"] - steps[0])
    assert steps[1] < (0.9 if variable == DRAFTING else 0.5) * steps[0]


def test_arrivals_are_samples_and_are_the_same_again_with_the_same_weights() -> None:
    """In bfloat16: a near-tie turns now and then."""
    first, second = (epoch["responses"] for epoch in epochs_with(ARRIVAL))
    assert first.keys() == second.keys()
    same = total = 0
    for prompt, rows in first.items():
        assert len({tuple(row) for row in rows}) > 1  # siblings share no noise
        same += sum(row in second[prompt] for row in rows)
        total += len(rows)
    assert same > 0.7 * total
    assert epochs_with(ARRIVAL)[1]["history"]["num_with_draft"] == NUM_ROLLOUTS
