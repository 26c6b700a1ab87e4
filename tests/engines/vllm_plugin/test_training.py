"""The trainer, the rollout command and the demo on vLLM."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_samples import EOS, drafts_of, make_requests, random_prompts, rows_of

from spec_rollout.acceptance import Coupled
from spec_rollout.types import Rollouts, SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("even_steps")]


@pytest.fixture(autouse=True)
def one_thread(vllm_installed: None) -> Iterator[None]:
    """With several threads, sums depend on the batch, and runs drift apart by rounding."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., Any]:
    """A run of the demo's model on a few of its prompts; keyword arguments update sections."""
    from spec_rollout.config.toml import from_dict
    from spec_rollout.demo import model_dir
    from spec_rollout.demo.task import training_problems, write_jsonl

    write_jsonl(training_problems(6), tmp_path / "train.jsonl")

    def make(name: str, **sections: dict[str, Any]) -> Any:
        base: dict[str, Any] = {
            "model": {"path": str(model_dir()), "device": "cpu"},
            "data": {"path": str(tmp_path / "train.jsonl")},
            "rollout": {"engine": "vllm", "num_samples": 4, "max_tokens": 120, "num_slots": 16},
            "reward": {"functions": ["spec_rollout.demo.task:reward"]},
            "train": {"prompts_per_step": 3, "epochs": 3, "lr": 3e-4, "kl_coef": 0.0, "seed": 7},
            "eval": {"num_train_prompts": 4, "num_samples": 2},
            "log": {"run_dir": str(tmp_path / name), "progress": "off"},
        }
        for section, values in sections.items():
            base[section] = {**base.get(section, {}), **values}
        return from_dict(base)

    return make


def train(config: Any) -> tuple[list[dict[str, Any]], list[Rollouts], Any]:
    """Metrics rows, rollouts by step, summary."""
    from spec_rollout.train.trainer import run

    rows: list[dict[str, Any]] = []
    rollouts: list[Rollouts] = []
    summary = run(config, on_step=rows.append, on_rollouts=lambda _, r: rollouts.append(r))
    return rows, rollouts, summary


def test_lossless_reuse_changes_no_token_of_a_run(make_config: Callable[..., Any]) -> None:
    rows, on, summary = train(make_config("on"))
    rows_off, off, _ = train(make_config("off", rollout={"reuse": False}))
    embedded, _, _ = train(make_config("embedded", rollout={"engine": "transformers"}))
    assert [rows_of(r) for r in on] == [rows_of(r) for r in off]
    for a, b in zip(on, off, strict=True):
        # vLLM's own kernels may still share work among threads, and add up in another order.
        torch.testing.assert_close(a.logprobs, b.logprobs, atol=2e-5, rtol=0)
    assert [r.policy_version for r in on] == list(range(6))  # synced after every update
    assert summary.after_first_epoch.reused_fraction > 0.1
    for row, row_off in zip(rows[1:], rows_off[1:], strict=True):
        # The engine's log-probs are those of the weights that were just updated.
        assert row["logprob_gap"] < 2e-5
        assert row["num_engine_steps"] <= row_off["num_engine_steps"]
        assert row["num_computed_tokens"] > 0
        if row["num_drafts"]:
            assert row["vllm_num_tested_tokens"] >= row["num_reused_tokens"]
            assert 0 < row["vllm_acceptance_1_16"] <= 1
    assert rows[0]["accuracy_train"] == embedded[0]["accuracy_train"]
    assert rows[1]["reward"] == embedded[1]["reward"]


def test_drafting_changes_no_token_of_a_run(make_config: Callable[..., Any]) -> None:
    rows_off, off, _ = train(make_config("off"))
    rows, on, _ = train(make_config("on", rollout={"drafting": True}))
    assert len(on) == 6
    assert [rows_of(r) for r in on] == [rows_of(r) for r in off]
    for a, b in zip(on, off, strict=True):
        torch.testing.assert_close(a.logprobs, b.logprobs, atol=2e-5, rtol=0)
        assert torch.equal(a.accepted_lens, b.accepted_lens)
    assert sum(row["num_accepted_proposals"] for row in rows[1:]) > 0
    assert all(row["num_proposed_tokens"] == 0 for row in rows_off[1:])

    def steps(of: list[dict[str, Any]]) -> int:
        return sum(row["num_engine_steps"] for row in of[1:])

    assert steps(rows) < steps(rows_off)


def test_two_pass_trains_with_the_lenient_rule(make_config: Callable[..., Any]) -> None:
    lenient = {"rule": "lenient", "log_lenience": 0.5}
    rows, two, _ = train(make_config("two", rollout=lenient, vllm={"strategy": "two_pass"}))
    _, one, _ = train(make_config("one", rollout=lenient))
    assert [rows_of(r) for r in two[:3]] == [rows_of(r) for r in one[:3]]
    assert sum(row["verification_seconds"] for row in rows[1:]) > 0


