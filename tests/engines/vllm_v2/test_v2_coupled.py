"""With `Coupled`, tokens are those of vLLM's own seeded sampler, whatever was drafted."""

from __future__ import annotations

from typing import Any

import numpy as np
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

from spec_rollout.acceptance import Coupled, Lenient, OneHot

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


def test_unkeyed_requests_between_keyed_ones(
    either: Any, plain: Given, sampling: list[Any]
) -> None:
    drafts = mixed_drafts(plain.tokens)
    given = [p if i % 2 else drafted(p, drafts[i]) for i, p in enumerate(sampling)]
    assert_same(generate(either, PROMPTS, given), plain)


def test_the_key_is_the_seed_of_a_request_that_has_none(either: Any, stock: Any) -> None:
    key = -(2**62) - 12345
    seeded = generate(stock, PROMPTS[:2], [params(key), params(-2)])
    given = [
        drafted(params(None), seeded.tokens[0], key=key),
        drafted(params(None), seeded.tokens[1], key=-1),
    ]
    assert_same(generate(either, PROMPTS[:2], given), seeded)


def test_stop_tokens_and_min_tokens(stock: Any, either: Any) -> None:
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
        assert_same(generate(either, [prompt] * len(ends), given), expected)


@pytest.mark.v2_large
def test_long_drafts_and_a_prompt_of_one_token(stock: Any, either: Any) -> None:
    """Of many chunks; greedily drawn, too, and wrong late."""
    prompts = random_prompts([1, 33, 12, 25, 7, 18], seed=8)
    sampling = [params(1000 + i, max_tokens=40) for i in range(5)]
    sampling.append(params(1005, max_tokens=40, temperature=0.0))
    expected = generate(stock, prompts, sampling)
    whole = expected.tokens
    drafts = [
        whole[0],
        wrong_at(whole[1], 0),
        wrong_at(whole[2], 17),
        [],
        [*whole[4], *[7] * 10],
        wrong_at(whole[5], 30),
    ]
    metrics_of(either)
    assert_same(generate(either, prompts, map(drafted, sampling, drafts)), expected)
    metrics = metrics_of(either)
    assert metrics.num_accepted_tokens == agreeing(drafts, whole) == 40 + 17 + 40 + 30
    assert metrics.num_engine_steps < 40 + 3


def test_responses_become_prompts(stock: Any, either: Any) -> None:
    """Blocks that held rejected tokens are cached for what was given in their place."""
    prompts = random_prompts([30, 27, 61], seed=9)  # blocks of 32: each ends in the response
    sampling = [params(70 + i) for i in range(len(prompts))]
    first = generate(stock, prompts, sampling)
    given = [drafted(p, wrong_at(t, 1)) for p, t in zip(sampling, first.tokens, strict=True)]
    assert_same(generate(either, prompts, given), first)
    longer = [[*p, *t, 9] for p, t in zip(prompts, first.tokens, strict=True)]
    then = generate(stock, longer, sampling)
    given = [drafted(p, wrong_at(t, 5)) for p, t in zip(sampling, then.tokens, strict=True)]
    outputs = either.generate([{"prompt_token_ids": p} for p in longer], given, use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs] == then.tokens
    assert [output.num_cached_tokens for output in outputs] == [32, 32, 64]


def test_masks_and_penalties(stock: Any, either: Any) -> None:
    """What depends on the tokens so far counts those of the draft that are under test."""
    prompt = PROMPTS[4]
    free = generate(stock, [prompt], [params(21)]).tokens[0]
    banned = params(21)
    # Two tokens in a row, of which the second may then not follow the first; and one token.
    banned._bad_words_token_ids = [free[4:6], [free[8]]]
    sampling = [
        params(21, logit_bias={free[2]: -50.0, 40: 3.0}),
        params(21, allowed_token_ids=sorted({*free[:5], 20, 21, 22})),
        params(21, frequency_penalty=2.0, repetition_penalty=2.0),
        params(21, presence_penalty=-2.0),
        banned,
    ]
    expected = generate(stock, [prompt] * len(sampling), sampling)
    assert [row != free for row in expected.tokens] == [True] * len(sampling)
    metrics_of(either)
    for at in (None, 3, 7):
        drafts = [row if at is None else wrong_at(row, at) for row in expected.tokens]
        given = map(drafted, sampling, drafts)
        assert_same(generate(either, [prompt] * len(sampling), given), expected)
    assert metrics_of(either).num_accepted_tokens == len(sampling) * (12 + 3 + 7)
    # The draft of another law: what is masked is in it.
    given = [drafted(p, free) for p in sampling]
    assert_same(generate(either, [prompt] * len(sampling), given), expected)


def test_several_samples_of_a_request(stock: Any, either: Any) -> None:
    several = params(40, n=3, max_tokens=12)
    expected = generate(stock, [PROMPTS[0]], [several])
    assert len({tuple(t) for t in expected.tokens}) == 3
    # The draft of one of them.
    assert_same(generate(either, [PROMPTS[0]], [drafted(several, expected.tokens[1])]), expected)
    with pytest.raises(ValueError, match="seed: expected a number together with spec_rollout"):
        generate(either, [PROMPTS[0]], [drafted(params(None, n=3), [5])])


