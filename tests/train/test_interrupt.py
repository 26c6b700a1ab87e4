"""Signals: noted first, fatal the second time, handlers restored, aborts between steps only."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch
from markov_engine import MarkovEngine

from spec_rollout.train.interrupt import Aborted, RunInterrupted, StopRequest


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_is_noted(signum):
    before = signal.getsignal(signum)
    with StopRequest() as stop:
        stop.check()
        os.kill(os.getpid(), signum)
        assert stop.signum == signum
        with pytest.raises(Aborted):
            stop.check()
    assert signal.getsignal(signum) is before


@pytest.fixture
def usual_sigint():
    """Python's handler; a process that a shell started in the background ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("usual_sigint")
def test_second_signal_has_its_usual_effect():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signum == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_aborts_before_the_engines_next_step():
    engine = MarkovEngine(torch.eye(4))
    calls = 0

    def steps(stop):
        nonlocal calls
        with stop.aborting(engine):
            for _ in range(5):
                assert engine.before_step is not None
                engine.before_step()
                calls += 1
                if calls == 2:
                    stop.request()

    with StopRequest() as stop:
        for _ in range(2):  # the second time it does not even begin
            with pytest.raises(Aborted):
                steps(stop)
            assert calls == 2
            assert engine.before_step is None  # nothing left behind


def test_other_threads_get_no_handlers():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work():
        with StopRequest():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_exit_codes():
    assert RunInterrupted(signal.SIGINT, "m").code == 130
    assert RunInterrupted(signal.SIGTERM, "m").code == 143
    assert str(RunInterrupted(signal.SIGTERM, "m")) == "m"