def test_a_run_interrupted_in_a_rollout_continues_as_if_it_had_not_been(
    make_config: Callable[..., Any],
) -> None:
    from spec_rollout.engines.vllm import VLLMEngine
    from spec_rollout.train.interrupt import RunInterrupted
    from spec_rollout.train.trainer import resume

    rows, whole, _ = train(make_config("whole"))
    steps, submit = [0], VLLMEngine.submit

    def submit_and_interrupt(self: Any, *args: Any) -> Any:
        before_step = self.before_step

        def counting() -> None:
            steps[0] += 1
            if steps[0] == 400:
                os.kill(os.getpid(), signal.SIGTERM)
            before_step()

        self.before_step = counting
        return submit(self, *args)

    config = make_config("parts")
    VLLMEngine.submit = submit_and_interrupt
    try:
        with pytest.raises(RunInterrupted) as stopped:
            train(config)
    finally:
        VLLMEngine.submit = submit
    assert stopped.value.code == 143
    assert steps[0] == 400
    rest: list[Rollouts] = []
    resume(config.log.run_dir, on_rollouts=lambda _, r: rest.append(r))
    assert 0 < len(rest) < len(whole)
    assert [rows_of(r) for r in rest] == [rows_of(r) for r in whole[-len(rest) :]]
    text = (Path(config.log.run_dir) / "metrics.jsonl").read_text()
    assert [json.loads(line)["reward"] for line in text.splitlines()[1:]] == [
        row["reward"] for row in rows[1:]
    ]


def test_an_aborted_rollout_leaves_no_request_behind(engine: Any) -> None:
    prompts = random_prompts(30, seed=4)
    sampling = SamplingParams(max_tokens=40, stop_token_ids=(EOS,))
    plain = engine.rollout(make_requests(prompts), sampling, Coupled())
    steps = [0]

    def stop() -> None:
        steps[0] += 1
        if steps[0] == 3:
            raise KeyboardInterrupt

    engine.before_step = stop
    try:
        with pytest.raises(KeyboardInterrupt):
            engine.rollout(make_requests(prompts, drafts_of(plain)), sampling, Coupled())
    finally:
        engine.before_step = None
    assert not engine.llm.llm_engine.has_unfinished_requests()
    again = engine.rollout(make_requests(prompts[:7]), sampling, Coupled())
    assert rows_of(again) == rows_of(plain)[:7]
    engine.update_weights([])  # refused while requests run


def test_rollout_command(tmp_path: Path) -> None:
    from spec_rollout.cli import main
    from spec_rollout.demo import model_dir
    from spec_rollout.demo.task import training_problems, write_jsonl

    write_jsonl(training_problems(5), tmp_path / "prompts.jsonl")
    options = ["--model", str(model_dir()), "--prompts", str(tmp_path / "prompts.jsonl")]
    options += ["--num-samples", "2", "--max-tokens", "40", "--num-slots", "8"]
    cache = str(tmp_path / "cache.bin")

    def rollout(name: str, *more: str) -> list[dict[str, Any]]:
        out = tmp_path / f"{name}.jsonl"
        assert main(["rollout", *options, "--out", str(out), *more]) == 0
        return [json.loads(line) for line in out.read_text().splitlines()]

    first = rollout("first", "--engine", "vllm", "--cache-out", cache)
    second = rollout("second", "--engine", "vllm", "--cache-in", cache, "--pass", "1")
    embedded = rollout("embedded")
    ids = [row["response_ids"] for row in first]
    assert ids == [row["response_ids"] for row in second]
    assert ids == [row["response_ids"] for row in embedded]
    assert [row["accepted_len"] for row in second] == list(map(len, ids))


def test_short_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from spec_rollout.demo.preset import FULL_RUNS, SHORT
    from spec_rollout.demo.run import demo, result_text

    content = demo(tmp_path / "vllm", FULL_RUNS, SHORT, 0, ["demo"], "vllm")
    saved = json.loads((tmp_path / "vllm" / "summary.json").read_text())
    vanilla = {"vanilla": FULL_RUNS["vanilla"]}
    embedded = demo(tmp_path / "embedded", vanilla, SHORT, 0, ["demo"])
    assert saved.keys() - embedded.keys() == {"coupled_equals_off", "both_equals_off"}
    for run in saved["runs"].values():
        assert run.keys() == embedded["runs"]["vanilla"].keys()
    assert saved["engine"] == "vllm"
    for name in ("coupled", "both"):
        same = saved[f"{name}_equals_off"]
        assert same["identical"] == same["total"] > 0
    assert saved["runs"]["both"]["accepted_proposals"] > 0
    assert (tmp_path / "vllm" / "report.html").stat().st_size > 10_000
    assert "identical, token for token" in result_text(content, FULL_RUNS)
