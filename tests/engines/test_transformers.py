"""The embedded engine on tiny real models."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tiny_models import (
    SAMPLING,
    STOP,
    VOCAB,
    assert_same,
    build,
    draft_rows,
    drafts_of,
    first_rows,
    full_logprobs,
    perturbed,
    prompts,
    random_requests,
    responses,
    with_drafts,
    with_keys,
)

from spec_rollout.acceptance import Coupled, Lenient, NoReuse, OneHot, RandomReuse
from spec_rollout.engines import RolloutEngine, TransformersEngine
from spec_rollout.engines.transformers.verify import Verifier
from spec_rollout.packed import cu_lens_from
from spec_rollout.types import Drafts, FinishReason, RolloutRequests, SamplingParams

MODELS = ["qwen3", "llama", "gpt2"]
SLIDING = ["qwen3_sliding", "mistral_sliding"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=30, stop_token_ids=(STOP,))


@pytest.fixture(scope="module")
def old_rollouts():
    """What the policy before a small step generated for 40 prompts."""
    requests = random_requests(40)
    rollouts = TransformersEngine(build("qwen3")).rollout(requests, SAMPLING, NoReuse())
    assert 0 < (rollouts.finish_reasons == FinishReason.STOP).float().mean() < 1
    return requests, rollouts


@pytest.fixture(scope="module")
def new_model():
    return perturbed(build("qwen3"), 0.01)


# --- Generation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS + SLIDING)
def test_greedy_is_generate(name: str, attention: str) -> None:
    model = build(name, attn_implementation=attention)
    requests = random_requests(10)
    rollouts = TransformersEngine(model, num_slots=4).rollout(requests, GREEDY, NoReuse())
    for prompt, response in zip(prompts(requests), responses(rollouts), strict=True):
        expected = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=30, eos_token_id=STOP
        )
        assert response == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", MODELS + SLIDING)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_a_plain_forwards(name: str, temperature: float) -> None:
    """Of generated tokens, of reused ones, and of those after a splice."""
    old, new = build(name), perturbed(build(name), 0.02)
    sampling = SamplingParams(temperature=temperature, max_tokens=40, stop_token_ids=(STOP,))
    requests = random_requests(12)
    drafts = drafts_of(TransformersEngine(old).rollout(requests, sampling, NoReuse()))
    engine = TransformersEngine(new, num_slots=5, verify_chunk=9)
    rollouts = engine.rollout(with_drafts(requests, drafts), sampling, Lenient(0.5))
    assert rollouts.stats.num_reused_tokens > requests.batch
    assert rollouts.stats.num_generated_tokens > 30
    for row, (prompt, response) in enumerate(
        zip(prompts(requests), responses(rollouts), strict=True)
    ):
        actual = rollouts.logprobs[
            rollouts.cu_response_lens[row] : rollouts.cu_response_lens[row + 1]
        ]
        expected = full_logprobs(new, prompt, response, temperature)
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)
        # Reused tokens bring along what they were drawn with, under the old weights.
        num, start, draft = (
            int(values[row])
            for values in (rollouts.accepted_lens, rollouts.cu_response_lens, drafts.cu_lens)
        )
        drawn = rollouts.behaviour_logprobs[start : start + len(response)]
        assert torch.equal(drawn[:num], drafts.logprobs[draft : draft + num])
        assert torch.equal(drawn[num:], actual[num:])
        ages = rollouts.ages[start : start + len(response)].tolist()
        assert ages == [1] * num + [0] * (len(response) - num)


def test_top_k_and_top_p_limit_the_tokens() -> None:
    model = build("llama")
    requests = random_requests(30)
    sampling = SamplingParams(max_tokens=10, top_k=3, top_p=0.8)
    rollouts = TransformersEngine(model).rollout(requests, sampling, NoReuse())
    ranks = []
    for prompt, response in zip(prompts(requests), responses(rollouts), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        order = logits.argsort(-1, descending=True)
        ranks += (order == torch.tensor(response)[:, None]).nonzero()[:, 1].tolist()
    assert max(ranks) == 2
    # A filtered distribution is renormalised: some positions have one token left, of log-prob 0.
    assert rollouts.logprobs.max() == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_sampled_tokens_follow_the_noise_not_the_batch(name: str) -> None:
    """Slots, chunks and order change nothing, bit for bit; other keys change the tokens."""
    model = build(name)
    requests = random_requests(24)
    expected = TransformersEngine(model).rollout(requests, SAMPLING, NoReuse())
    for slots, chunk in ((3, 5), (7, 1), (64, 200)):
        engine = TransformersEngine(model, num_slots=slots, verify_chunk=chunk)
        assert_same(engine.rollout(requests, SAMPLING, NoReuse()), expected)
    other = TransformersEngine(model).rollout(with_keys(requests, 9), SAMPLING, NoReuse())
    assert responses(other) != responses(expected)


@pytest.mark.slow
def test_300_requests_through_8_slots() -> None:
    requests = random_requests(300, seed=5)
    model = build("llama")
    few = TransformersEngine(model, num_slots=8).rollout(requests, SAMPLING, NoReuse())
    many = TransformersEngine(model, num_slots=300).rollout(requests, SAMPLING, NoReuse())
    assert_same(few, many)
    assert few.stats.num_decode_steps > 4 * many.stats.num_decode_steps
    # Rows move into the slots of finished ones, so a step computes live rows only.
    assert few.stats.num_computed_tokens == many.stats.num_computed_tokens


def test_order_of_requests_does_not_matter(old_rollouts, new_model) -> None:
    requests, rollouts = old_rollouts
    drafts = drafts_of(rollouts)
    order = torch.randperm(requests.batch, generator=torch.Generator().manual_seed(3)).tolist()

    def shuffled(values: torch.Tensor, cu: torch.Tensor) -> torch.Tensor:
        return torch.cat([values[cu[row] : cu[row + 1]] for row in order])

    lens = (requests.cu_prompt_lens.diff()[order], drafts.lens[order])
    mixed = RolloutRequests(
        shuffled(requests.prompt_ids, requests.cu_prompt_lens),
        cu_lens_from(lens[0]),
        requests.keys[order],
        Drafts(
            shuffled(drafts.token_ids, drafts.cu_lens),
            cu_lens_from(lens[1]),
            shuffled(drafts.logprobs, drafts.cu_lens),
            drafts.finished[order],
        ),
    )
    engine = TransformersEngine(new_model, num_slots=6)
    expected = engine.rollout(with_drafts(requests, drafts), SAMPLING, Lenient(0.3))
    actual = engine.rollout(mixed, SAMPLING, Lenient(0.3))
    assert responses(actual) == [responses(expected)[row] for row in order]
    assert actual.accepted_lens.tolist() == expected.accepted_lens[order].tolist()
    assert torch.equal(actual.logprobs, shuffled(expected.logprobs, expected.cu_response_lens))


def test_every_device_generates_and_reuses(device: str) -> None:
    """Same tokens as `generate` there, a plain forward's log-probs, and its own drafts accepted."""
    model = build("qwen3").to(device)
    requests = random_requests(12)
    engine = TransformersEngine(model, num_slots=5, verify_chunk=8)
    greedy = engine.rollout(requests, GREEDY, NoReuse())
    rollouts = engine.rollout(requests, SAMPLING, Coupled())
    agree = 0
    for row, (prompt, response) in enumerate(
        zip(prompts(requests), responses(greedy), strict=True)
    ):
        ids = torch.tensor([prompt], device=device)
        expected = model.generate(ids, do_sample=False, max_new_tokens=30, eos_token_id=STOP)
        agree += response == expected[0, len(prompt) :].tolist()
        begin, end = rollouts.cu_response_lens[row], rollouts.cu_response_lens[row + 1]
        sampled = rollouts.response_ids[begin:end].tolist()
        actual = full_logprobs(model, prompt, sampled)
        torch.testing.assert_close(rollouts.logprobs[begin:end], actual, atol=1e-4, rtol=1e-4)
    assert agree >= 11  # one near-tie may turn with the rounding of another kernel
    again = engine.rollout(with_drafts(requests, drafts_of(rollouts)), SAMPLING, Coupled())
    assert again.stats.reused_fraction > 0.95
    assert rollouts.logprobs.device.type == "cpu"


