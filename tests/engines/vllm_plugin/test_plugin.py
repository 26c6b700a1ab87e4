"""The plugin for people who run vLLM themselves.

Stock requests stay untouched, parameters are honoured, errors stay alone.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm_samples import (
    EOS,
    LLM_ARGS,
    VOCAB,
    make_requests,
    mixed_drafts,
    pack_drafts,
    random_prompts,
    rows_of,
)

from spec_rollout.acceptance import Coupled, Lenient, OneHot
from spec_rollout.engines.vllm.wire import ReuseRequest, encode, extra_args
from spec_rollout.engines.vllm.worker import ReuseWorker
from spec_rollout.types import SamplingParams as RolloutSampling

PROMPTS = random_prompts(12, seed=21)


def tokenizer_files(folder: Path) -> None:
    """One character per token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>"]
    chars = [chr(ord("0") + i) for i in range(VOCAB - len(special))]
    tokenizer = Tokenizer(
        models.WordLevel({t: i for i, t in enumerate(special + chars)}, unk_token="0")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>"
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def text_model_dir(model_dir: Path) -> Path:
    tokenizer_files(model_dir)
    return model_dir


@pytest.fixture(scope="module")
def stock(text_model_dir: Path) -> Any:
    from vllm import LLM

    return LLM(str(text_model_dir), **LLM_ARGS)


@pytest.fixture(scope="module")
def plugged(text_model_dir: Path) -> Any:
    from vllm import LLM

    from spec_rollout.engines.vllm import engine_args

    return LLM(str(text_model_dir), **LLM_ARGS, **engine_args(8))


def generate(llm: Any, params: Any, prompts: Any = PROMPTS) -> list[Any]:
    inputs = [{"prompt_token_ids": p.tolist()} for p in prompts]
    return [o.outputs[0] for o in llm.generate(inputs, params, use_tqdm=False)]


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [list(o.token_ids) for o in outputs]


def keyed(key: int, draft: Any = (), rule: Any = None) -> dict[str, Any]:
    rule = Coupled() if rule is None else rule
    draft = np.asarray(draft, np.int32)
    logprobs = np.zeros(draft.size, np.float32) if rule.needs_draft_logprobs else None
    return extra_args(ReuseRequest(key, rule, draft, logprobs))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0, "logprobs": 2},
        {"temperature": 1.0, "logprobs": 0},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
        {"temperature": 1.0, "min_p": 0.05, "logit_bias": {7: 2.0}},
        {"temperature": 1.0, "presence_penalty": 1.0, "repetition_penalty": 1.2},
        {"temperature": 1.0, "min_tokens": 10, "bad_words": ["A"]},
        {"temperature": 1.0, "allowed_token_ids": list(range(2, 30))},
    ],
    ids=lambda o: "-".join(o),
)
def test_request_without_key_is_as_in_stock_vllm(stock: Any, plugged: Any, options: Any) -> None:
    from vllm import SamplingParams

    params = [SamplingParams(max_tokens=30, seed=100 + i, **options) for i in range(len(PROMPTS))]
    expected, found = generate(stock, params), generate(plugged, params)
    assert tokens(found) == tokens(expected)
    assert [o.text for o in found] == [o.text for o in expected]
    if "logprobs" in options:
        for a, b in zip(found, expected, strict=True):
            assert [{t: lp.rank for t, lp in d.items()} for d in a.logprobs] == [
                {t: lp.rank for t, lp in d.items()} for d in b.logprobs
            ]


