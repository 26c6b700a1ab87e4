"""Kernels on several threads: the same results on any number of them, and in forked processes."""

import os
import select
import subprocess
import sys

import pytest
import torch

from spec_rollout import ops

TIMEOUT_SECONDS = 60


def logprobs() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 40_000, generator=generator)
    return ops.token_logprobs(logits, torch.arange(64))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_results_do_not_depend_on_the_number_of_threads(threads) -> None:
    threads(1)
    expected = logprobs()
    for count in (2, 3, 7):
        threads(count)
        assert torch.equal(logprobs(), expected)


def test_error_on_a_helper_thread_reaches_the_caller(threads) -> None:
    threads(4)
    logits = torch.zeros(4096, 1000)
    ids = torch.zeros(4096, dtype=torch.int64)
    ids[4000] = 1000
    with pytest.raises(ValueError, match="token_ids"):
        ops.token_logprobs(logits, ids)
    ids[4000] = 0
    assert ops.token_logprobs(logits, ids).isfinite().all()  # the threads are still there


def test_forked_child_does_not_wait_for_its_parents_threads(threads) -> None:
    """A child has none of the threads that its parent started; a runtime that does not know
    hangs."""
    threads(2)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 40_000, generator=generator)
    ids = torch.arange(64)
    expected = ops.token_logprobs(logits, ids)  # starts the threads
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # nothing of torch's own here: its threads are gone too
        same = False
        try:
            actual = ops.token_logprobs(logits, ids)
            same = actual.numpy().tobytes() == expected.numpy().tobytes()
        finally:
            os.write(write, b"y" if same else b"n")
            os._exit(0)
    os.close(write)
    try:
        ready, _, _ = select.select([read], [], [], TIMEOUT_SECONDS)
        assert ready, "the child hangs"
        assert os.read(read, 1) == b"y"
    finally:
        os.close(read)
        os.kill(child, 9)
        os.waitpid(child, 0)


def _by_itself(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, timeout=3 * TIMEOUT_SECONDS, check=False,
    )  # fmt: skip


# In a process of its own, in which no kernel of ours has run. The alarm ends a child that hangs.
_FORKED_BEFORE = f"""
import os, signal, sys, torch
from spec_rollout import ops
torch.set_num_threads(2)
logits = torch.randn(64, 40_000, generator=torch.Generator().manual_seed(0))
ids = torch.arange(64)
expected = logits.exp()  # starts the threads
child = os.fork()
if child == 0:
    signal.alarm({TIMEOUT_SECONDS})
    done = ops.token_logprobs(logits, ids)
    os._exit(0 if done.numpy().max() < 0.0 else 1)
print(os.waitpid(child, 0)[1])
"""


@pytest.mark.slow
def test_forked_child_does_not_wait_for_threads_that_torch_alone_has_started() -> None:
    done = _by_itself(_FORKED_BEFORE)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


# Each child's first op is on two threads at once. What it looks up then gives up the interpreter's
# lock on the way, and with the short interval the other thread is likely to begin in between.
_FIRST_OPS = f"""
import os, signal, sys, threading, torch
from spec_rollout import ops
torch.set_num_threads(1)
sys.setswitchinterval(1e-6)
logits, ids = torch.zeros(1, 8), torch.zeros(1, dtype=torch.int64)
for _ in range(20):
    child = os.fork()
    if child == 0:
        signal.alarm({TIMEOUT_SECONDS})
        together, done = threading.Barrier(2), []
        def first_op():
            together.wait()
            done.append(ops.token_logprobs(logits, ids))
        threads = [threading.Thread(target=first_op) for _ in range(2)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        os._exit(0 if len(done) == 2 else 1)
    if os.waitpid(child, 0)[1] != 0:
        sys.exit("a child hangs, or has failed")
"""


@pytest.mark.slow
def test_two_threads_make_the_first_op_of_a_process_at_once() -> None:
    done = _by_itself(_FIRST_OPS)
    assert done.returncode == 0, done.stderr
