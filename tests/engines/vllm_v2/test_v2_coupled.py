"""With `Coupled`, tokens are those of vLLM's own seeded sampler, whatever was drafted."""

from __future__ import annotations

from typing import Any

import pytest
from v2_samples import (
    EOS,
    Given,
    assert_same,
    core_of,
    drafted,
    generate,
    metrics_of,
    mixed_drafts,
    params,
    random_prompts,
    wrong_at,
)

from spec_rollout.acceptance import Lenient, OneHot

PROMPTS = random_prompts([5, 2, 17, 30, 9, 22, 3])
FILTERS: list[dict[str, Any]] = [
    {},
    {},
    {"temperature": 0.7, "top_k": 12},
    {},
    {"temperature": 1.3, "top_p": 0.8, "min_p": 0.02},
    {
        "temperature": 0.9,
        "top_k": 20,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
    },
    {"temperature": 0.0},
]


@pytest.fixture(scope="module")
def sampling(v2_here: None) -> list[Any]:
    return [params(100 + i, **filters) for i, filters in enumerate(FILTERS)]


@pytest.fixture(scope="module")
def plain(stock: Any, sampling: list[Any]) -> Given:
    return generate(stock, PROMPTS, sampling)


def agreeing(drafts: list[list[int]], rows: list[list[int]]) -> int:
    """Draft tokens up to the first that differs, of all rows."""
    return sum(
        next((i for i, (a, b) in enumerate(zip(d, r, strict=False)) if a != b), min(len(d), len(r)))
        for d, r in zip(drafts, rows, strict=True)
    )


def test_it_is_model_runner_v2(stock: Any, reuse: Any) -> None:
    assert core_of(reuse).scheduler.__class__.__name__ == "Scheduler"
    for llm, name in ((stock, "NoneType"), (reuse, "ReuseSpeculator")):
        runner = core_of(llm).model_executor.driver_worker.worker.model_runner
        assert type(runner).__module__ == "vllm.v1.worker.cpu.model_runner"
        assert type(runner.speculator).__name__ == name


def test_tokens_are_stock_vllms(reuse: Any, plain: Given, sampling: list[Any]) -> None:
    drafts = mixed_drafts(plain.tokens)
    metrics_of(reuse)
    assert_same(generate(reuse, PROMPTS, map(drafted, sampling, drafts)), plain)
    metrics = metrics_of(reuse)
    assert metrics.num_accepted_tokens == agreeing(drafts, plain.tokens)
    assert metrics.num_drafts == 6
    assert metrics.num_engine_steps == 12  # of the request without a draft
    assert metrics.num_wasted_tokens > 0


def test_drafts_save_steps(reuse: Any, plain: Given, sampling: list[Any]) -> None:
    """OneHot's test is the same draw."""
    metrics_of(reuse)
    given = [drafted(p, d, OneHot()) for p, d in zip(sampling, plain.tokens, strict=True)]
    assert_same(generate(reuse, PROMPTS, given), plain)
    metrics = metrics_of(reuse)
    assert metrics.num_accepted_tokens == metrics.num_tested_tokens == 7 * 12
    assert metrics.num_fully_reused == 7
    # The last token of each is tested, and nothing needs its KV cache.
    assert metrics.num_verified_tokens == 7 * 11
    assert metrics.num_wasted_tokens == 0
    # A prompt's step and the chunks: 8 tokens at a time, and each chunk's last row gives one more.
    assert metrics.num_engine_steps == 3


def test_asynchronous_scheduling(make_llm: Any, plain: Given, sampling: list[Any]) -> None:
    llm = make_llm(8, async_scheduling=True)
    assert type(core_of(llm).scheduler).__name__ == "ReuseScheduler"
    drafts = mixed_drafts(plain.tokens)
    given = [p if i == 2 else drafted(p, drafts[i]) for i, p in enumerate(sampling)]
    assert_same(generate(llm, PROMPTS, given), plain)
    metrics = metrics_of(llm)
    assert metrics.num_accepted_tokens > 20
    # Of nobody more than is his draft's, but for a step after a rejection.
    assert metrics.num_computed_tokens < 88 + 7 * 12 + metrics.num_wasted_tokens + 6 * 9