def test_a_thinking_budget_is_its_requests_own(text_model_dir: Path) -> None:
    """It ends that request's thinking and nobody else's, beside drafts and without any."""
    from vllm import LLM, SamplingParams
    from vllm.config.reasoning import ReasoningConfig

    from spec_rollout.engines.vllm import engine_args

    start, end = 20, 21

    def make(**args: Any) -> Any:
        reasoning = ReasoningConfig(reasoning_start_str="A", reasoning_end_str="B")
        return LLM(str(text_model_dir), **LLM_ARGS, reasoning_config=reasoning, **args)

    # Nobody begins or ends to think by themselves.
    options: dict[str, Any] = {"max_tokens": 20, "logit_bias": {start: -100.0, end: -100.0}}
    # A token more than a block, so that all but the last is cached when they come again.
    prompts = [np.append(np.resize(p, 32), start).astype(np.int32) for p in PROMPTS]
    budgets = [None, 5, None, 0, None, 1] * 2
    params = [
        SamplingParams(seed=i, ignore_eos=True, thinking_token_budget=budget, **options)
        for i, budget in enumerate(budgets)
    ]
    expected = tokens(generate(make(), params, prompts))
    for row, budget in zip(expected, budgets, strict=True):
        assert [i for i, token in enumerate(row) if token == end] == [budget] * (budget is not None)
    plugged = make(**engine_args(8))
    for _ in range(2):  # the second time vLLM makes up drafts for each
        assert tokens(generate(plugged, params, prompts)) == expected
    drafts = [row if budget is None else [] for row, budget in zip(expected, budgets, strict=True)]
    mixed = [
        own
        if budget is not None
        else SamplingParams(
            extra_args=keyed(i, draft, Lenient(float("inf"))), ignore_eos=True, **options
        )
        for i, (own, budget, draft) in enumerate(zip(params, budgets, drafts, strict=True))
    ]
    # Nor is a budget counted down by drafts, which vLLM makes up for a request that was preempted.
    told = []
    worker = plugged.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    worker.model_runner.sampler.register_forward_pre_hook(
        lambda module, args, kw: told.append(any(kw["sampling_metadata"].spec_token_ids)),
        with_kwargs=True,
    )
    assert tokens(generate(plugged, mixed, prompts)) == expected
    assert told
    assert not any(told)


def test_stock_and_keyed_requests_in_one_batch(stock: Any, plugged: Any) -> None:
    from vllm import SamplingParams

    options: dict[str, Any] = {"max_tokens": 30, "temperature": 1.0, "logprobs": 1}
    alone = [SamplingParams(seed=i, **options) for i in range(len(PROMPTS))]
    expected_stock = generate(stock, alone)
    with_key = [SamplingParams(extra_args=keyed(i), **options) for i in range(len(PROMPTS))]
    expected_keyed = generate(plugged, with_key)
    drafts = tokens(expected_keyed)
    rules = [Coupled(), Lenient(float("inf")), Coupled()]
    mixed = [
        alone[i]
        if i % 2
        else SamplingParams(extra_args=keyed(i, drafts[i], rules[i % 3]), **options)
        for i in range(len(PROMPTS))
    ]
    found = generate(plugged, mixed)
    for i, output in enumerate(found):
        expected = (expected_stock if i % 2 else expected_keyed)[i]
        assert list(output.token_ids) == list(expected.token_ids)
        for a, b in zip(output.logprobs, expected.logprobs, strict=True):
            assert {t: lp.rank for t, lp in a.items()} == {t: lp.rank for t, lp in b.items()}
            assert all(abs(lp.logprob - b[t].logprob) < 1e-4 for t, lp in a.items())


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7, "min_p": 0.2},
        {"temperature": 1.0, "min_tokens": 25},
        {"temperature": 1.0, "logit_bias": {9: 3.0, EOS: -100.0}},
        {"temperature": 1.0, "allowed_token_ids": list(range(2, 20)), "top_k": 10},
    ],
    ids=lambda o: "-".join(o),
)
def test_restrictions_hold_with_and_without_a_draft(plugged: Any, options: Any) -> None:
    from vllm import SamplingParams

    def run(drafts: Any) -> list[Any]:
        return generate(
            plugged,
            [
                SamplingParams(max_tokens=30, logprobs=0, extra_args=keyed(i, d), **options)
                for i, d in enumerate(drafts)
            ],
        )

    plain = run([[]] * len(PROMPTS))
    for output in plain:
        ids = list(output.token_ids)
        if "allowed_token_ids" in options:
            assert set(ids) <= set(options["allowed_token_ids"])
        if "min_tokens" in options:
            assert EOS not in ids[:25]
            assert len(ids) >= 25
        if "logit_bias" in options:
            assert EOS not in ids
    again = run(tokens(plain))
    assert tokens(again) == tokens(plain)
    wrong = [[*ids[:5], EOS, *ids[5:]] for ids in tokens(plain)]
    assert tokens(run(wrong)) == tokens(plain)