# --- Reuse --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("slots", [1, 3, 64])
def test_coupled_with_drafts_is_plain_sampling(old_rollouts, new_model, slots, chunk) -> None:
    requests, rollouts = old_rollouts
    requests = with_drafts(requests, drafts_of(rollouts))
    if slots == 1:
        requests = first_rows(requests, 12)
    engine = TransformersEngine(new_model, num_slots=slots, verify_chunk=chunk)
    off = engine.rollout(requests, SAMPLING, NoReuse())
    on = engine.rollout(requests, SAMPLING, Coupled())
    assert_same(on, off)
    assert on.stats.num_reused_tokens > 3 * requests.batch
    assert on.stats.num_generated_tokens > 3 * requests.batch


@pytest.mark.parametrize("name", MODELS + SLIDING)
def test_unchanged_policy_reuses_everything_and_decodes_nothing(name: str) -> None:
    requests = random_requests(20)
    engine = TransformersEngine(build(name))
    first = engine.rollout(requests, SAMPLING, Coupled())
    again = engine.rollout(with_drafts(requests, drafts_of(first)), SAMPLING, Coupled())
    assert_same(again, first)
    assert again.stats.num_decode_steps == 0
    assert again.stats.num_generated_tokens == 0
    assert again.stats.num_fully_reused == 20
    assert torch.equal(again.accepted_lens.long(), first.response_lens)


