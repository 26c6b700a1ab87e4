"""Engines on Model Runner V2 that propose by themselves: the tokens of stock vLLM, in fewer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_v2_cases as cases
import torch
from v2_samples import (
    EOS,
    LLM_ARGS,
    VOCAB,
    Given,
    assert_same,
    core_of,
    generate,
    metrics_of,
    params,
    random_prompts,
)

PROMPTS = [p for p in random_prompts([5, 17, 9], seed=7) for _ in range(2)]
EACH: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "top_k": 12},
    {"temperature": 0.0},
    {"temperature": 0.0},
    {"top_p": 0.8, "min_p": 0.02, "temperature": 0.9},
    {"temperature": 0.8, "repetition_penalty": 1.2, "presence_penalty": 0.3},
]


@pytest.fixture(scope="module")
def make(model_dir: Path) -> Iterator[Callable[..., Any]]:
    """`make(variable, **llm_args)`: an `LLM` as users build it, its history empty."""
    from vllm import LLM

    made: dict[str, Any] = {}

    def make_one(variable: str, **llm_args: Any) -> Any:
        name = repr((variable, sorted(llm_args.items())))
        if name not in made:
            args = {k: v for k, v in LLM_ARGS.items() if k != "async_scheduling"}
            args["logprobs_mode"] = "processed_logprobs"
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("SPEC_ROLLOUT", variable)
                made[name] = LLM(str(model_dir), **{**args, **llm_args})
        made[name].collective_rpc("spec_rollout_history", args=("clear",))
        metrics_of(made[name])
        return made[name]

    yield make_one
    made.clear()


def seeded(first: int, **kw: Any) -> list[Any]:
    return [params(first + i, max_tokens=16, **{**each, **kw}) for i, each in enumerate(EACH)]


def info(llm: Any) -> dict[str, Any]:
    return llm.collective_rpc("spec_rollout_history")[0]


@pytest.mark.parametrize("use_fp64", [False, True])
def test_the_drafter_knows_vllms_noise(use_fp64: bool) -> None:
    """Its noise has the largest value where vLLM's draw from equal logits ends up."""
    from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

    from spec_rollout._native import _C

    seeds = [0, 7, -1, 2**62 + 12345, -(2**63)]
    positions = [0, 1, 2, 77, 100_000, 2**31 + 5]
    rows = torch.arange(len(seeds)).repeat_interleave(len(positions)).int()
    drawn = gumbel_sample(
        torch.zeros(rows.numel(), VOCAB),
        rows,
        torch.ones(len(seeds)),
        torch.tensor(seeds),
        torch.tensor(positions * len(seeds)),
        apply_temperature=False,
        is_drafting=False,
        use_fp64=use_fp64,
    )
    ours = [
        int(np.argmax([_C.vllm_gumbel(seed, at, token, use_fp64) for token in range(VOCAB)]))
        for seed in seeds
        for at in positions
    ]
    assert drawn.tolist() == ours


def test_the_variable_puts_it_on_v2(make: Callable[..., Any]) -> None:
    llm = make("drafting")
    config = llm.llm_engine.vllm_config
    assert config.speculative_config.method == "ngram_gpu"
    assert config.speculative_config.num_speculative_tokens == 15
    assert config.additional_config["spec_rollout"] == {"mode": "drafting", "model_runner": "v2"}
    runner = core_of(llm).model_executor.driver_worker.worker.model_runner
    assert type(runner.speculator).__name__ == "ReuseSpeculator"