def test_restrictions_are_each_requests_own(plugged: Any) -> None:
    """Beside others, beside requests without any and beside vLLM's own, with a draft or without."""
    from vllm import SamplingParams

    shared: dict[str, Any] = {"max_tokens": 25, "temperature": 0.8, "logprobs": 0}
    own: list[dict[str, Any]] = [
        {},
        {"min_p": 0.2},
        {"min_tokens": 12},
        {"logit_bias": {9: 3.0, EOS: -100.0}},
        {"allowed_token_ids": list(range(2, 20)), "min_p": 0.1},
    ]
    n = len(PROMPTS)

    def run(options: list[dict[str, Any]], drafts: Any) -> list[Any]:
        params = [
            SamplingParams(**shared, **one, extra_args=keyed(i, draft))
            for i, (one, draft) in enumerate(zip(options, drafts, strict=True))
        ]
        params[0] = SamplingParams(**shared, min_p=0.3, seed=5)
        return generate(plugged, params)

    none = [[]] * n
    alike = [run([one] * n, none) for one in own]
    mixed = [own[i % len(own)] for i in range(n)]
    expected = [alike[i % len(own)][i] for i in range(n)]
    assert len({tuple(map(tuple, tokens(found))) for found in alike}) == len(own)
    for drafts in (none, [ids if i % 2 else [] for i, ids in enumerate(tokens(expected))]):
        found = run(mixed, drafts)
        assert tokens(found) == tokens(expected)
        for a, b in zip(found, expected, strict=True):
            for lp, expected_lp in zip(a.logprobs, b.logprobs, strict=True):
                for token, value in lp.items():
                    assert value.rank == expected_lp[token].rank
                    assert abs(value.logprob - expected_lp[token].logprob) < 1e-4


def test_greedy_requests_are_restricted_in_vllms_order(stock: Any, plugged: Any) -> None:
    from vllm import SamplingParams

    own: list[dict[str, Any]] = [
        {"logit_bias": {EOS: 90.0}, "min_tokens": 7},
        {"logit_bias": {EOS: 90.0}, "min_tokens": 3, "allowed_token_ids": [EOS, *range(5, 40)]},
        {"logit_bias": {9: 90.0}, "allowed_token_ids": [EOS, *range(10, 40)]},
        {},
    ]

    def run(llm: Any, drafts: Any) -> list[list[int]]:
        params = [
            SamplingParams(
                max_tokens=20,
                temperature=0.0,
                extra_args=None if draft is None else keyed(i, draft),
                **own[i % len(own)],
            )
            for i, draft in enumerate(drafts)
        ]
        return tokens(generate(llm, params))

    n = len(PROMPTS)
    expected = run(stock, [None] * n)
    assert [len(ids) for ids in expected[:2]] == [8, 4]
    assert run(plugged, [[]] * n) == expected
    assert run(plugged, expected) == expected
    assert run(plugged, [[EOS, *ids] for ids in expected]) == expected


def test_min_p_keeps_to_its_tokens(plugged: Any, hf_model: Any) -> None:
    from vllm import SamplingParams

    with torch.no_grad():
        probs = hf_model(torch.tensor([PROMPTS[0].tolist()])).logits[0, -1].div(0.7).softmax(-1)
    kept = set((probs >= 0.2 * probs.max()).nonzero().flatten().tolist())
    params = [
        SamplingParams(max_tokens=1, temperature=0.7, min_p=0.2, extra_args=keyed(i))
        for i in range(300)
    ]
    found = {t for ids in tokens(generate(plugged, params, [PROMPTS[0]] * 300)) for t in ids}
    assert found <= kept
    assert len(found) > 1


