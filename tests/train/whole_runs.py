"""Whole runs: started, interrupted, and compared with one that was not."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spec_rollout.train.checkpoint import list_checkpoints
from spec_rollout.train.trainer import run


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def read_rows(run_dir):
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def without_seconds(rows):
    return [{k: v for k, v in row.items() if not k.endswith("_seconds")} for row in rows]


def final_weights(run_dir):
    """Of the newest checkpoint, independent of its file."""
    folder = list_checkpoints(Path(run_dir) / "checkpoints")[-1] / "model"
    return {k: v.clone() for k, v in load_file(folder / "model.safetensors").items()}


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class SignalAtForward:
    """Sends a signal to this process just before the n-th forward pass of a run.

    Not counted are those that check the model while the run is put together: nobody listens yet.
    """

    def __init__(self, n: int, signum: int) -> None:
        self.n, self.signum, self.count = n, signum, 0

    def __enter__(self):
        self._handle = torch.nn.modules.module.register_module_forward_pre_hook(self._hook)
        return self

    def __exit__(self, *_):
        self._handle.remove()

    def _hook(self, module, _args):
        listening = signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        if listening and type(module).__name__ == "Qwen3ForCausalLM":
            self.count += 1
            if self.count == self.n:
                os.kill(os.getpid(), self.signum)


def interruption_config(make_config, run_dir, checkpoint=None, **train):
    return make_config(
        rollout={"rule": "lenient", "log_lenience": 0.5},
        train={"minibatches": 2, **train},
        eval={"every_steps": 3},
        checkpoint=checkpoint or {},
        log={"run_dir": str(run_dir)},
    )


@pytest.fixture
def uninterrupted(make_config, tmp_path, one_thread):
    """Rows, weights and number of forward passes of a run that goes through."""
    config = interruption_config(make_config, tmp_path / "whole")
    with SignalAtForward(10**9, signal.SIGINT) as counter:
        run(config)
    return read_rows(config.log.run_dir), final_weights(config.log.run_dir), counter.count