def test_drafts_of_every_shape_change_nothing_under_coupled(new_model) -> None:
    """Empty, one token, wrong, with a stop inside, too long, cut short, with tokens after the
    end."""
    requests = random_requests(14, seed=8)
    engine = TransformersEngine(new_model, num_slots=4, verify_chunk=5)
    plain = engine.rollout(requests, SAMPLING, Coupled())
    rows = responses(plain)
    tails = [5, 6, STOP, 7] * 15
    drafts = [
        [],
        rows[1][:1],
        [rows[2][0] ^ 1],
        [3, STOP, 4, 4],
        rows[4] + tails,
        rows[5][: len(rows[5]) // 2],
        rows[6][:-1],
        rows[7],
        [*rows[8][:3], STOP],
        [*rows[9][:-1], (rows[9][-1] + 1) % VOCAB],
        [STOP],
        rows[11][:2] + tails,
        [9] * 200,
        rows[13] + rows[13],
    ]
    on = engine.rollout(with_drafts(requests, draft_rows(drafts)), SAMPLING, Coupled())
    assert_same(on, plain)
    for row in (1, 4, 7, 13):  # the whole response, or the one token, was there to reuse
        assert on.accepted_lens[row] == (1 if row == 1 else len(rows[row]))
    assert on.accepted_lens[0] == on.accepted_lens[2] == 0
    assert on.accepted_lens[5] == len(rows[5]) // 2


def test_full_reuse_keeps_drafts_up_to_stop_and_limit(new_model) -> None:
    """`Lenient(inf)` accepts all there is: what is kept shows where a draft ends."""
    requests = random_requests(6, seed=4)
    sampling = SamplingParams(max_tokens=6, stop_token_ids=(STOP, 2))
    drafts = draft_rows([[5, 6, STOP, 7, 8], [5] * 6, [5] * 9, [6, 2], [6, 7], []])
    rollouts = TransformersEngine(new_model).rollout(
        with_drafts(requests, drafts), sampling, Lenient(math.inf)
    )
    rows = responses(rollouts)
    assert rows[:4] == [[5, 6, STOP], [5] * 6, [5] * 6, [6, 2]]
    assert rows[4][:2] == [6, 7]
    assert len(rows[4]) > 2  # the draft was not finished: it goes on
    assert rows[5]
    assert rollouts.accepted_lens.tolist() == [3, 6, 6, 2, 2, 0]
    reasons = rollouts.finish_reasons.tolist()
    assert reasons[:4] == [
        FinishReason.STOP,
        FinishReason.LENGTH,
        FinishReason.LENGTH,
        FinishReason.STOP,
    ]
    stats = rollouts.stats
    assert (stats.num_drafts, stats.num_draft_tokens, stats.num_fully_reused) == (5, 19, 4)
    assert stats.num_reused_tokens == 19
    assert stats.num_response_tokens == sum(map(len, rows)) == 19 + stats.num_generated_tokens


def test_a_draft_cut_by_the_old_limit_goes_on(new_model) -> None:
    requests = random_requests(16, seed=6)
    engine = TransformersEngine(new_model)
    short = engine.rollout(
        requests, SamplingParams(max_tokens=9, stop_token_ids=(STOP,)), Coupled()
    )
    long = engine.rollout(with_drafts(requests, drafts_of(short)), SAMPLING, Coupled())
    assert_same(long, engine.rollout(requests, SAMPLING, Coupled()))
    assert torch.equal(long.accepted_lens.long(), short.response_lens)


def test_no_reuse_ignores_drafts(old_rollouts, new_model) -> None:
    requests, rollouts = old_rollouts
    engine = TransformersEngine(new_model)
    ignored = engine.rollout(with_drafts(requests, drafts_of(rollouts)), SAMPLING, NoReuse())
    assert_same(ignored, engine.rollout(requests, SAMPLING, NoReuse()))
    assert ignored.stats.num_drafts == 0
    assert ignored.stats.verification_seconds == 0.0


@pytest.mark.parametrize("rule", [Lenient(0.2), OneHot(), RandomReuse(0.5), Coupled(0.5)])
@pytest.mark.parametrize("chunk", [2, 64])
def test_chunks_change_no_decision(old_rollouts, new_model, rule, chunk) -> None:
    requests, rollouts = old_rollouts
    requests = with_keys(with_drafts(requests, drafts_of(rollouts)), 11)
    whole = TransformersEngine(new_model, verify_chunk=500).rollout(requests, SAMPLING, rule)
    chunked = TransformersEngine(new_model, verify_chunk=chunk, num_slots=5)
    actual = chunked.rollout(requests, SAMPLING, rule)
    assert_same(actual, whole)
    assert torch.equal(actual.accepted_lens, whole.accepted_lens)
    assert whole.stats.num_reused_tokens > 0
    assert actual.stats.num_verified_tokens <= whole.stats.num_verified_tokens


def test_rows_stop_at_their_first_rejection(new_model) -> None:
    """A draft rejected at once costs one chunk, not its length."""
    requests = random_requests(32, seed=7, longest=1)
    drafts = draft_rows([[5] * 90] * 32)
    sampling = SamplingParams(max_tokens=100, stop_token_ids=(STOP,))
    engine = TransformersEngine(new_model, verify_chunk=4)
    rollouts = engine.rollout(with_drafts(requests, drafts), sampling, Coupled())
    assert rollouts.stats.num_reused_tokens < 32
    assert rollouts.stats.num_verified_tokens < 32 * 8


def test_greedy_drafts_are_tested_greedily(new_model) -> None:
    requests = random_requests(10)
    engine = TransformersEngine(new_model)
    plain = engine.rollout(requests, GREEDY, Coupled())
    again = engine.rollout(with_drafts(requests, drafts_of(plain)), GREEDY, Coupled())
    assert_same(again, plain)
    assert again.stats.num_generated_tokens == 0


def test_model_length_ends_a_response(new_model) -> None:
    requests = random_requests(20, seed=3, longest=12)
    engine = TransformersEngine(new_model, max_model_len=16)
    sampling = SamplingParams(max_tokens=100)
    rollouts = engine.rollout(requests, sampling, Coupled())
    assert torch.equal(rollouts.prompt_lens + rollouts.response_lens, torch.full((20,), 16))
    assert (rollouts.finish_reasons == FinishReason.LENGTH).all()
    longer = TransformersEngine(new_model).rollout(
        requests, SamplingParams(max_tokens=16), Coupled()
    )
    again = engine.rollout(with_drafts(requests, drafts_of(longer)), sampling, Coupled())
    assert_same(again, rollouts)
    assert again.stats.num_generated_tokens == 0


# --- Bookkeeping --------------------------------------------------------------------------------


def test_counts_add_up(old_rollouts, new_model) -> None:
    requests, rollouts = old_rollouts
    engine = TransformersEngine(new_model, num_slots=8, verify_chunk=6, batch_invariant=False)
    on = engine.rollout(with_drafts(requests, drafts_of(rollouts)), SAMPLING, Lenient(0.0))
    stats = on.stats
    assert stats.num_rollouts == stats.num_drafts == 40
    assert stats.num_draft_tokens == rollouts.stats.num_response_tokens
    assert stats.num_reused_tokens == on.accepted_lens.sum()
    assert stats.num_response_tokens == on.response_ids.numel()
    assert stats.num_reused_tokens <= stats.num_verified_tokens <= stats.num_draft_tokens
    assert 0 < stats.num_decode_steps < stats.num_engine_steps
    # Every token but a response's last goes through the model once, and some that are rejected.
    floor = requests.prompt_ids.numel() + stats.num_response_tokens - 40
    assert floor <= stats.num_computed_tokens <= floor + 40 * 6
    parts = stats.verification_seconds + stats.decode_seconds + stats.assembly_seconds
    assert 0.5 * stats.rollout_seconds < parts <= stats.rollout_seconds
    assert min(stats.verification_seconds, stats.decode_seconds, stats.assembly_seconds) > 0


def test_plain_generation_spends_nothing_on_verification(new_model) -> None:
    stats = TransformersEngine(new_model).rollout(random_requests(5), SAMPLING, NoReuse()).stats
    assert stats.verification_seconds == 0.0
    assert stats.decode_seconds > 0.0
    assert stats.num_verified_tokens == stats.num_drafts == stats.num_fully_reused == 0


def test_empty_batch(new_model) -> None:
    rollouts = TransformersEngine(new_model).rollout(random_requests(0), SAMPLING, Coupled())
    assert rollouts.batch == rollouts.response_ids.numel() == rollouts.stats.num_engine_steps == 0


@pytest.mark.parametrize(
    ("of_model", "of_generation", "expected"),
    [(None, None, ()), (2, None, (2,)), (None, 3, (3,)), (5, [4, 5, 0], (0, 4, 5))],
)
def test_it_knows_with_what_its_model_ends_a_text(of_model, of_generation, expected) -> None:
    model = build("llama", eos_token_id=of_model)
    model.generation_config.eos_token_id = of_generation
    assert TransformersEngine(model).eos_token_ids == expected


def test_is_a_rollout_engine(new_model) -> None:
    assert isinstance(TransformersEngine(new_model), RolloutEngine)


@pytest.mark.slow
@pytest.mark.parametrize("batch_invariant", [True, False])
def test_samples_of_a_prompt_share_its_computation(
    monkeypatch: pytest.MonkeyPatch, new_model, old_rollouts, batch_invariant: bool
) -> None:
    """Prompts of one token, alone, in pairs and in threes: the same responses, for fewer tokens."""
    requests, rollouts = old_rollouts
    rows = prompts(requests)
    rows[0] = rows[1] = rows[0][:1]
    rows[2] = rows[3] = (rows[2] * 30)[:60]  # longer than a forward takes at a time
    rows[5] = rows[6] = rows[4]
    rows[8] = rows[7]
    grouped = replace(
        with_drafts(requests, drafts_of(rollouts)),
        prompt_ids=torch.tensor([token for row in rows for token in row], dtype=torch.int32),
        cu_prompt_lens=cu_lens_from(torch.tensor([len(row) for row in rows])),
    )
    engine = TransformersEngine(
        new_model,
        num_slots=9,
        max_verify_tokens=32,
        verify_chunk=8,
        batch_invariant=batch_invariant,
    )
    shared, plain = (engine.rollout(grouped, SAMPLING, rule) for rule in (Coupled(), NoReuse()))
    monkeypatch.setattr(Verifier, "_compute_shared_prompts", lambda *args: None)
    apart, plain_apart = (
        engine.rollout(grouped, SAMPLING, rule) for rule in (Coupled(), NoReuse())
    )
    if batch_invariant:
        assert_same(shared, apart)
        assert_same(plain, plain_apart)
        # Without drafts, so that nothing is computed after a rejection.
        saved = len(rows[2]) - 1 + 2 * (len(rows[4]) - 1) + len(rows[7]) - 1
        assert plain.stats.num_computed_tokens == plain_apart.stats.num_computed_tokens - saved
    else:  # up to rounding
        same = zip(responses(shared), responses(apart), strict=True)
        assert sum(a == b for a, b in same) >= 39