@pytest.mark.parametrize("stop_in_output", [True, False])
def test_stop_strings_end_in_mid_chunk(plugged: Any, stop_in_output: bool) -> None:
    from vllm import SamplingParams

    options: dict[str, Any] = {"max_tokens": 40, "temperature": 1.0}
    plain = generate(plugged, [SamplingParams(extra_args=keyed(i), **options) for i in range(12)])
    stops = [o.text[len(o.text) // 2 : len(o.text) // 2 + 2] or "never" for o in plain]

    def run(drafts: Any) -> list[Any]:
        return generate(
            plugged,
            [
                SamplingParams(
                    stop=stop,
                    include_stop_str_in_output=stop_in_output,
                    extra_args=keyed(i, d),
                    **options,
                )
                for i, (stop, d) in enumerate(zip(stops, drafts, strict=True))
            ],
        )

    expected, found = run([[]] * 12), run(tokens(plain))
    assert [o.text for o in found] == [o.text for o in expected]
    assert tokens(found) == tokens(expected)
    assert [o.stop_reason for o in found] == [o.stop_reason for o in expected]
    assert sum(o.stop_reason == s for o, s in zip(found, stops, strict=True)) > 6


def test_eos_ends_a_response_in_mid_chunk(plugged: Any) -> None:
    from vllm import SamplingParams

    drafts = [[*range(10, 14), EOS, *range(20, 30)]] * 12
    params = [
        SamplingParams(max_tokens=40, extra_args=keyed(i, d, Lenient(float("inf"))))
        for i, d in enumerate(drafts)
    ]
    outputs = generate(plugged, params)
    assert tokens(outputs) == [[*range(10, 14), EOS]] * 12
    assert {o.finish_reason for o in outputs} == {"stop"}
    params = [
        SamplingParams(
            max_tokens=40, ignore_eos=True, extra_args=keyed(i, d, Lenient(float("inf")))
        )
        for i, d in enumerate(drafts)
    ]
    assert [ids[:15] for ids in tokens(generate(plugged, params))] == drafts


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"spec_rollout": b"rubbish"}, "spec_rollout"),
        ({"spec_rollout": 7.5}, "expected bytes, got float"),
        ({"spec_rollout": encode(ReuseRequest(1, Coupled()))[:-3]}, "spec_rollout"),
        ({"spec_rollout": b"sr\x09" + encode(ReuseRequest(1, Coupled()))[3:]}, "version 1, got 9"),
        (keyed(1, [VOCAB]), f"below {VOCAB}, got {VOCAB}"),
        ({"spec_rollout": b""}, "expected a message made by"),
        ({"spec_rollout": ""}, "expected a message made by"),
        ({"spec_rollout": 0}, "expected an engine that remembers samples"),
        ({"spec_rollout": []}, "expected bytes, got list"),
        ([("spec_rollout", b"")], "extra_args: expected a dict or None, got list"),
        ("spec_rollout", "extra_args: expected a dict or None, got 'spec_rollout'"),
        (0, "extra_args: expected a dict or None, got 0"),
    ],
    ids=[
        "rubbish", "type", "short", "version", "vocabulary", "nothing", "no text", "zero",
        "a list", "pairs", "text", "a number",
    ],
)  # fmt: skip
def test_malformed_request_fails_alone(plugged: Any, bad: Any, message: str) -> None:
    from vllm import SamplingParams

    engine = plugged.llm_engine
    prompt = {"prompt_token_ids": PROMPTS[0].tolist()}
    good = SamplingParams(max_tokens=5, extra_args=keyed(3))
    engine.add_request("before", prompt, good)
    with pytest.raises(ValueError, match=f"(?s)request the-bad-one: .*{message}"):
        engine.add_request("the-bad-one", prompt, SamplingParams(max_tokens=5, extra_args=bad))
    engine.add_request("after", prompt, good)
    done = {}
    while engine.has_unfinished_requests():
        done.update(
            {o.request_id: list(o.outputs[0].token_ids) for o in engine.step() if o.finished}
        )
    assert set(done) == {"before", "after"}
    assert done["before"] == done["after"]


