"""What vLLM does before the first request: it warms up, and looks how much memory is wanted."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from v2_samples import LLM_ARGS, assert_same, core_of, generate, metrics_of, params, random_prompts

PROMPTS = random_prompts([5, 17], seed=8)
SAMPLING = [{"max_tokens": 8}, {"max_tokens": 8, "temperature": 0.7, "top_k": 12}]
LAGGED = '{"mode": "drafting", "lagged_tokens": 4}'


def worker_of(llm: Any) -> Any:
    return core_of(llm).model_executor.driver_worker.worker


@pytest.fixture(
    params=["drafting", pytest.param(LAGGED, marks=pytest.mark.v2_large), ""],
    ids=["drafting", "lagged", "drafts"],
)
def warmed(request: pytest.FixtureRequest, model_dir: Path) -> Iterator[tuple[Any, dict[str, int]]]:
    """An `LLM` whose worker warms up as that of GPUs does, and how many requests that took.

    The worker of CPUs does so from vLLM 0.33 on, in its own method.
    """
    from vllm import LLM
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu.warmup import warmup_kernels

    from spec_rollout.engines.vllm import engine_args

    original = CPUWorker.compile_or_warm_up_model
    seen = {"requests": 0}

    def compile_or_warm_up_model(self: Any) -> Any:
        def execute_model(output: Any) -> Any:
            seen["requests"] += len(output.scheduled_new_reqs)
            return self.execute_model(output)

        warmup_kernels(self.model_runner, execute_model, self.sample_tokens)
        return original(self)

    variable = request.param
    args = {**LLM_ARGS, "logprobs_mode": "processed_logprobs", "max_model_len": 256}
    if variable:
        del args["async_scheduling"]
    else:
        args = {**args, **engine_args(8), "async_scheduling": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CPUWorker, "compile_or_warm_up_model", compile_or_warm_up_model)
        patch.setenv("SPEC_ROLLOUT", variable)
        yield LLM(str(model_dir), **args), seen


def test_the_warm_up_is_nobodys_request(warmed: tuple[Any, dict[str, int]], stock: Any) -> None:
    llm, seen = warmed
    assert seen["requests"] >= LLM_ARGS["max_num_seqs"]
    metrics = metrics_of(llm)
    assert (metrics.num_engine_steps, metrics.num_computed_tokens) == (0, 0)
    (info,) = llm.collective_rpc("spec_rollout_history")
    for name in ("num_served", "num_passed_by", "num_groups", "num_live"):
        assert info.get(name, 0) == 0
    sampling = [params(60 + i, **kw) for i, kw in enumerate(SAMPLING)]
    assert_same(generate(llm, PROMPTS, sampling), generate(stock, PROMPTS, sampling))
    (info,) = llm.collective_rpc("spec_rollout_history")
    assert info.get("num_served", 2) == info.get("num_groups", 2) == 2
    assert metrics_of(llm).num_engine_steps >= 8


@pytest.mark.parametrize("with_adapters", [False, True])
def test_the_profile_of_memory_sees_steps_that_verify(
    make_llm: Callable[..., Any], with_adapters: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 8} if with_adapters else {}
    runner = worker_of(make_llm(8, **args)).model_runner
    compute, rows = runner.model.compute_logits, []

    def compute_logits(hidden_states: torch.Tensor, *args: Any, **kw: Any) -> Any:
        rows.append(hidden_states.shape[0])
        return compute(hidden_states, *args, **kw)

    monkeypatch.setattr(runner.model, "compute_logits", compute_logits)
    runner.profile_run()
    assert rows == [8, 8 * 9]  # requests; and as many with 8 draft tokens each
    monkeypatch.setattr(runner, "max_num_tokens", 40)
    runner.profile_run()
    assert rows[2:] == [8, 40]


def test_a_slot_without_a_request(stock: Any, reuse: Any) -> None:
    """vLLM 0.33 fills slots with parameters alone to see what memory they want, but on CPUs."""
    from vllm import SamplingParams

    runner = worker_of(reuse).model_runner
    for slot in range(LLM_ARGS["max_num_seqs"]):
        runner.sampler.add_request(slot, SamplingParams.for_sampler_warmup())
    runner.sampler.apply_staged_writes()
    runner.profile_run()
    sampling = [params(70 + i, **kw) for i, kw in enumerate(SAMPLING)]
    assert_same(generate(reuse, PROMPTS, sampling), generate(stock, PROMPTS, sampling))


@pytest.mark.parametrize(
    ("num_tokens", "args", "why"),
    [
        (8, {}, None),
        (19, {"max_model_len": 121}, None),
        (19, {"max_model_len": 120}, "grow to 121, and max_model_len is 120"),
        (64, {}, "a prompt of 66 tokens and grow to 391, and max_model_len is 128"),
        (9, {"max_num_batched_tokens": 10}, "11 tokens .* max_num_batched_tokens is 10"),
        (64, {"enforce_eager": True}, None),
    ],
)
def test_a_warm_up_that_does_not_fit_is_left_out(
    model_dir: Path,
    num_tokens: int,
    args: dict[str, Any],
    why: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Engines of a trainer are as long as its longest rollout, and chunks have 64 tokens."""
    from vllm.engine.arg_utils import EngineArgs

    from spec_rollout.engines.vllm import engine_args
    from spec_rollout.engines.vllm.compat.v2 import config as v2_config

    lines: list[str] = []
    monkeypatch.setattr(v2_config, "log", lines.append)
    args = {**LLM_ARGS, "enforce_eager": False, **engine_args(num_tokens), **args}
    config = EngineArgs(str(model_dir), **args).create_engine_config()
    assert config.kernel_config.enable_jit_warmup == (why is None and not args["enforce_eager"])
    assert len(lines) == (why is not None)
    assert why is None or re.search(why, lines[0])
