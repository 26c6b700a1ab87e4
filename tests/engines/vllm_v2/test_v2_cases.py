"""Reuse equals stock vLLM where the scheduler does more than decode: caches, chunks, preemption."""

from __future__ import annotations

from typing import Any

import pytest
from v2_samples import (
    Given,
    assert_same,
    core_of,
    drafted,
    generate,
    params,
    random_prompts,
    wrong_at,
)

TOKENS = 16
SHARED = random_prompts([65], seed=1)[0]  # two blocks of 32 and a token
# Of a length that soon wants another block: there are 12 for 16.
PROMPTS = [SHARED] * 2 + random_prompts([62, 61, 30, 29, 28], seed=2)
ARGS: dict[str, Any] = {
    "enable_prefix_caching": True,
    "max_num_batched_tokens": 100,
    "num_gpu_blocks_override": 13,
}


@pytest.fixture(scope="module")
def sampling(v2_here: None) -> list[Any]:
    return [params(7 + i, max_tokens=TOKENS) for i in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def plain(stock: Any, sampling: list[Any]) -> Given:
    return generate(stock, PROMPTS, sampling)


def watched(llm: Any, counts: dict[str, int]) -> None:
    """Counts what the test is about: made-up drafts of new requests, and preemption."""
    core = core_of(llm)
    runner = core.model_executor.driver_worker.worker.model_runner
    execute, preempt = runner.execute_model, core.scheduler._preempt_request

    def execute_model(output: Any, *args: Any, **kw: Any) -> Any:
        new = {r.req_id for r in output.scheduled_new_reqs}
        counts["padded"] += sum(r in new for r in output.scheduled_spec_decode_tokens)
        return execute(output, *args, **kw)

    def _preempt_request(*args: Any, **kw: Any) -> Any:
        counts["preempted"] += 1
        return preempt(*args, **kw)

    runner.execute_model, core.scheduler._preempt_request = execute_model, _preempt_request


@pytest.mark.parametrize(
    "is_async", [False, pytest.param(True, marks=pytest.mark.v2_large)], ids=["sync", "async"]
)
def test_cached_prompts_chunked_prefill_and_preemption(
    make_llm: Any, plain: Given, sampling: list[Any], is_async: bool
) -> None:
    llm = make_llm(8, async_scheduling=is_async, **ARGS)
    counts = {"padded": 0, "preempted": 0}
    watched(llm, counts)
    drafts = [wrong_at(t, (5 * i) % TOKENS) if i else t for i, t in enumerate(plain.tokens)]
    generate(llm, [SHARED], [params(1, max_tokens=1)])
    assert_same(generate(llm, PROMPTS, map(drafted, sampling, drafts)), plain)
    assert counts["padded"] > 0
    assert counts["preempted"] > 0