@pytest.mark.parametrize(
    "options",
    [
        {"presence_penalty": 0.5},
        {"repetition_penalty": 1.1},
        {"bad_words": ["A"]},
        {"n": 2},
        {"thinking_token_budget": 3},
        {"thinking_token_budget": 0},
    ],
    ids=lambda o: "-".join(o),
)
def test_what_a_draft_cannot_follow_is_refused(plugged: Any, options: Any) -> None:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=5, extra_args=keyed(1, [5]), **options)
    with pytest.raises(ValueError, match=f"request .*: {next(iter(options))}: expected"):
        generate(plugged, params, PROMPTS[:1])
    assert len(generate(plugged, SamplingParams(max_tokens=5), PROMPTS[:1])[0].token_ids) > 0


def test_structured_output_is_refused(plugged: Any) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    params = SamplingParams(
        max_tokens=5,
        extra_args=keyed(1),
        structured_outputs=StructuredOutputsParams(regex="[0-9]+"),
    )
    with pytest.raises(ValueError, match=r"structured_outputs: expected None"):
        generate(plugged, params, PROMPTS[:1])


def test_engine_without_the_plugin_says_so(stock: Any, plugged: Any) -> None:
    from vllm import SamplingParams

    with pytest.raises(ValueError, match="expected an engine started with"):
        generate(stock, SamplingParams(max_tokens=5, extra_args=keyed(1)), PROMPTS[:1])


def test_base64_for_http_clients(plugged: Any) -> None:
    from vllm import SamplingParams

    as_bytes = keyed(5, [4, 5], OneHot())
    as_text = {k: base64.b64encode(v).decode() for k, v in as_bytes.items()}
    a, b = (
        tokens(generate(plugged, SamplingParams(max_tokens=20, extra_args=x), PROMPTS[:1]))
        for x in (as_bytes, as_text)
    )
    assert a == b


def _collecting(key: int, collect_id: int, draft: Any = ()) -> dict[str, Any]:
    ids = np.asarray(draft, np.int32)
    return extra_args(ReuseRequest(key, Coupled(), ids, collect_id=collect_id))


def _kept(llm: Any) -> list[bytes]:
    (kept,) = llm.collective_rpc("spec_rollout_take")
    return list(kept)


def test_nothing_is_kept_for_a_client_that_asks_for_it(plugged: Any) -> None:
    """Only the engine's own calls fetch what is kept: a client's would stay for ever."""
    from vllm import SamplingParams

    plugged.collective_rpc("spec_rollout_metrics", args=(True,))
    options: dict[str, Any] = {"max_tokens": 20, "temperature": 1.0, "ignore_eos": True}
    plain = tokens(
        generate(plugged, [SamplingParams(extra_args=keyed(i), **options) for i in range(12)])
    )
    # With a draft (verified) and without (drawn), ids small and large, one of them twice.
    asking = [
        SamplingParams(extra_args=_collecting(i, (0, 0, 2**31 - 1)[i % 3], plain[i][: i % 2 * 9]), **options)
        for i in range(12)
    ]  # fmt: skip
    assert tokens(generate(plugged, asking)) == plain
    assert _kept(plugged) == [b""] * 5
    (metrics,) = plugged.collective_rpc("spec_rollout_metrics", args=(True,))
    assert metrics["num_unknown_ids"] == 12


