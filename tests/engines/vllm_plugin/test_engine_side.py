"""Engines that a user builds without any of our arguments, with SPEC_ROLLOUT set."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from laws import assert_law
from vllm_samples import EOS, LLM_ARGS, VOCAB, random_prompts

pytestmark = pytest.mark.slow

MakeLLM = Callable[..., Any]


@pytest.fixture(scope="module")
def make_llm(model_dir: Path) -> Iterator[MakeLLM]:
    """`make_llm(variable, **llm_args)`: an `LLM` as users build it; equal arguments share one."""
    from vllm import LLM

    made: dict[str, Any] = {}

    def make(variable: str, **llm_args: Any) -> Any:
        name = repr((variable, sorted(llm_args.items())))
        if name not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("SPEC_ROLLOUT", variable)
                made[name] = LLM(
                    str(model_dir), **{**LLM_ARGS, "skip_tokenizer_init": True, **llm_args}
                )
        llm = made[name]
        if variable != "off":
            llm.collective_rpc("spec_rollout_history", args=("clear",))
        llm.reset_prefix_cache()
        return llm

    yield make
    made.clear()


def prompts_of(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": p.tolist()} for p in random_prompts(count, seed)]


def generate(llm: Any, prompts: list[Any], **params: Any) -> list[list[int]]:
    """Token ids of every response; `each` gives a request parameters of its own."""
    from vllm import SamplingParams

    each = params.pop("each", None)
    values = {"max_tokens": 40, "temperature": 0.7, "detokenize": False, "stop_token_ids": [EOS]}
    made = [
        SamplingParams(**{**values, **params, **(each(i) if each else {})})
        for i in range(len(prompts))
    ]
    outputs = llm.generate(prompts, made, use_tqdm=False)
    return [list(choice.token_ids) for output in outputs for choice in output.outputs]


def info(llm: Any) -> dict[str, Any]:
    return llm.collective_rpc("spec_rollout_history")[0]


def metrics(llm: Any) -> dict[str, Any]:
    """Counters since the last call."""
    return llm.collective_rpc("spec_rollout_metrics", args=(True,))[0]


def same_weights_again(llm: Any) -> None:
    """A weight update as a trainer makes it, with the weights that are there."""

    def load(worker: Any) -> None:
        model = worker.model_runner.get_model()
        model.load_weights(())

    llm.collective_rpc(load)


def test_the_variable_is_all_it_takes(make_llm: MakeLLM) -> None:
    config = make_llm("drafting").llm_engine.vllm_config
    assert config.speculative_config.method == "custom_class"
    assert config.speculative_config.num_speculative_tokens == 15
    assert config.additional_config["spec_rollout"] == {"mode": "drafting"}
    assert make_llm("off").llm_engine.vllm_config.speculative_config is None


def test_a_worker_with_peers_knows_of_them(model_dir: Path, make_llm: MakeLLM) -> None:
    from spec_rollout.engines.vllm.proposer import ReuseProposer

    config = copy.copy(make_llm("drafting").llm_engine.vllm_config)
    for ranks in (1, 2):
        config.parallel_config = copy.copy(config.parallel_config)
        config.parallel_config.tensor_parallel_size = ranks
        config.parallel_config.world_size = ranks
        live = ReuseProposer(config).live
        assert live is not None
        assert live.side.has_peers is (ranks > 1)


def test_a_server_without_a_seed_has_noise_of_its_own(model_dir: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    from spec_rollout.engines.vllm.compat import noise_salt

    def salt(seed: int, context: UsageContext = UsageContext.OPENAI_API_SERVER) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SPEC_ROLLOUT", "drafting")
            args = {**LLM_ARGS, "skip_tokenizer_init": True, "seed": seed}
            config = EngineArgs(str(model_dir), **args).create_engine_config(context)
        return noise_salt(pickle.loads(pickle.dumps(config)))  # as workers get it

    assert len({salt(0), salt(0), salt(0, UsageContext.ENGINE_CONTEXT), 0}) == 4
    assert salt(7) == salt(0, UsageContext.LLM_CLASS) == 0


def test_replicas_of_an_engine_draw_with_noise_of_their_own(make_llm: MakeLLM) -> None:
    """As `--data-parallel-size` makes them of a model without experts, from one config."""
    from vllm import SamplingParams

    from spec_rollout.engines.vllm.proposer import ReuseProposer
    from spec_rollout.engines.vllm.worker.engine_side import Arrival

    def key(index: int) -> int:
        config = copy.copy(make_llm("drafting").llm_engine.vllm_config)
        config.parallel_config = parallel = copy.copy(config.parallel_config)
        parallel.data_parallel_size = 2
        parallel.data_parallel_index = index
        parallel.reconfigure_for_independent_dp_rank()
        assert parallel.data_parallel_rank == 0
        live = ReuseProposer(config).live
        assert live is not None
        served = live.side.admit(Arrival([5, 6], SamplingParams(), "", None))
        assert served is not None
        return served.request.key

    assert key(0) == key(0) != key(1)


def test_greedy_tokens_are_stocks_in_fewer_steps(make_llm: MakeLLM, even_steps: None) -> None:
    prompts = prompts_of(8)
    expected = generate(make_llm("off"), prompts, temperature=0.0)
    llm = make_llm("drafting")
    metrics(llm)
    assert generate(llm, prompts, temperature=0.0) == expected
    first = metrics(llm)["num_engine_steps"]
    assert generate(llm, prompts, temperature=0.0) == expected
    second = metrics(llm)
    assert second["num_engine_steps"] <= 6 < first
    assert second["num_fully_reused"] == 8


def test_greedy_and_drawn_requests_side_by_side(make_llm: MakeLLM, even_steps: None) -> None:
    prompts = prompts_of(6)
    expected = generate(make_llm("off"), prompts, temperature=0.0)
    llm = make_llm("drafting")

    def mixed() -> list[list[int]]:
        each = {"each": lambda i: {"seed": i} if i % 2 else {"temperature": 0.0}}
        return generate(llm, prompts, **each)

    first = mixed()
    assert first[::2] == expected[::2]
    metrics(llm)
    for _ in range(4):
        assert mixed() == first
    found = metrics(llm)
    assert found["num_accepted_proposals"] > 0
    assert found["num_fully_reused"] > 0


def test_seeded_requests_repeat_exactly_whatever_is_remembered(
    make_llm: MakeLLM, even_steps: None
) -> None:
    llm = make_llm("drafting")
    prompts = [prompt for prompt in prompts_of(4) for _ in range(3)]
    seeds = {"each": lambda i: {"seed": 100 + i}}
    first = generate(llm, prompts, **seeds)
    metrics(llm)
    assert generate(llm, prompts, **seeds) == first
    found = metrics(llm)
    assert found["num_accepted_proposals"] > 0
    assert found["num_engine_steps"] < max(map(len, first))
    fresh = generate(llm, prompts)
    assert fresh != first
    assert generate(llm, prompts) != fresh


def test_samples_follow_the_models_law_with_history_and_without(
    make_llm: MakeLLM, hf_model: Any, even_steps: None
) -> None:
    llm = make_llm("drafting")
    prompt = [11, 29, 5, 47, 8]
    with torch.no_grad():
        one = hf_model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
        rows = torch.tensor([[*prompt, token] for token in range(VOCAB)])
        two = hf_model(rows).logits[:, -1].double().softmax(-1)
    law = (one[:, None] * two).numpy().reshape(-1)
    stopped = np.arange(VOCAB) == EOS
    law = np.where(np.repeat(stopped, VOCAB), 0.0, law)
    law = np.concatenate([law, [float(one[EOS])]])  # a response that ends at once
    for _ in range(2):  # the second time the prompt's history is there
        rows_ = generate(llm, [{"prompt_token_ids": prompt}] * 4000, temperature=1.0, max_tokens=3)
        counts = np.zeros(VOCAB * VOCAB + 1)
        for row in rows_:
            counts[-1 if row[0] == EOS else row[0] * VOCAB + row[1]] += 1
        assert_law(counts, law)
    assert metrics(llm)["num_accepted_proposals"] > 0


def test_responses_of_one_request_are_siblings_with_noise_of_their_own(make_llm: MakeLLM) -> None:
    llm = make_llm("drafting")
    rows = generate(llm, prompts_of(2), n=6)
    assert len({tuple(row) for row in rows}) == 12
    assert info(llm)["num_groups"] == 2


def test_what_we_cannot_serve_is_stocks_and_counted(make_llm: MakeLLM) -> None:
    prompts = prompts_of(4)
    params = {"temperature": 0.0, "repetition_penalty": 1.3}
    expected = generate(make_llm("off"), prompts, **params)
    llm = make_llm("drafting")
    before = info(llm)["num_passed_by"]
    assert generate(llm, prompts, **params) == expected
    assert info(llm)["num_passed_by"] == before + 4
    # Side by side with requests that are served.
    mixed = generate(
        llm,
        prompts,
        each=lambda i: {"temperature": 0.0, "repetition_penalty": 1.3 if i % 2 else 1.0},
    )
    plain = generate(make_llm("off"), prompts, temperature=0.0)
    assert mixed == [expected[i] if i % 2 else plain[i] for i in range(4)]


def test_log_probs_are_those_of_stock(make_llm: MakeLLM, even_steps: None) -> None:
    from vllm import SamplingParams

    prompts = prompts_of(3)
    params = SamplingParams(temperature=0.0, max_tokens=20, logprobs=2, detokenize=False)
    stock, llm = make_llm("off"), make_llm("drafting")
    expected = stock.generate(prompts, params, use_tqdm=False)
    for _ in range(2):
        found = llm.generate(prompts, params, use_tqdm=False)
        for a, b in zip(expected, found, strict=True):
            assert a.outputs[0].token_ids == b.outputs[0].token_ids
            for at, bt in zip(a.outputs[0].logprobs, b.outputs[0].logprobs, strict=True):
                assert at.keys() == bt.keys()
                for token in at:
                    assert at[token].logprob == pytest.approx(bt[token].logprob, abs=1e-4)


def test_log_probs_of_named_tokens_beside_requests_that_are_served(make_llm: MakeLLM) -> None:
    """vLLM draws for those that name tokens, and counts these apart from `logprobs`."""
    from vllm import SamplingParams

    llm, named, prompts = make_llm("drafting"), [3, 5, 7, 9], prompts_of(2)

    def ask(wanted: dict[int, dict[str, Any]]) -> list[Any]:
        values = {"temperature": 0.0, "max_tokens": 12, "detokenize": False}
        params = [SamplingParams(**values, **one) for one in wanted.values()]
        outputs = llm.generate([prompts[i] for i in wanted], params, use_tqdm=False)
        return [output.outputs[0] for output in outputs]

    def assert_same(found: Any, expected: Any) -> None:
        assert found.token_ids == expected.token_ids
        for at, bt in zip(found.logprobs, expected.logprobs, strict=True):
            assert at.keys() == bt.keys()
            for token in at:
                assert at[token].logprob == pytest.approx(bt[token].logprob, abs=1e-4)

    theirs = {"logprob_token_ids": named}
    alone = ask({0: theirs})[0]
    assert all(set(named) <= at.keys() for at in alone.logprobs)
    for number in (None, 0, 2, 6):  # fewer than there are named tokens, and more
        ours = {"logprobs": number}
        served = ask({1: ours})[0]
        both = ask({0: theirs, 1: ours})
        assert_same(both[0], alone)
        if number is None:
            assert both[1].logprobs is None
        else:
            assert_same(both[1], served)


def test_aborted_requests_leave_and_the_others_go_on(make_llm: MakeLLM) -> None:
    from vllm import SamplingParams

    llm = make_llm("drafting")
    engine = llm.llm_engine
    params = SamplingParams(temperature=0.7, max_tokens=30, detokenize=False, ignore_eos=True)
    for i, prompt in enumerate(prompts_of(4)):
        engine.add_request(f"abort-{i}", prompt, params)
    for _ in range(5):
        engine.step()
    engine.abort_request(["abort-0", "abort-1"])
    done = []
    while engine.has_unfinished_requests():
        done += [output for output in engine.step() if output.finished]
    assert sorted(output.request_id for output in done) == ["abort-2", "abort-3"]
    assert all(len(output.outputs[0].token_ids) == 30 for output in done)
    generate(llm, prompts_of(1, seed=9))
    assert info(llm)["num_live"] == 1  # the last one, until the next step
    assert info(llm)["num_groups"] == 5


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_lack_of_room_changes_no_token(
    make_llm: MakeLLM, even_steps: None, prefix_caching: bool
) -> None:
    """Requests are preempted and prompts computed in chunks; proposals go on."""
    # Longer than a step has room for.
    prompts = [
        {"prompt_token_ids": 3 * prompt["prompt_token_ids"]} for prompt in prompts_of(12, seed=2)
    ]
    seeds = {"max_tokens": 60, "each": lambda i: {"seed": i}}
    expected = generate(make_llm("drafting"), prompts, **seeds)
    llm = make_llm(
        "drafting",
        num_gpu_blocks_override=14,
        max_num_batched_tokens=48,
        max_model_len=160,
        enable_prefix_caching=prefix_caching,
    )
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    preempt, count = scheduler._preempt_request, []

    def counting(*args: Any, **kw: Any) -> Any:
        count.append(None)
        return preempt(*args, **kw)

    scheduler._preempt_request = counting
    try:
        metrics(llm)
        for _ in range(3):
            assert generate(llm, prompts, **seeds) == expected
    finally:
        scheduler._preempt_request = preempt
    assert len(count) >= 3
    assert metrics(llm)["num_accepted_proposals"] > 50
    generate(llm, prompts_of(1, seed=5))  # lets go of them
    assert info(llm)["num_live"] <= 1


def test_history_is_kept_apart_by_cache_salt(make_llm: MakeLLM) -> None:
    llm = make_llm("drafting")
    prompt = prompts_of(1, seed=77)[0]
    for salt in ("a", "b", "a"):
        generate(llm, [{**prompt, "cache_salt": salt}])
    generate(llm, [prompt])
    assert info(llm)["num_groups"] == 3


def test_history_is_written_read_and_forgotten(
    make_llm: MakeLLM, even_steps: None, tmp_path: Path
) -> None:
    llm = make_llm("drafting")
    prompts = prompts_of(4)
    expected = generate(llm, prompts, temperature=0.0)
    # They end together, and the worker hears of that in the next step.
    path = str(tmp_path / "history")
    llm.collective_rpc("spec_rollout_history", args=("export", path))
    llm.collective_rpc("spec_rollout_history", args=("clear",))
    assert info(llm)["num_sequences"] == 0
    generate(llm, prompts_of(1, seed=5))
    assert info(llm)["num_groups"] <= 1  # nothing but these
    llm.collective_rpc("spec_rollout_history", args=("clear",))
    llm.collective_rpc("spec_rollout_history", args=("import", path))
    assert info(llm)["num_sequences"] >= 4
    metrics(llm)
    assert generate(llm, prompts, temperature=0.0) == expected
    found = metrics(llm)
    assert found["num_fully_reused"] == 4
    assert found["num_engine_steps"] <= 6
    for args, message in (
        (("remove",), "action: expected info, clear, export or import, got 'remove'"),
        (("export",), "path: expected one with export and import only, got None"),
        (("import", str(tmp_path / "none")), "none"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            llm.collective_rpc("spec_rollout_history", args=args)


@pytest.mark.parametrize("asks", [True, False])
def test_what_is_remembered_is_what_was_generated(
    make_llm: MakeLLM,
    even_steps: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    asks: bool,
) -> None:
    """Tokens and log-probs, which a lenient test needs as they were; told the drafter at once, or
    late where it is not asked for proposals."""
    from vllm import SamplingParams

    from spec_rollout.drafting import Payoff, history_file
    from spec_rollout.engines.vllm.worker.late_tokens import LateTokens

    late = []
    take = LateTokens.take
    monkeypatch.setattr(LateTokens, "take", lambda self: late.append(len(self)) or take(self))
    if not asks:
        monkeypatch.setattr(Payoff, "pays", lambda self, rows: False)
    llm = make_llm('{"mode": "coupled", "identity": "arrival"}')
    same_weights_again(llm)
    # Of different lengths, so that some leave while others go on.
    params = [
        SamplingParams(
            max_tokens=5 + 9 * i, temperature=1.0, logprobs=0, detokenize=False, ignore_eos=True
        )
        for i in range(8)
    ]
    outputs = llm.generate([p for p in prompts_of(2) for _ in range(4)], params, use_tqdm=False)
    generate(llm, prompts_of(1, seed=5))  # lets go of them
    path = str(tmp_path / "history")
    llm.collective_rpc("spec_rollout_history", args=("export", path))
    rows = history_file.read(path)
    ends = rows.cu_lens.tolist()
    found = {
        tuple(rows.token_ids[begin:end].tolist()): rows.logprobs[begin:end]
        for begin, end in itertools.pairwise(ends)
    }
    for output in outputs:
        choice = output.outputs[0]
        ids = tuple(choice.token_ids)
        logprobs = [step[token].logprob for step, token in zip(choice.logprobs, ids, strict=True)]
        np.testing.assert_allclose(found[ids], logprobs, rtol=0.0, atol=2e-6)
    assert (max(late, default=0) > 8) == (not asks)


def test_coupled_arrivals_redraw_their_last_rollout(make_llm: MakeLLM, even_steps: None) -> None:
    llm = make_llm('{"mode": "coupled", "identity": "arrival"}')
    prompts = [prompt for prompt in prompts_of(3) for _ in range(4)]
    same_weights_again(llm)
    first = generate(llm, prompts, temperature=1.0)
    assert len({tuple(row) for row in first}) == len(first)
    same_weights_again(llm)
    metrics(llm)
    before = info(llm)["num_with_draft"]
    assert generate(llm, prompts, temperature=1.0) == first
    found = metrics(llm)
    assert found["num_engine_steps"] < 0.3 * max(map(len, first))
    assert found["num_fully_reused"] > 0
    assert info(llm)["num_with_draft"] == before + len(prompts)
    # Further samples of the same weights are others.
    more = generate(llm, prompts, temperature=1.0)
    assert not {tuple(row) for row in more} & {tuple(row) for row in first}


def test_a_named_sample_is_never_drawn_twice_with_the_same_noise(make_llm: MakeLLM) -> None:
    llm = make_llm('{"mode": "coupled"}')
    prompt = prompts_of(1)[0]

    def ask(**name: Any) -> list[int]:
        return generate(
            llm, [prompt], temperature=1.0, extra_args={"spec_rollout": {"sample": 2, **name}}
        )[0]

    first = ask()
    repeated = info(llm)["num_repeated"]
    assert ask() != first
    assert info(llm)["num_repeated"] == repeated + 1
    same_weights_again(llm)
    assert ask() == first
    same_weights_again(llm)
    assert ask(epoch=1) != first


def test_an_adapter_that_comes_anew_is_a_change_of_weights(make_llm: MakeLLM) -> None:
    """As trainers of adapters send theirs, under one number; what vLLM does with it is left out."""
    llm = make_llm('{"mode": "coupled"}')
    prompt = prompts_of(1)[0]

    def ask() -> list[int]:
        sample = {"spec_rollout": {"sample": 5}}
        return generate(llm, [prompt], temperature=1.0, extra_args=sample)[0]

    def add_adapter(worker: Any) -> bool:
        class Manager:
            def add_adapter(self, request: Any) -> bool:
                return True

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(worker.model_runner, "lora_manager", Manager(), raising=False)
            return worker.add_lora(None)

    first = ask()
    before = info(llm)
    assert llm.collective_rpc(add_adapter) == [True]
    assert ask() == first
    after = info(llm)
    assert after["num_repeated"] == before["num_repeated"]
    assert after["num_with_draft"] == before["num_with_draft"] + 1


def test_lenient_reuses_by_its_rule(make_llm: MakeLLM, even_steps: None) -> None:
    llm = make_llm('{"mode": "lenient", "log_lenience": 20.0}')
    prompts = [prompt for prompt in prompts_of(3) for _ in range(2)]
    names = {"each": lambda i: {"extra_args": {"spec_rollout": {"sample": i % 2}}}}
    first = generate(llm, prompts, temperature=1.0, **names)
    same_weights_again(llm)
    metrics(llm)
    assert generate(llm, prompts, temperature=1.0, **names) == first
    assert metrics(llm)["num_fully_reused"] == len(prompts)


def test_engines_draft_from_what_others_of_their_folder_finished(
    make_llm: MakeLLM, even_steps: None, tmp_path: Path
) -> None:
    variable = json.dumps({"mode": "coupled", "share": str(tmp_path)})
    one, other = (make_llm(variable, seed=seed) for seed in (0, 1))
    prompts = [prompt for prompt in prompts_of(3) for _ in range(4)]
    each = [
        lambda i: {"temperature": 0.0},
        lambda i: {"extra_args": {"spec_rollout": {"sample": i % 4}}},
    ]
    expected = [generate(one, prompts, each=one_each) for one_each in each]
    # Offline, the last ones are let go of when something else begins.
    generate(one, prompts[:1], max_tokens=1, repetition_penalty=1.1)
    for _ in range(1000):
        if info(other)["num_received"] == 2 * len(prompts):
            break
        time.sleep(0.01)
    assert info(other)["num_received"] == info(one)["num_shared"] == 2 * len(prompts)
    for one_each, tokens in zip(each, expected, strict=True):
        metrics(other)
        before = info(other)["num_with_draft"]
        assert generate(other, prompts, each=one_each) == tokens
        assert info(other)["num_with_draft"] == before + len(prompts)
        assert metrics(other)["num_engine_steps"] < 0.3 * max(map(len, tokens))


def test_rollouts_of_another_vocabulary_are_refused(
    make_llm: MakeLLM, model_dir: Path, tmp_path: Path
) -> None:
    from spec_rollout.drafting import HistoryFolder, HistoryIdentity
    from spec_rollout.engines.vllm.proposer import ReuseProposer

    config = copy.copy(make_llm("drafting").llm_engine.vllm_config)
    config.additional_config = {"spec_rollout": {"mode": "drafting", "share": str(tmp_path)}}
    HistoryFolder(tmp_path, HistoryIdentity("another", "qwen3", VOCAB + 1, ""), 1 << 20)
    with pytest.raises(ValueError, match=f"{tmp_path}: expected rollouts of {model_dir} .*another"):
        ReuseProposer(config)


def test_wrong_names_fail_alone(make_llm: MakeLLM) -> None:
    prompt = prompts_of(1)[0]

    def ask(llm: Any, value: Any, **params: Any) -> None:
        generate(llm, [prompt], extra_args={"spec_rollout": value}, **params)

    coupled = make_llm('{"mode": "coupled"}')
    with pytest.raises(ValueError, match="sample: expected an integer"):
        ask(coupled, {"sample": "x"})
    with pytest.raises(ValueError, match="n: expected 1 for a request that names its sample"):
        ask(coupled, {"sample": 1}, n=2)
    with pytest.raises(ValueError, match="expected an engine"):
        ask(make_llm("off"), {"sample": 1})


def test_the_log_says_what_it_gains(make_llm: MakeLLM, even_steps: None) -> None:
    from vllm_samples import proposer_in

    llm = make_llm("drafting")

    class Engine:  # as `proposer_in` wants it
        pass

    Engine.llm = llm
    line = proposer_in(Engine).live._log_line
    written: list[str] = []
    seconds = iter(np.arange(0.0, 1e6, 10.0))
    line.clock, line._write, line._last = lambda: float(next(seconds)), written.append, 0.0
    for _ in range(2):
        generate(llm, prompts_of(4), temperature=0.0)
    assert written
    assert "tokens per request and step" in written[-1]
    assert "passed by" in written[-1]
    assert "4 prompts" in written[-1]


def test_weights_that_others_load_are_used(
    make_llm: MakeLLM, hf_model: Any, tmp_path: Path
) -> None:
    """A trainer's own transfer: parameter by parameter, through the model, without a word to us."""
    import copy

    from vllm import SamplingParams

    llm = make_llm("drafting", max_model_len=128)  # an engine of its own: its weights change
    new = copy.deepcopy(hf_model)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter += 0.02 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(1)
            )

    def load(worker: Any) -> None:
        model = worker.model_runner.get_model()
        for name, parameter in new.named_parameters():
            model.load_weights([(name, parameter)])

    llm.collective_rpc(load)
    llm.reset_prefix_cache()
    prompt = prompts_of(1)[0]["prompt_token_ids"]
    params = SamplingParams(max_tokens=8, temperature=1.0, logprobs=0, detokenize=False)
    output = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0].outputs[0]
    ids = list(output.token_ids)
    with torch.no_grad():
        expected = new(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    found = [at[token].logprob for at, token in zip(output.logprobs, ids, strict=True)]
    assert found == pytest.approx(
        expected.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist(), abs=2e-3
    )


def test_calls_of_our_engine_and_plain_requests_take_turns(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, even_steps: None
) -> None:
    """`VLLMEngine` on an engine that also remembers by itself."""
    from dataclasses import replace

    from vllm_samples import make_requests, rows_of

    from spec_rollout.acceptance import Coupled
    from spec_rollout.engines.vllm import VLLMEngine
    from spec_rollout.types import History, SamplingParams

    monkeypatch.setenv("SPEC_ROLLOUT", "drafting")
    engine = VLLMEngine(str(model_dir), llm_args={**LLM_ARGS, "max_model_len": 200})
    assert info(engine.llm)["mode"] == "drafting"
    prompts, sampling = random_prompts(6), SamplingParams(max_tokens=20, stop_token_ids=(EOS,))
    plain = engine.rollout(make_requests(prompts), sampling, Coupled())
    generate(engine.llm, prompts_of(3))
    again = engine.rollout(make_requests(prompts), sampling, Coupled())
    groups = torch.arange(6)
    past = History(plain.response_ids, plain.cu_response_lens, groups, groups)
    drafted = engine.rollout(replace(make_requests(prompts), history=past), sampling, Coupled())
    assert rows_of(plain) == rows_of(again) == rows_of(drafted)
    assert drafted.stats.num_accepted_proposals > 0
    greedy = generate(engine.llm, prompts_of(3), temperature=0.0)
    assert generate(engine.llm, prompts_of(3), temperature=0.0) == greedy
