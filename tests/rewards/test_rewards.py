"""Rewards: sums, skipping, figures per function, and errors that name function and row."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import sys
import tempfile
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from spec_rollout.config.sections import ConfigError, RewardConfig
from spec_rollout.rewards import RewardError, Rewards, Sample, event_loop

HERE = __name__


def length(prompt, response, answer):
    return len(response)


def scaled(prompt, response, answer, level, scale=10):
    return level * scale


def skip(prompt, response, answer):
    return None


def skip_empty(prompt, response, answer):
    return 1 if response else None


def std(prompt, response, answer):
    return 0


def batched(responses, level):
    return [len(r) + x if r else None for r, x in zip(responses, level, strict=True)]


def as_array(responses):
    return np.array([len(r) for r in responses])


def as_tensor(responses):
    return torch.tensor([len(r) for r in responses])


def verl(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(solution_str == ground_truth), "acc": True}


def broken(prompt, response, answer):
    raise KeyError("unit")


def exits(prompt, response, answer):
    sys.exit(0)


def interrupted(prompt, response, answer):
    raise KeyboardInterrupt


def not_a_number(prompt, response, answer):
    return {"text": "1.0", "table": {"score": 1.0}, "huge": 10**400}.get(response, math.nan)


def huge(prompt, response, answer):
    return 1e308


def large(prompt, response, answer):
    return 1e30


def short_list(responses):
    return [1.0]


def no_list(responses):
    return 1.0


def word(responses):
    return [1.0, "good"]


def broken_batch(responses):
    raise ValueError("no")


async def waits(data_source, solution_str, ground_truth, extra_info):
    await asyncio.sleep(0)
    if solution_str == "bad":
        raise KeyError("unit")
    return {"score": float(len(solution_str))}


class Waits:
    async def __call__(self, prompt, response, answer):
        async with asyncio.timeout(30):
            await everybody.wait()
        return (await waits("d", response, answer, None))["score"]


waits_when_called = Waits()


def waits_within(prompt, response, answer):
    return waits_when_called(prompt, response, answer) if response else 0.5


# Those of three calls; each belongs to the loop that it is first used in.
everybody = asyncio.Barrier(3)
one_at_a_time = asyncio.Semaphore(1)


async def waits_in_line(response):
    async with one_at_a_time:
        await asyncio.sleep(0)
        return float(len(response))


started = threading.Event()
cancelled = threading.Event()


async def waits_long(response):
    started.set()
    try:
        await asyncio.sleep(20)
    except asyncio.CancelledError:
        cancelled.set()
        raise


async def waits_for_all(completions, **kwargs):
    await asyncio.sleep(0)
    return [float(len(text)) for text in completions]


def logs(completions, log_metric, **kwargs):
    log_metric("half", len(completions) / 2)
    return [0.0] * len(completions)


def some_broken(response):
    return {"nan": math.nan, "text": "x"}.get(response) or 1 / len(response)


def rewards(*names, weights=None, **options):
    return Rewards(RewardConfig(tuple(f"{HERE}:{n}" for n in names), weights, **options))


def sample(response="abc", answer=None, columns=None, line=7):
    columns = {"level": 2, "data_source": "d"} if columns is None else columns
    return Sample("p", response, answer, columns, f"d.jsonl:{line}")


def total(names, response="abc", weights=None, answer=None):
    (value,) = rewards(*names, weights=weights).judge([sample(response, answer)]).totals
    return value


def test_weighted_sum_and_columns():
    assert total(["length"]) == 3.0
    assert total(["scaled"]) == 20.0
    assert total(["length", "scaled"], weights=(0.5, -1.0)) == 1.5 - 20.0
    assert total(["verl"], answer="abc") == 1.0


def test_none_is_left_out():
    assert total(["skip"]) is None
    assert total(["skip", "length"]) == 3.0
    assert total(["skip_empty"], "") is None


def test_each_functions_values_are_kept():
    judged = rewards("length", "skip_empty", "batched", weights=(2.0, 1.0, 1.0)).judge(
        [sample("abc"), sample("")]
    )
    assert judged.by_function == {
        "length": [3.0, 0.0],
        "skip_empty": [1.0, None],
        "batched": [5.0, None],
    }
    assert judged.totals == [12.0, 0.0]
    assert rewards("length").judge([]).by_function == {"length": []}


def test_lists_may_be_arrays():
    for name in ("as_array", "as_tensor"):
        assert rewards(name).judge([sample("abc"), sample("")]).totals == [3.0, 0.0]


def test_labels_tell_functions_and_figures_apart():
    # There is a figure `reward_std` already.
    assert rewards("length", "std").labels == ["length", f"{HERE}_std"]
    assert rewards("length", "length").labels == [f"{HERE}_length", f"{HERE}_length_2"]
    assert Rewards(RewardConfig(("exact_match", "last_number"))).labels == [
        "exact_match",
        "last_number",
    ]


@pytest.mark.parametrize(
    ("name", "response", "message"),
    [
        ("broken", "x", r"reward .*:broken: raised KeyError: 'unit' \(prompt of d\.jsonl:7\)"),
        ("exits", "x", r"reward .*:exits: raised SystemExit: 0 \(prompt of d\.jsonl:7\)"),
        ("not_a_number", "x", r"expected a finite number or None, got nan .*d\.jsonl:7"),
        ("not_a_number", "text", r"expected a finite number or None, got '1\.0'"),
        ("not_a_number", "table", r"expected a finite number or None, got \{'score': 1\.0\}"),
        ("not_a_number", "huge", r"expected a finite number or None, got 10000"),
        ("scaled", "x", r"reward .*:scaled: raised TypeError: .*'level'"),
        (
            "short_list",
            "x",
            r"expected a list of 2 numbers, got 1 \(prompts of d\.jsonl:7 to d\.js",
        ),
        ("no_list", "x", r"expected a list of 2 numbers, got 1\.0"),
        ("word", "x", r"expected a finite number or None, got 'good' \(prompt of d\.jsonl:8\)"),
        ("broken_batch", "x", r"raised ValueError: no \(prompt of d\.jsonl:7 to d\.jsonl:8\)"),
    ],
)
def test_errors_name_function_and_row(name, response, message):
    samples = [sample(response, columns={}), sample(response, columns={}, line=8)]
    with pytest.raises(RewardError, match=message):
        rewards(name).judge(samples)


def test_async_functions_are_awaited():
    judged = rewards("waits", "waits_for_all").judge([sample("abc"), sample("")])
    assert judged.totals == [6.0, 0.0]

    async def within_a_loop():
        return rewards("waits").judge([sample("abc")]).totals

    assert asyncio.run(within_a_loop()) == [3.0]
    with pytest.raises(
        RewardError, match=r":waits: raised KeyError: 'unit' \(prompt of d\.jsonl:7"
    ):
        total(["waits"], "bad")


@pytest.mark.parametrize("name", ["waits_when_called", "waits_within"])
def test_what_turns_out_to_be_async_is_awaited_together(name):
    samples = [sample("abc"), sample("ab"), sample("bad")]
    judged = rewards(name, on_error="skip").judge(samples)
    assert judged.totals == [3.0, 2.0, None]
    assert "raised KeyError: 'unit'" in judged.failures[0]
    assert rewards("waits_within").judge([sample("")]).totals == [0.5]


def test_what_async_functions_keep_serves_every_step():
    for _ in range(2):
        judged = rewards("waits_in_line").judge([sample("abc"), sample("ab"), sample("")])
        assert judged.totals == [3.0, 2.0, 0.0]


def test_a_forked_process_awaits_in_a_loop_of_its_own():
    assert total(["waits"]) == 3.0
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        os._exit(0 if total(["waits"]) == 3.0 else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_an_interrupt_does_not_wait_for_async_functions():
    def interrupt():
        started.wait(30)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    # Where the tests run in the background, the process ignores it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            total(["waits_long"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert cancelled.wait(10)


def test_an_interrupt_before_the_future_is_known_cancels_all_the_same(monkeypatch):
    begun, ended = threading.Event(), threading.Event()

    async def lasts():
        begun.set()
        try:
            await asyncio.sleep(600)
        finally:
            ended.set()

    submit = asyncio.run_coroutine_threadsafe

    def interrupted(coroutine, loop):
        submit(coroutine, loop)
        assert begun.wait(30)
        raise KeyboardInterrupt

    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        event_loop.run(lasts())
    assert ended.wait(30)


def test_failures_leave_responses_out_where_the_config_says_so():
    responses = ["abcd", "", "nan", "text", "ab"]
    samples = [sample(text, line=i) for i, text in enumerate(responses)]
    judged = rewards("length", "some_broken", on_error="skip").judge(samples)
    # Not the sum of what is left: it would be compared with whole ones.
    assert judged.totals == [4.25, None, None, None, 2.5]
    assert judged.by_function["some_broken"] == [0.25, None, None, None, 0.5]
    assert judged.by_function["length"] == [4.0, 0.0, 3.0, 4.0, 2.0]
    assert judged.num_failed == 3
    assert [line.partition(": ")[2][-40:] for line in judged.failures] == [
        "n: division by zero (prompt of d.jsonl:1)"[-40:],
        "number or None, got nan (prompt of d.jsonl:2)"[-40:],
        "number or None, got 'x' (prompt of d.jsonl:3)"[-40:],
    ]
    assert all(f"reward {HERE}:some_broken: " in line for line in judged.failures)
    # A batch fails as one; a sum that is too large, alone.
    judged = rewards("broken_batch", on_error="skip").judge(samples)
    assert (judged.totals, judged.num_failed, len(judged.failures)) == ([None] * 5, 5, 1)
    judged = rewards("large", weights=(2.0,), on_error="skip").judge(samples[:1])
    assert (judged.totals, judged.num_failed) == ([None], 1)
    judged = rewards("waits", on_error="skip").judge([sample("bad"), sample("abc")])
    assert (judged.totals, judged.num_failed) == ([None, 3.0], 1)
    assert rewards("length").judge(samples).num_failed == 0


def test_after_a_failure_that_stops_no_more_calls_are_made():
    calls = []

    def breaks(prompt, response, answer):
        calls.append(response)
        raise KeyError("unit")

    judges = rewards("length")
    judges._entries[0] = replace(judges._entries[0], function=breaks)
    with pytest.raises(RewardError, match="'unit'"):
        judges.judge([sample(), sample()])
    assert calls == ["abc"]


def test_figures_that_functions_log():
    assert rewards("logs").judge([sample(), sample(), sample()]).logged == {"half": [1.5]}


def test_a_sum_that_is_no_number_is_named():
    match = r"reward .*: expected a number of at most 1e\+30, got 1e\+308 \(prompt of d\.jsonl:7\)"
    with pytest.raises(RewardError, match=match):
        total(["huge", "huge"])
    with pytest.raises(RewardError, match=r"expected a sum of the rewards of at most 1e\+30, got"):
        total(["large"], weights=(2.0,))
    assert total(["large"]) == 1e30
    with pytest.raises(ConfigError, match=r"reward\.weights: expected finite numbers"):
        RewardConfig(("exact_match",), (math.inf,))


def test_an_interrupt_stays_one():
    with pytest.raises(KeyboardInterrupt):
        total(["interrupted"])


def test_functions_are_checked_against_the_columns():
    config = RewardConfig((f"{HERE}:scaled",))
    Rewards(config, ["level"])
    with pytest.raises(
        ConfigError,
        match=r"reward\.functions: '.*:scaled': expected .* columns of the data \('n'\), got 'level'",
    ):
        Rewards(config, ["n"])


def test_rows_are_checked_before_they_are_judged():
    judges = Rewards(RewardConfig((f"{HERE}:scaled", "exact_match")))
    assert judges.problem_of("a", {"level": 1}) is None
    assert "expected a column 'level', which reward" in judges.problem_of("a", {"n": 1})
    assert judges.problem_of(None, {"level": 1}).startswith(
        "reward exact_match: expected an answer"
    )
    # What a function of one's own makes of an answer is its own business.
    assert rewards("length").problem_of(None, {}) is None


def moves(prompt, response, answer):
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
    return 1.0


def changes_torch(prompt, response, answer):
    torch.set_default_dtype(torch.bfloat16)
    torch.set_grad_enabled(False)
    torch.set_default_device("meta")
    return 1.0


def leaves_an_alarm(prompt, response, answer):
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.alarm(60)
    raise ValueError("no")


def test_the_process_is_as_it_was_afterwards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert rewards("moves", "changes_torch").judge([sample(), sample()]).totals == [2.0, 2.0]
    assert os.getcwd() == str(tmp_path)
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    assert torch.ones(1).device.type == "cpu"
    before = signal.getsignal(signal.SIGALRM)
    try:
        with pytest.raises(RewardError, match="raised ValueError: no"):
            total(["leaves_an_alarm"])
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    finally:
        signal.signal(signal.SIGALRM, before)