def test_what_a_call_announced_is_kept_once_and_no_longer_than_the_call(plugged: Any) -> None:
    from vllm import SamplingParams

    options: dict[str, Any] = {"max_tokens": 10, "temperature": 1.0, "ignore_eos": True}
    ids = [0, 1, 1, 2, 7]  # 1 comes twice; 2 and 7 were not announced
    params = [SamplingParams(extra_args=_collecting(i, n), **options) for i, n in enumerate(ids)]
    plugged.collective_rpc("spec_rollout_begin", args=(2, None, [], True))
    generate(plugged, params, PROMPTS[:5])
    rows, indices, values, *reused = _kept(plugged)
    assert sorted(np.frombuffer(rows, "<i4").tolist()) == [0] * 10 + [1] * 10
    assert sorted(np.frombuffer(indices, "<i4").tolist()) == sorted([*range(10)] * 2)
    assert np.isfinite(np.frombuffer(values, "<f4")).all()
    assert reused == [b"", b""]
    (metrics,) = plugged.collective_rpc("spec_rollout_end")
    assert metrics["num_unknown_ids"] == 3
    generate(plugged, params[:1], PROMPTS[:1])
    assert _kept(plugged) == [b""] * 5


def test_abort_in_mid_verification(plugged: Any) -> None:
    from vllm import SamplingParams

    engine = plugged.llm_engine
    options: dict[str, Any] = {"max_tokens": 100, "temperature": 1.0, "ignore_eos": True}
    plain = tokens(
        generate(plugged, [SamplingParams(extra_args=keyed(i), **options) for i in range(12)])
    )

    def add(name: str, i: int) -> None:
        params = SamplingParams(extra_args=keyed(i, plain[i]), **options)
        engine.add_request(name, {"prompt_token_ids": PROMPTS[i].tolist()}, params)

    for i in range(12):
        add(f"first-{i}", i)
    done: dict[str, list[int]] = {}

    def step() -> None:
        done.update(
            {o.request_id: list(o.outputs[0].token_ids) for o in engine.step() if o.finished}
        )

    for _ in range(3):  # drafts of 100 tokens in chunks of 8: under way
        step()
    engine.abort_request([f"first-{i}" for i in range(0, 12, 2)])
    for i in range(0, 12, 2):
        add(f"second-{i}", i)
    while engine.has_unfinished_requests():
        step()
    assert set(done) == {f"{'second' if i % 2 == 0 else 'first'}-{i}" for i in range(12)}
    assert all(ids == plain[int(name.split("-")[1])] for name, ids in done.items())


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
@pytest.mark.parametrize("num_logprobs", [0, 3])
def test_logprobs_as_vllm_returns_them(
    text_model_dir: Path, hf_model: Any, mode: str, num_logprobs: int, engines_by_mode: Any
) -> None:
    from vllm import SamplingParams

    llm = engines_by_mode(mode)
    options: dict[str, Any] = {"max_tokens": 20, "temperature": 0.7, "top_k": 20, "top_p": 0.9}
    params = [
        SamplingParams(extra_args=keyed(i), logprobs=num_logprobs, **options) for i in range(12)
    ]
    plain = generate(llm, params)
    params = [
        SamplingParams(extra_args=keyed(i, d), logprobs=num_logprobs, **options)
        for i, d in enumerate(tokens(plain))
    ]
    for prompt, output, again in zip(PROMPTS, plain, generate(llm, params), strict=True):
        assert list(output.token_ids) == list(again.token_ids)
        ids = [*prompt.tolist(), *output.token_ids]
        with torch.no_grad():
            x = hf_model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].double()
        order = x.argsort(-1, descending=True)
        if mode == "processed_logprobs":
            x = x / 0.7
            x[x < x.topk(20).values[:, -1:]] = -torch.inf
            top = x.sort(-1, descending=True)
            probs = top.values.softmax(-1)
            dropped = probs.cumsum(-1) - probs >= 0.9
            x.scatter_(1, top.indices, top.values.masked_fill(dropped, -torch.inf))
        expected = x.log_softmax(-1)
        for i, token in enumerate(output.token_ids):
            for found in (output.logprobs[i], again.logprobs[i]):
                assert abs(found[token].logprob - float(expected[i, token])) < 1e-4
                assert found[token].rank == int((order[i] == token).nonzero()) + 1
                assert len(found) - num_logprobs in (0, 1)