def test_tests_of_a_group_that_is_spread_share_no_noise(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the replicas of an engine, as one config makes them, and over servers without a seed."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    from spec_rollout.engines.vllm.compat.v2.hooks import _proposals
    from spec_rollout.engines.vllm.wire import SampleName
    from spec_rollout.engines.vllm.worker.engine_side import Arrival
    from spec_rollout.engines.vllm.worker.v2.table import DraftTable

    monkeypatch.setenv("SPEC_ROLLOUT", "lenient")

    def key(context: UsageContext, index: int = 0) -> int:
        args = {k: v for k, v in LLM_ARGS.items() if k != "async_scheduling"}
        config = EngineArgs(str(model_dir), **args).create_engine_config(context)
        config.parallel_config.data_parallel_index = index
        table = DraftTable(8, 128, first_chunk=8, max_chunk=8, device=torch.device("cpu"))
        proposals = _proposals(config, table, 8)
        assert proposals is not None
        assert proposals.live is not None
        served = proposals.live.side.admit(Arrival([5, 6], params(None), "", SampleName(1)))
        assert served is not None
        return served.request.key

    offline, server = UsageContext.LLM_CLASS, UsageContext.OPENAI_API_SERVER
    assert key(offline) == key(offline) != key(offline, 1)
    assert len({key(offline), key(server), key(server)}) == 3


@pytest.mark.parametrize("mode", ["drafting", "coupled", "lenient"])
def test_a_samples_name_goes_before_a_seed(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """As on V1. A trainer that gives all samples of a prompt one seed would have one of them."""
    from vllm.engine.arg_utils import EngineArgs

    from spec_rollout.engines.vllm.compat.v2.hooks import _proposals
    from spec_rollout.engines.vllm.wire import SampleName
    from spec_rollout.engines.vllm.worker.engine_side import Arrival
    from spec_rollout.engines.vllm.worker.v2.table import DraftTable

    monkeypatch.setenv("SPEC_ROLLOUT", mode)
    args = {k: v for k, v in LLM_ARGS.items() if k != "async_scheduling"}
    config = EngineArgs(str(model_dir), **args).create_engine_config()
    table = DraftTable(8, 128, first_chunk=8, max_chunk=8, device=torch.device("cpu"))
    proposals = _proposals(config, table, 8)
    assert proposals is not None

    def seed(request_id: str, name: SampleName | None, seed: int | None = 7) -> int | None:
        proposals.arrive(request_id, Arrival([5, 6], params(seed), "", name))
        found = proposals.seed_of(request_id, max_response_len=9, stop_token_ids=frozenset())
        row = proposals._row_of[request_id]
        assert row is not None
        return None if found is None else {row.key: found}[found]

    assert seed("unnamed", None) is None  # its own
    named = [seed("a", SampleName(0)), seed("b", SampleName(1)), seed("again", SampleName(1))]
    if mode == "drafting":  # which knows no samples
        assert named == [None, None, None]
        return
    assert len({*named, None}) == 4
    # Of the name alone; where each draw is fresh, vLLM's own does for those without a seed.
    first = seed("c", SampleName(2), 8)
    assert proposals.live is not None
    proposals.over(["c"])
    proposals.live.side.weights_changed()
    assert seed("d", SampleName(2), None) == (first if mode == "coupled" else None)


def test_tokens_are_stocks_with_the_same_seeds(stock: Any, make: Callable[..., Any]) -> None:
    llm = make("drafting")
    steps = []
    for first in (100, 100, 300):
        expected = generate(stock, PROMPTS, seeded(first))
        assert_same(generate(llm, PROMPTS, seeded(first)), expected)
        metrics = metrics_of(llm)
        steps.append(metrics.num_engine_steps)
        if first == 300:
            assert metrics.num_accepted_proposals > 0
    # With the same seeds nearly all that is proposed passes; greedy requests follow a draft.
    assert steps[0] == 16
    assert steps[1] <= 8
    found = info(llm)
    assert found["num_served"] == 3 * len(PROMPTS)
    assert found["num_passed_by"] == 0
    assert found["num_with_draft"] > 0
    assert found["num_groups"] == 3


def ends(stock: Any) -> list[Any]:
    """Requests for PROMPTS[2] that end in every way, and one of several samples."""
    first = generate(stock, [PROMPTS[2]], [params(9, max_tokens=20)]).tokens[0]
    return [
        params(9, max_tokens=20, stop_token_ids=[first[6]]),
        params(9, max_tokens=20, stop_token_ids=[first[3]], min_tokens=8),
        params(9, max_tokens=9),
        params(9, max_tokens=20, ignore_eos=False, stop_token_ids=[EOS]),
        params(40, n=3, max_tokens=12),
    ]


def assert_ends_are_stocks(stock: Any, llm: Any) -> None:
    """In three passes, with proposals."""
    sampling = ends(stock)
    prompts = [PROMPTS[2]] * len(sampling)
    expected = generate(stock, prompts, sampling)
    for _ in range(3):
        assert_same(generate(llm, prompts, sampling), expected)
    assert metrics_of(llm).num_accepted_proposals > 20


def test_stops_min_tokens_and_several_samples(stock: Any, make: Callable[..., Any]) -> None:
    assert_ends_are_stocks(stock, make("drafting"))


@pytest.mark.v2_large
def test_cached_prompts_chunked_prefill_and_preemption(
    stock: Any, make: Callable[..., Any]
) -> None:
    llm = make("drafting", **cases.ARGS)
    counts = {"padded": 0, "preempted": 0}
    cases.watched(llm, counts)
    sampling = [params(7 + i, max_tokens=cases.TOKENS) for i in range(len(cases.PROMPTS))]
    expected = generate(stock, cases.PROMPTS, sampling)
    for _ in range(2):
        assert_same(generate(llm, cases.PROMPTS, sampling), expected)
    assert counts["padded"] > 0
    assert counts["preempted"] > 0
    assert metrics_of(llm).num_accepted_proposals > 20


def abort_after(llm: Any, num_steps: int, prompts: list[list[int]], sampling: list[Any]) -> None:
    """Begins requests, and aborts them."""
    engine = llm.llm_engine
    for i, prompt in enumerate(prompts):
        engine.add_request(f"abort-{i}", {"prompt_token_ids": prompt}, sampling[i])
    for _ in range(num_steps):
        engine.step()
    engine.abort_request([f"abort-{i}" for i in range(len(prompts))], internal=False)
    while engine.has_unfinished_requests():
        engine.step()
    metrics_of(llm)


@pytest.mark.v2_large
def test_aborted_requests_leave_what_they_generated(stock: Any, make: Callable[..., Any]) -> None:
    llm, sampling = make("drafting"), seeded(400)
    abort_after(llm, 8, PROMPTS, sampling)
    assert_same(generate(llm, PROMPTS, sampling), generate(stock, PROMPTS, sampling))
    assert metrics_of(llm).num_accepted_proposals > 10
    assert info(llm)["num_live"] <= len(PROMPTS)


def test_a_request_without_a_seed_is_served(make: Callable[..., Any]) -> None:
    llm = make("drafting")
    rows = [generate(llm, PROMPTS, [params(None)] * len(PROMPTS)).tokens for _ in range(2)]
    assert rows[0] != rows[1]
    assert len({tuple(row) for row in rows[0] + rows[1]}) == 2 * len(PROMPTS)
    metrics = metrics_of(llm)
    assert metrics.num_proposed_tokens > 0


def named(llm: Any, epoch: int) -> Given:
    """Two samples of each prompt, after which the weights change."""
    sampling = [params(None, max_tokens=16) for _ in PROMPTS]
    for i, p in enumerate(sampling):
        p.extra_args = {"spec_rollout": {"sample": i % 2, "epoch": epoch}}
    metrics_of(llm)
    given = generate(llm, PROMPTS, sampling)
    llm.collective_rpc(lambda worker: worker.model_runner.get_model().load_weights(()))
    return given


@pytest.mark.v2_large
def test_coupled_draws_a_sample_with_its_own_noise(make: Callable[..., Any]) -> None:
    llm = make("coupled")
    first, again = named(llm, 0), named(llm, 0)
    assert_same(again, first)
    metrics = metrics_of(llm)
    assert metrics.num_drafts == len(PROMPTS)
    assert metrics.num_engine_steps <= 8
    assert named(llm, 1).tokens != first.tokens
    # Counted with the next requests, whose first step says that these are over.
    metrics = metrics_of(llm)
    assert metrics.num_fully_reused == len(PROMPTS)
    assert metrics.num_accepted_tokens == len(PROMPTS) * 16
    assert info(llm)["num_named"] == 3 * len(PROMPTS)


@pytest.mark.v2_large
def test_lenient_takes_the_last_rollout_whole(make: Callable[..., Any]) -> None:
    llm = make('{"mode": "lenient", "log_lenience": 50}')

    def named() -> Given:
        sampling = [params(None, max_tokens=16) for _ in PROMPTS]
        for i, p in enumerate(sampling):
            p.extra_args = {"spec_rollout": i % 2}
        given = generate(llm, PROMPTS, sampling)
        llm.collective_rpc(lambda worker: worker.model_runner.get_model().load_weights(()))
        return given

    first = named()
    metrics_of(llm)
    assert_same(named(), first)
    metrics = metrics_of(llm)
    assert metrics.num_drafts == metrics.num_fully_reused == len(PROMPTS)
    assert metrics.num_draft_tokens == metrics.num_accepted_tokens == len(PROMPTS) * 16


LAGGED = '{"mode": "drafting", "lagged_tokens": 4}'


@pytest.mark.v2_large
def test_lagged_proposals_keep_asynchronous_scheduling(
    stock: Any, make: Callable[..., Any]
) -> None:
    llm = make(LAGGED)
    assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling
    assert type(core_of(llm).scheduler).__name__ == "ReuseScheduler"
    steps = []
    for first in (100, 100, 300):
        expected = generate(stock, PROMPTS, seeded(first))
        metrics_of(llm)
        assert_same(generate(llm, PROMPTS, seeded(first)), expected)
        metrics = metrics_of(llm)
        steps.append(metrics.num_engine_steps)
        assert metrics.num_accepted_proposals <= metrics.num_proposed_tokens
        if first == 100:
            accepted = metrics.num_accepted_proposals
    # Five tokens a step where all is known, but for the first, of which nothing is.
    assert steps[0] <= 17
    assert steps[1] <= 12
    assert accepted > 15
    assert info(llm)["num_served"] == 3 * len(PROMPTS)


@pytest.mark.v2_large
def test_lagged_stops_min_tokens_and_several_samples(stock: Any, make: Callable[..., Any]) -> None:
    assert_ends_are_stocks(stock, make(LAGGED))


@pytest.mark.v2_large
def test_lagged_preemption_and_aborts(stock: Any, make: Callable[..., Any]) -> None:
    llm = make(LAGGED, **cases.ARGS)
    counts = {"padded": 0, "preempted": 0}
    cases.watched(llm, counts)
    sampling = [params(7 + i, max_tokens=cases.TOKENS) for i in range(len(cases.PROMPTS))]
    expected = generate(stock, cases.PROMPTS, sampling)
    for _ in range(2):
        abort_after(llm, 8, cases.PROMPTS, sampling)
        assert_same(generate(llm, cases.PROMPTS, sampling), expected)
    assert counts["preempted"] > 0
    assert metrics_of(llm).num_accepted_proposals > 20
    assert info(llm)["num_live"] <= len(cases.PROMPTS)


@pytest.mark.v2_large
def test_lagged_samples_are_drawn_with_their_own_noise(make: Callable[..., Any]) -> None:
    llm = make('{"mode": "coupled", "lagged_tokens": 4}')
    first, again = named(llm, 0), named(llm, 0)
    assert_same(again, first)
    # Of 16 tokens of each, the last ones too, which no step after them told of.
    metrics = metrics_of(llm)
    assert metrics.num_draft_tokens == 16 * len(PROMPTS)
    assert metrics.num_engine_steps <= 9
    assert named(llm, 1).tokens != first.tokens


@pytest.mark.parametrize(
    ("runner", "args", "message"),
    [
        (
            "0",
            {"async_scheduling": None},
            "lagged_tokens: expected Model Runner V2 with it, got V1",
        ),
        ("1", {}, "lagged_tokens: expected an engine with async_scheduling, got False"),
    ],
)
def test_engines_that_cannot_lag(
    model_dir: Path, runner: str, args: dict[str, Any], message: str
) -> None:
    from vllm import LLM

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPEC_ROLLOUT", LAGGED)
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
        with pytest.raises(ValueError, match=message):
            LLM(str(model_dir), **{**LLM_ARGS, **args})


def test_asynchronous_scheduling_is_refused(model_dir: Path) -> None:
    from vllm import LLM

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPEC_ROLLOUT", "drafting")
        with pytest.raises(ValueError, match="expected an engine without async_scheduling"):
            LLM(str(model_dir), **{**LLM_ARGS, "async_scheduling": True})