@pytest.mark.v2_large
@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
def test_logprobs(make_llm: Any, plain: Given, sampling: list[Any], mode: str) -> None:
    """Of the tokens given and of the likeliest others, with their ranks, and of the prompts."""

    def asked(llm: Any, wanted: list[Any]) -> list[Any]:
        for i, p in enumerate(wanted):
            p.logprobs, p.prompt_logprobs = 4, (2 if i % 3 == 0 else None)
        return llm.generate([{"prompt_token_ids": p} for p in PROMPTS], wanted, use_tqdm=False)

    args = {} if mode == "processed_logprobs" else {"logprobs_mode": mode}
    stock = asked(make_llm(**args), [p.clone() for p in sampling])
    given = list(map(drafted, sampling, mixed_drafts(plain.tokens)))
    for found, expected in zip(asked(make_llm(8, **args), given), stock, strict=True):
        assert found.outputs[0].token_ids == expected.outputs[0].token_ids
        assert_same_logprobs(found.outputs[0].logprobs, expected.outputs[0].logprobs)
        assert_same_logprobs(found.prompt_logprobs or [], expected.prompt_logprobs or [])
    assert any(output.prompt_logprobs for output in stock)


def assert_same_logprobs(found: list[Any], expected: list[Any]) -> None:
    """The same tokens with the same ranks, and log-probs to the last bits."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        if b is None:  # a prompt's first token
            assert a is None
            continue
        assert {t: v.rank for t, v in a.items()} == {t: v.rank for t, v in b.items()}
        np.testing.assert_allclose(
            [a[t].logprob for t in b], [v.logprob for v in b.values()], atol=2e-5
        )


@pytest.mark.v2_large
def test_rules_with_asynchronous_scheduling(
    make_llm: Any, reuse: Any, plain: Given, sampling: list[Any]
) -> None:
    """What a rule decides is a matter of keys and positions, not of steps."""
    drafts = mixed_drafts(plain.tokens)
    rules = [Lenient(0.0), Lenient(0.5), Coupled(4.0), OneHot(), Coupled(), Lenient(0.5), OneHot()]
    given = [
        drafted(p, d, rule, key=50 + i, logprobs=np.full(len(d), -6.0, np.float32))
        for i, (p, d, rule) in enumerate(zip(sampling, drafts, rules, strict=True))
    ]
    expected = generate(reuse, PROMPTS, given)
    assert expected.tokens != plain.tokens
    metrics_of(reuse)
    assert_same(generate(make_llm(8, async_scheduling=True), PROMPTS, given), expected)


def test_aborted_requests_leave_nothing(either: Any, plain: Given, sampling: list[Any]) -> None:
    engine = either.llm_engine
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
    assert_same(generate(either, PROMPTS, given), plain)
    runner = core_of(either).model_executor.driver_worker.worker.model_runner
    for _ in range(2):
        engine.step()
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


def test_a_step_is_no_wider_than_it_gives_tokens(
    reuse: Any, plain: Given, sampling: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM makes a list of every column."""
    from spec_rollout.engines.vllm.compat.v2.sampler import ReuseRejectionSampler

    widths: list[tuple[int, int]] = []
    original = ReuseRejectionSampler.__call__

    def call(self: Any, logits: Any, input_batch: Any, *args: Any, **kw: Any) -> Any:
        output = original(self, logits, input_batch, *args, **kw)
        planned = int(input_batch.num_draft_tokens_per_req.max())
        widths.append((output.sampled_token_ids.shape[1], planned + 1))
        return output

    monkeypatch.setattr(ReuseRejectionSampler, "__call__", call)
    draft = plain.tokens[0][:4]
    given = generate(reuse, PROMPTS[:2], [drafted(sampling[0], draft), sampling[1]])
    assert given.tokens == plain.tokens[:2]
    assert widths == [(4, 4)]


def test_a_scheduler_of_somebody_else_is_refused(model_dir: Any) -> None:
    """With asynchronous scheduling, where it would plan all that can be proposed for everybody."""
    from v2_samples import LLM_ARGS
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    from spec_rollout.engines.vllm import engine_args
    from spec_rollout.engines.vllm.compat.v2.config import SCHEDULER
    from spec_rollout.engines.vllm.compat.v2.scheduler import ReuseScheduler

    class Derived(ReuseScheduler):
        pass

    def chosen(scheduler: Any, is_async: bool = True) -> Any:
        args = {**LLM_ARGS, **engine_args(8), "async_scheduling": is_async}
        config = EngineArgs(str(model_dir), **args, scheduler_cls=scheduler).create_engine_config()
        return config.scheduler_config.scheduler_cls

    assert chosen(None) == chosen(SCHEDULER) == SCHEDULER
    assert chosen(Derived) is Derived
    theirs = f"{AsyncScheduler.__module__}.{AsyncScheduler.__qualname__}"
    for scheduler in (theirs, AsyncScheduler):
        with pytest.raises(ValueError, match="scheduler_cls: expected None or a subclass of"):
            chosen(scheduler)
    theirs = "vllm.v1.core.sched.scheduler.Scheduler"
    assert chosen(theirs, is_async=False) == theirs