def test_an_engine_knows_with_what_its_model_ends_a_text(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert engine.eos_token_ids == (EOS,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 5]}')
    config = engine.llm.llm_engine.vllm_config.model_config
    monkeypatch.setattr(config, "generation_config", str(tmp_path))
    assert engine.eos_token_ids == (EOS, 5, 7)


def test_an_llm_that_exists_is_wrapped(plugged: Any, make_engine: Any) -> None:
    """The same rollouts as from an engine that starts its own, and it is left running."""
    from vllm import SamplingParams

    from spec_rollout.engines.vllm import VLLMEngine

    own = make_engine(num_speculative_tokens=8)
    wrapped = VLLMEngine.wrap(plugged)
    assert wrapped.llm is plugged
    assert (wrapped.max_model_len, wrapped.vocab_size) == (own.max_model_len, own.vocab_size)
    sampling = RolloutSampling(max_tokens=30, stop_token_ids=(EOS,))
    first = own.rollout(make_requests(PROMPTS), sampling, Coupled())
    drafts = pack_drafts(mixed_drafts(rows_of(first)))
    for requests in (make_requests(PROMPTS), make_requests(PROMPTS, drafts)):
        expected = own.rollout(requests, sampling, Coupled())
        found = wrapped.rollout(requests, sampling, Coupled())
        assert rows_of(found) == rows_of(expected) == rows_of(first)
        assert torch.equal(found.accepted_lens, expected.accepted_lens)
        torch.testing.assert_close(found.logprobs, expected.logprobs, atol=2e-5, rtol=0)
        assert wrapped.last_metrics.as_dict().keys() == own.last_metrics.as_dict().keys()
        assert wrapped.last_counters.as_row() == own.last_counters.as_row()
    assert wrapped.last_counters.as_row()["vllm_num_tested_tokens"] > 0
    two_pass = VLLMEngine.wrap(plugged, strategy="two_pass")
    requests = make_requests(PROMPTS, drafts)
    assert rows_of(two_pass.rollout(requests, sampling, Lenient(0.0))) == rows_of(
        wrapped.rollout(requests, sampling, Lenient(0.0))
    )
    wrapped.close()
    params = SamplingParams(max_tokens=5, extra_args=keyed(1))
    assert len(generate(plugged, params, PROMPTS[:1])[0].token_ids) > 0