def test_unkeyed_requests_between_keyed_ones(reuse: Any, plain: Given, sampling: list[Any]) -> None:
    drafts = mixed_drafts(plain.tokens)
    given = [p if i % 2 else drafted(p, drafts[i]) for i, p in enumerate(sampling)]
    assert_same(generate(reuse, PROMPTS, given), plain)


def test_the_key_is_the_seed_of_a_request_that_has_none(reuse: Any, stock: Any) -> None:
    key = -(2**62) - 12345
    seeded = generate(stock, PROMPTS[:2], [params(key), params(-2)])
    given = [
        drafted(params(None), seeded.tokens[0], key=key),
        drafted(params(None), seeded.tokens[1], key=-1),
    ]
    assert_same(generate(reuse, PROMPTS[:2], given), seeded)


def test_stop_tokens_and_min_tokens(stock: Any, reuse: Any) -> None:
    # Of this prompt: what comes early, so that every stop is met, in mid-chunk, too.
    prompt = PROMPTS[3]
    first = generate(stock, [prompt], [params(9, max_tokens=20)]).tokens[0]
    ends = [
        params(9, max_tokens=20, stop_token_ids=[first[6]]),
        params(9, max_tokens=20, stop_token_ids=[first[3]], min_tokens=8),
        params(9, max_tokens=9),
        params(9, max_tokens=20, ignore_eos=False),
        params(9, max_tokens=20, stop_token_ids=[EOS], bad_words=None),
    ]
    expected = generate(stock, [prompt] * len(ends), ends)
    assert {"stop", "length"} == set(expected.reasons)
    for draft in (first, wrong_at(first, 9)):
        given = [drafted(p, draft) for p in ends]
        assert_same(generate(reuse, [prompt] * len(ends), given), expected)


def test_several_samples_of_a_request(stock: Any, reuse: Any) -> None:
    several = params(40, n=3, max_tokens=12)
    expected = generate(stock, [PROMPTS[0]], [several])
    assert len({tuple(t) for t in expected.tokens}) == 3
    # The draft of one of them.
    assert_same(generate(reuse, [PROMPTS[0]], [drafted(several, expected.tokens[1])]), expected)
    with pytest.raises(ValueError, match="seed: expected a number together with spec_rollout"):
        generate(reuse, [PROMPTS[0]], [drafted(params(None, n=3), [5])])


def test_aborted_requests_leave_nothing(reuse: Any, plain: Given, sampling: list[Any]) -> None:
    engine = reuse.llm_engine
    for i in range(4):
        engine.add_request(
            f"abort-{i}",
            {"prompt_token_ids": PROMPTS[i]},
            drafted(sampling[i], plain.tokens[i]),
        )
    engine.step()
    engine.step()
    engine.abort_request([f"abort-{i}" for i in range(4)], internal=False)
    while engine.has_unfinished_requests():
        engine.step()
    # Their slots are taken by others, without drafts and with other ones.
    given = [p if i % 2 else drafted(p, plain.tokens[i]) for i, p in enumerate(sampling)]
    assert_same(generate(reuse, PROMPTS, given), plain)
    runner = core_of(reuse).model_executor.driver_worker.worker.model_runner
    reuse.llm_engine.step()
    assert runner.req_states.num_reqs == 0


def test_what_cannot_be_served_is_refused(reuse: Any) -> None:
    for kw, message in (
        ({"logprob_token_ids": [3]}, "logprob_token_ids: expected None"),
        ({"thinking_token_budget": 4}, "thinking_token_budget"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(reuse, [PROMPTS[0]], [drafted(params(1, **kw), [5])])
    with pytest.raises(ValueError, match="draft_logprobs: expected an array for Lenient"):
        drafted(params(1), [5], Lenient(0.0))
