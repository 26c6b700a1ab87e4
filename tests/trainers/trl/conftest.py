"""Real TRL trainers, each in processes of its own, on the demo's model and task."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

# A run takes minutes; one that hangs is ended.
_RUN_SECONDS = 1800
RUN = Path(__file__).with_name("trl_run.py")
Started = Callable[[], dict[str, Any]]


# By its metadata: a folder called trl may be on the path.
@pytest.fixture(scope="session", autouse=True)
def trl_installed() -> None:
    try:
        metadata.version("trl")
    except metadata.PackageNotFoundError:
        pytest.skip("trl is not installed")


def start_run(
    folder: Path, variable: str | None = None, processes: int = 1, **options: Any
) -> Started:
    """Starts a training run; what is returned waits for it and gives what it noted.

    Args:
        folder: Of its files; empty.
        variable: The value of SPEC_ROLLOUT; None leaves it unset.
        processes: Of a distributed run.
        **options: `trl_run.Options`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    environment["VLLM_LOGGING_LEVEL"] = "INFO"  # TRL leaves errors only
    environment.pop("SPEC_ROLLOUT", None)
    if variable is not None:
        environment["SPEC_ROLLOUT"] = variable
    with socket.socket() as probe:  # two runs go side by side
        probe.bind(("127.0.0.1", 0))
        environment.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(probe.getsockname()[1]))
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command += [str(RUN), json.dumps(options), str(folder)]
    log = (folder / "log").open("w")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def finish() -> dict[str, Any]:
        try:
            status: int | str = process.wait(_RUN_SECONDS)
        except subprocess.TimeoutExpired:
            status = f"not ended after {_RUN_SECONDS} s"
        finally:
            if process.poll() is None:
                _end(process)
            log.close()
        text = (folder / "log").read_text(errors="replace")
        assert status == 0, f"{status}\n{text[-6000:]}"
        ranks = [json.loads((folder / f"rank{i}.json").read_text()) for i in range(processes)]
        return {**ranks[0], "ranks": ranks, "log": text}

    return finish


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a run: torch's launcher ends its workers if it is asked to, not if it is killed."""
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# Groups of 8 over batches of 24: with two processes a group straddles them.
_SMALL = {"prompts": 6, "generations": 8, "rows_per_step": 24, "learning_rate": 5e-5}
_ON_VLLM = {**_SMALL, "engine": "vllm", "float32": True}
_BY_VARIABLE = {
    "engine": "vllm",
    "prompts": 16,
    "generations": 8,
    "rows_per_step": 64,
    "max_tokens": 120,
}
# Every run that a test looks at, in the order of the tests.
RUNS: dict[str, dict[str, Any]] = {
    "stock": _BY_VARIABLE,
    "drafting": {**_BY_VARIABLE, "variable": '{"mode": "drafting", "log_seconds": 0.001}'},
    "model": {**_SMALL, "adapter": {}, "evaluate": True},
    "model, no cache": {**_SMALL, "adapter": {"reuse": False, "drafting": False}, "evaluate": True},
    "model, two processes": {**_SMALL, "adapter": {}, "processes": 2, "accumulate": 2},
    "model, TRL's precision": {**_SMALL, "adapter": {}, "bf16": None},
    "model, lenient": {**_SMALL, "adapter": {"rule": "lenient"}},
    "model, tools": {**_SMALL, "adapter": {}, "tools": True, "epochs": 2, "learning_rate": 1e-9},
    "vllm, stock": {**_ON_VLLM, "epochs": 2},
    "vllm": {**_ON_VLLM, "adapter": {}, "evaluate": True},
    "vllm, no cache": {
        **_ON_VLLM, "adapter": {"reuse": False, "drafting": False}, "evaluate": True, "sleep": True,
    },
    "vllm, two processes": {**_ON_VLLM, "adapter": {}, "processes": 2},
    "vllm, lenient": {**_ON_VLLM, "adapter": {"rule": "lenient"}},
    "vllm, old weights": {**_ON_VLLM, "adapter": {}, "epochs": 2, "broken": "weights"},
}  # fmt: skip


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], dict[str, Any]]]:
    """What a run of `RUNS` noted; the one after it is started meanwhile."""
    pool = ThreadPoolExecutor(max_workers=2)
    started: dict[str, Future[dict[str, Any]]] = {}
    names = list(RUNS)

    def submit(name: str) -> None:
        if name not in started:
            folder = tmp_path_factory.mktemp("run")
            started[name] = pool.submit(lambda: start_run(folder, **RUNS[name])())

    def result(name: str) -> dict[str, Any]:
        for wanted in names[names.index(name) :][:2]:
            submit(wanted)
        return started[name].result()

    yield result
    pool.shutdown(cancel_futures=True)