def test_only_an_llm_with_the_plugin_is_wrapped(
    stock: Any, plugged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spec_rollout.engines.vllm import VLLMEngine

    wanted = r"llm: expected a vllm\.LLM started with spec_rollout\.engines\.vllm\.engine_args\(\)"
    with pytest.raises(ValueError, match=f"{wanted}, got one with speculative_config None"):
        VLLMEngine.wrap(stock)
    with pytest.raises(ValueError, match=r"llm: expected a vllm\.LLM, got str"):
        VLLMEngine.wrap("model")
    with pytest.raises(ValueError, match="strategy: expected 'inflight' or 'two_pass', got 'x'"):
        VLLMEngine.wrap(plugged, strategy="x")
    parallel = plugged.llm_engine.vllm_config.parallel_config
    for extension in ("", "collections.OrderedDict", "no.such.Thing"):
        monkeypatch.setattr(parallel, "worker_extension_cls", extension)
        with pytest.raises(
            ValueError, match=f"got one with worker_extension_cls {extension or None}"
        ):
            VLLMEngine.wrap(plugged)
    # One that derives from ours will do.
    monkeypatch.setattr(parallel, "worker_extension_cls", f"{__name__}.OwnExtension")
    assert VLLMEngine.wrap(plugged).supports_history


class OwnExtension(ReuseWorker):
    """A user's extension of the worker."""


@pytest.fixture(scope="module")
def engines_by_mode(text_model_dir: Path, plugged: Any) -> Any:
    from vllm import LLM

    from spec_rollout.engines.vllm import engine_args

    other = LLM(str(text_model_dir), **LLM_ARGS, **engine_args(8, logprobs_mode=None))
    return {"raw_logprobs": other, "processed_logprobs": plugged}.__getitem__


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"temperature": 0.7}, "temperature 0.7"),
        ({"temperature": 1.0, "top_k": 20}, "top_k 20"),
        ({"temperature": 1.0, "top_p": 0.9}, "top_p 0.9"),
        ({"temperature": 1.0, "min_p": 0.1}, "min_p 0.1"),
        ({"temperature": 1.0, "logit_bias": {7: 2.0}}, "logit_bias"),
        ({"temperature": 1.0, "allowed_token_ids": [5, 6]}, "allowed_token_ids"),
        ({"temperature": 0.0, "min_tokens": 3}, "min_tokens 3"),
    ],
    ids=lambda o: "-".join(o) if isinstance(o, dict) else "",
)
def test_raw_logprobs_are_refused_where_lenient_would_store_them(
    engines_by_mode: Any, options: Any, reason: str
) -> None:
    from vllm import SamplingParams

    def ask(mode: str, rule: Any, logprobs: int | None = 0) -> Any:
        params = SamplingParams(
            max_tokens=4, logprobs=logprobs, extra_args=keyed(1, (), rule), **options
        )
        return generate(engines_by_mode(mode), params, PROMPTS[:1])

    message = rf"request .*: logprobs: expected an engine with .*processed_logprobs for {reason}"
    with pytest.raises(ValueError, match=message):
        ask("raw_logprobs", Lenient(0.5))
    # Where they are not asked for, are not read, or are the right ones.
    for mode, rule, logprobs in (
        ("raw_logprobs", Lenient(0.5), None),
        ("raw_logprobs", Coupled(), 0),
        ("processed_logprobs", Lenient(0.5), 0),
    ):
        ask(mode, rule, logprobs)


def test_raw_logprobs_do_for_lenient_at_temperature_1_and_0(engines_by_mode: Any) -> None:
    from vllm import SamplingParams

    for temperature, more in ((1.0, {}), (0.0, {"top_p": 0.5})):
        found = []
        for mode in ("raw_logprobs", "processed_logprobs"):
            params = SamplingParams(
                max_tokens=8,
                logprobs=0,
                temperature=temperature,
                extra_args=keyed(1, (), Lenient(0.5)),
                **more,
            )
            (output,) = generate(engines_by_mode(mode), params, PROMPTS[:1])
            found.append(
                [
                    at[token].logprob
                    for at, token in zip(output.logprobs, output.token_ids, strict=True)
                ]
            )
        assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_logprobs_of_an_engine_with_our_arguments_make_a_draft_of_the_same_policy(
    plugged: Any,
) -> None:
    """At another temperature, too: an unchanged policy accepts its own draft whole."""
    from vllm import SamplingParams

    options: dict[str, Any] = {"max_tokens": 30, "temperature": 0.6, "top_p": 0.9, "logprobs": 0}
    first = generate(
        plugged,
        [SamplingParams(extra_args=keyed(i, (), Lenient(0.0)), **options) for i in range(12)],
    )
    drafts = [
        ReuseRequest(
            100 + i,
            Lenient(0.0),
            np.array(o.token_ids, np.int32),
            np.array([at[t].logprob for at, t in zip(o.logprobs, o.token_ids, strict=True)], np.float32) - 1e-4,
        )
        for i, o in enumerate(first)
    ]  # fmt: skip
    again = generate(plugged, [SamplingParams(extra_args=extra_args(d), **options) for d in drafts])
    assert tokens(again) == tokens(first)
