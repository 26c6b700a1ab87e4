from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import SMALLEST_P, assert_law, p_value
from markov_engine import MarkovEngine

from spec_rollout.acceptance import (
    AcceptanceRule,
    Coupled,
    Lenient,
    NoReuse,
    OneHot,
    RandomCut,
    RandomReuse,
    Schedule,
)
from spec_rollout.cache import RolloutCache
from spec_rollout.engines.base import RolloutEngine
from spec_rollout.rollout import RolloutSession
from spec_rollout.types import FinishReason, RolloutRequests, Rollouts, SamplingParams

VOCAB = 5
STOP = 4
SAMPLING = SamplingParams(max_tokens=12, stop_token_ids=(STOP,))
ALL_RULES = [Lenient(0.0), Lenient(0.5), Coupled(), OneHot(), RandomReuse(0.5), RandomCut()]


def policy(seed: int, drift: float = 0.0) -> torch.Tensor:
    """Logits of a bigram model with entropy; `drift` moves them away from those of the seed."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(VOCAB, VOCAB, generator=generator)
    return logits + drift * torch.randn(VOCAB, VOCAB, generator=generator)


def responses(rollouts: Rollouts) -> list[list[int]]:
    return [row.tolist() for row in rollouts.response_ids.split(rollouts.response_lens.tolist())]


def second_epoch(
    rule: AcceptanceRule, num_samples: int, num_tokens: int
) -> tuple[Rollouts, np.ndarray, np.ndarray]:
    """Drafts drawn from q, then rolled out under p. Returns those rollouts, q and p [vocab,
    vocab]."""
    old, new = policy(1), policy(1, drift=0.8)
    engine = MarkovEngine(old)
    session = RolloutSession(engine, rule, seed=5)
    sampling = SamplingParams(max_tokens=num_tokens)
    session.rollout([[0]], num_samples, sampling, step=0, epoch=0)
    engine.update_weights([("logits", new)])
    rollouts = session.rollout([[0]], num_samples, sampling, step=1, epoch=1)
    assert rollouts.stats.num_drafts == num_samples
    return rollouts, old.double().softmax(-1).numpy(), new.double().softmax(-1).numpy()


@pytest.mark.parametrize("log_lenience", [0.0, 0.5, float("inf")])
def test_lenient_rollouts_follow_the_closed_form(log_lenience: float) -> None:
    rollouts, q, p = second_epoch(Lenient(log_lenience), 50_000, 1)
    kept = np.minimum(q[0], np.exp(log_lenience) * p[0])
    law = kept + (1 - kept.sum()) * p[0]
    assert_law(np.bincount(rollouts.response_ids.numpy(), minlength=VOCAB), law)
    num_accepted = int(rollouts.accepted_lens.sum())
    counts = np.array([num_accepted, rollouts.batch - num_accepted])
    assert_law(counts, np.array([kept.sum(), 1 - kept.sum()]))


@pytest.mark.parametrize("rule", [Coupled(), OneHot(), NoReuse(), Lenient(float("-inf"))], ids=repr)
def test_lossless_rollouts_are_plain_samples_of_the_new_policy(rule: AcceptanceRule) -> None:
    rollouts, _, p = (
        second_epoch(rule, 50_000, 2) if rule.uses_drafts else _plain_second_epoch(rule, 50_000)
    )
    pairs = rollouts.response_ids.view(-1, 2).numpy()
    counts = np.bincount(pairs[:, 0] * VOCAB + pairs[:, 1], minlength=VOCAB**2)
    assert_law(counts, (p[0][:, None] * p).ravel())


def _plain_second_epoch(
    rule: AcceptanceRule, num_samples: int
) -> tuple[Rollouts, np.ndarray, np.ndarray]:
    session = RolloutSession(MarkovEngine(policy(1, drift=0.8)), rule, seed=5)
    rollouts = session.rollout([[0]], num_samples, SamplingParams(max_tokens=2), step=1, epoch=1)
    p = policy(1, drift=0.8).double().softmax(-1).numpy()
    return rollouts, p, p


def test_random_reuse_keeps_whole_drafts_unseen_at_its_rate() -> None:
    rollouts, _, _ = second_epoch(RandomReuse(0.3), 20_000, 4)
    lens = np.bincount(rollouts.accepted_lens.numpy(), minlength=5)
    assert_law(lens, np.array([0.7, 0, 0, 0, 0.3]))


def test_random_cut_keeps_a_uniform_length_unseen() -> None:
    rollouts, _, _ = second_epoch(RandomCut(), 20_000, 4)
    assert_law(np.bincount(rollouts.accepted_lens.numpy(), minlength=5), np.full(5, 0.2))


class TwoSessions:
    """The same training run with reuse on and off."""

    def __init__(
        self, rule: AcceptanceRule, cache: RolloutCache, refresh_epochs: int | None = None
    ) -> None:
        self.cached, self.plain = (
            RolloutSession(
                MarkovEngine(policy(3)),
                rule,
                cache=cache if reuse else None,
                seed=9,
                refresh_epochs=refresh_epochs,
                reuse=reuse,
            )
            for reuse in (True, False)
        )

    def rollout(self, *args: object, **kwargs: object) -> tuple[Rollouts, Rollouts]:
        return self.cached.rollout(*args, **kwargs), self.plain.rollout(*args, **kwargs)

    def update(self, logits: torch.Tensor) -> None:
        self.cached.engine.update_weights([("logits", logits)])
        self.plain.engine.update_weights([("logits", logits)])


def assert_equal_rollouts(a: Rollouts, b: Rollouts) -> None:
    assert torch.equal(a.cu_response_lens, b.cu_response_lens)
    assert torch.equal(a.response_ids, b.response_ids)
    assert torch.equal(a.logprobs, b.logprobs)
    assert torch.equal(a.finish_reasons, b.finish_reasons)


PROMPTS = st.lists(st.sampled_from([[0], [1, 2], [3], [2, 0, 1]]), min_size=1, max_size=6)
CALLS = st.lists(
    st.fixed_dictionaries(
        {
            "prompts": PROMPTS,  # any order, repeats in one batch
            "num_samples": st.integers(1, 4),
            "max_tokens": st.integers(1, 14),
            "stop_token_ids": st.sampled_from([(), (4,), (1, 3)]),
            "temperature": st.sampled_from([0.7, 1.0]),
            "drift": st.sampled_from([0.0, 0.2]),
        }
    ),
    min_size=2,
    max_size=6,
)


@pytest.mark.slow
@given(calls=CALLS, max_bytes=st.none() | st.integers(0, 9000), refresh=st.none() | st.just(2))
@settings(max_examples=100, deadline=None)
def test_coupled_gives_the_same_rollouts_with_the_cache_on_and_off(
    calls: list[dict], max_bytes: int | None, refresh: int | None
) -> None:
    sessions = TwoSessions(Coupled(), RolloutCache(max_bytes), refresh)
    for step, call in enumerate(calls):
        sampling = SamplingParams(
            temperature=call["temperature"],
            max_tokens=call["max_tokens"],
            stop_token_ids=call["stop_token_ids"],
        )
        on, off = sessions.rollout(
            call["prompts"], call["num_samples"], sampling, step=step, epoch=step
        )
        assert_equal_rollouts(on, off)
        assert off.stats.num_drafts == 0
        sessions.update(policy(3, drift=call["drift"] * (step + 1)))


def test_coupled_reuses_most_under_a_small_drift_and_everything_under_none() -> None:
    sessions = TwoSessions(Coupled(), RolloutCache())
    prompts = [[i % VOCAB, i // VOCAB] for i in range(20)]
    sessions.rollout(prompts, 8, SAMPLING, step=0, epoch=0)
    on, off = sessions.rollout(prompts, 8, SAMPLING, step=1, epoch=1)
    assert_equal_rollouts(on, off)
    finished = on.finish_reasons == FinishReason.STOP
    assert on.stats.num_generated_tokens == 0
    assert on.stats.num_fully_reused == int(finished.sum()) > 0
    sessions.update(policy(3, drift=0.1))
    on, off = sessions.rollout(prompts, 8, SAMPLING, step=2, epoch=2)
    assert_equal_rollouts(on, off)
    assert 0.6 < on.stats.reused_fraction < 1


def test_coupled_noise_is_renewed_every_refresh_epochs_and_only_then() -> None:
    session = RolloutSession(MarkovEngine(policy(3)), Coupled(), refresh_epochs=2)
    rolled = [
        session.rollout([[0], [1]], 4, SAMPLING, step=step, epoch=step // 3) for step in range(15)
    ]
    same = [responses(a) == responses(b) for a, b in itertools.pairwise(rolled)]
    assert [step + 1 for step, equal in enumerate(same) if not equal] == [6, 12]
    forever = RolloutSession(MarkovEngine(policy(3)), Coupled())
    first, last = (forever.rollout([[0]], 4, SAMPLING, step=e, epoch=e) for e in (0, 1000))
    assert responses(first) == responses(last)


@pytest.mark.slow
@pytest.mark.parametrize("rule", [Lenient(0.0), OneHot()], ids=repr)
def test_rollouts_of_another_session_of_the_same_seed_are_tested_with_other_noise(
    rule: AcceptanceRule,
) -> None:
    old, new = policy(1), policy(1, drift=0.8)
    q, p = (logits[0].double().softmax(-1).numpy() for logits in (old, new))
    kept = np.minimum(q, p)
    law = p if rule.lossless else kept + (1 - kept.sum()) * p

    def second(with_offset: bool) -> np.ndarray:
        cache = RolloutCache()
        for step in range(2):
            engine = MarkovEngine((old, new)[step])
            offset = cache.fingerprint() if with_offset else 0
            session = RolloutSession(engine, rule, cache=cache, seed=5, noise_offset=offset)
            rolled = session.rollout([[0]], 50_000, SamplingParams(max_tokens=1), step=0, epoch=0)
        return np.bincount(rolled.response_ids.numpy(), minlength=VOCAB)

    assert_law(second(with_offset=True), law)
    assert p_value(second(with_offset=False), law) < SMALLEST_P  # which this is about


def test_an_offset_moves_fresh_noise_only() -> None:
    def drawn(rule: AcceptanceRule, offset: int) -> list[list[int]]:
        session = RolloutSession(MarkovEngine(policy(3)), rule, noise_offset=offset)
        return responses(session.rollout([[0]], 16, SAMPLING, step=3, epoch=0))

    def judged(offset: int) -> list[list[int]]:
        session = RolloutSession(MarkovEngine(policy(3)), Lenient(), noise_offset=offset)
        return responses(session.evaluate([[0]], 16, SAMPLING, step=3))

    assert drawn(Coupled(), 0) == drawn(Coupled(), 9)
    assert drawn(Lenient(), 0) != drawn(Lenient(), 9)
    assert judged(0) == judged(9)


@pytest.mark.parametrize("rule", [Lenient(0.5), OneHot(), NoReuse(), RandomCut()], ids=repr)
def test_other_rules_draw_new_noise_every_step(rule: AcceptanceRule) -> None:
    def first(step: int, epoch: int, seed: int = 0) -> list[list[int]]:
        session = RolloutSession(MarkovEngine(policy(3)), rule, seed=seed)
        return responses(session.rollout([[0]], 16, SAMPLING, step=step, epoch=epoch))

    assert first(1, 0) != first(2, 0)
    assert first(1, 0) == first(1, 1)
    assert first(1, 0, seed=1) != first(1, 0, seed=2)


def test_the_samples_of_a_prompt_differ() -> None:
    session = RolloutSession(MarkovEngine(policy(3)), NoReuse())
    rolled = session.rollout([[0]], 64, SamplingParams(max_tokens=40), step=0, epoch=0)
    assert len(set(map(tuple, responses(rolled)))) == 64


@pytest.mark.parametrize("rule", ALL_RULES, ids=repr)
def test_a_prompt_that_occurs_twice_is_one_with_twice_the_samples(rule: AcceptanceRule) -> None:
    def run(batches: list[tuple[list[list[int]], int]]) -> list[list[list[int]]]:
        engine = MarkovEngine(policy(3))
        session = RolloutSession(engine, rule, seed=2)
        rolled = []
        for step, (prompts, num_samples) in enumerate(batches):
            rolled.append(session.rollout(prompts, num_samples, SAMPLING, step=step, epoch=step))
            engine.update_weights([("logits", policy(3, drift=0.2))])
        return [responses(rollouts) for rollouts in rolled]

    once = run([([[0], [1]], 4)] * 2)
    twice = run([([[0], [1], [0], [1]], 2)] * 2)
    for one, two in zip(once, twice, strict=True):
        rows = [0, 1, 4, 5, 2, 3, 6, 7]  # the first samples of 0, of 1, the further ones of 0, of 1
        assert [one[row] for row in rows] == two


@pytest.mark.parametrize("rule", ALL_RULES, ids=repr)
def test_the_order_of_the_batch_changes_nothing(rule: AcceptanceRule) -> None:
    prompts = [[a, b] for a in range(4) for b in range(4)]
    order = np.random.default_rng(0).permutation(16)
    results = []
    for shuffled in (False, True):
        engine = MarkovEngine(policy(3))
        session = RolloutSession(engine, rule, seed=2)
        session.rollout(prompts, 2, SAMPLING, step=0, epoch=0)
        engine.update_weights([("logits", policy(3, drift=0.2))])
        batch = [prompts[i] for i in order] if shuffled else prompts
        results.append(session.rollout(batch, 2, SAMPLING, step=1, epoch=1))
    plain, shuffled_rows = responses(results[0]), responses(results[1])
    assert results[0].stats.num_reused_tokens == results[1].stats.num_reused_tokens > 0
    for new, old in enumerate(order):
        assert shuffled_rows[2 * new : 2 * new + 2] == plain[2 * old : 2 * old + 2]


def test_a_new_limit_cuts_drafts_and_old_cuts_are_continued() -> None:
    session = RolloutSession(MarkovEngine(policy(3)), Lenient(float("inf")))

    def roll(step: int, max_tokens: int) -> Rollouts:
        sampling = SamplingParams(max_tokens=max_tokens)
        return session.rollout([[0], [1]], 2, sampling, step=step, epoch=step)

    first, longer, shorter = (roll(step, limit) for step, limit in enumerate((4, 9, 2)))
    assert longer.response_lens.tolist() == [9] * 4
    assert longer.accepted_lens.tolist() == [4] * 4
    assert [row[:4] for row in responses(longer)] == responses(first)
    assert responses(shorter) == [row[:2] for row in responses(first)]
    assert shorter.accepted_lens.tolist() == [2] * 4
    assert set(shorter.finish_reasons.tolist()) == {FinishReason.LENGTH}
    assert shorter.stats.num_fully_reused == 0


def test_drafts_follow_the_stop_tokens_of_the_call() -> None:
    session = RolloutSession(MarkovEngine(policy(3)), Lenient(float("inf")))

    def roll(step: int, *stops: int) -> Rollouts:
        sampling = SamplingParams(max_tokens=12, stop_token_ids=stops)
        return session.rollout([[0], [1], [2]], 16, sampling, step=step, epoch=step)

    def cut(row: list[int], *stops: int) -> list[int]:
        ends = [i + 1 for i, token in enumerate(row) if token in stops]
        return row[: min(ends, default=len(row))]

    free, stop_at_2, stop_at_1 = roll(0), roll(1, 2), roll(2, 3, 1)
    assert responses(stop_at_2) == [cut(row, 2) for row in responses(free)]
    assert stop_at_2.stats.num_fully_reused == sum(2 in row for row in responses(free)) > 0
    for old, new in zip(responses(stop_at_2), responses(stop_at_1), strict=True):
        kept = cut(old, 1, 3)  # 2 ends nothing now: what ended there goes on
        assert new[: len(kept)] == kept
        assert len(new) == 12 or new[-1] in (1, 3)
        assert not set(new[:-1]) & {1, 3}
    grown = [
        len(new) > len(old)
        for old, new in zip(responses(stop_at_2), responses(stop_at_1), strict=True)
    ]
    assert any(grown)


def test_more_samples_than_before_are_plain_rollouts() -> None:
    session = RolloutSession(MarkovEngine(policy(3)), OneHot())
    session.rollout([[0], [1]], 2, SAMPLING, step=0, epoch=0)
    rolled = session.rollout([[0], [2]], 4, SAMPLING, step=1, epoch=1)
    assert rolled.stats.num_drafts == 2  # samples 0 and 1 of prompt [0]
    assert rolled.stats.num_cache_misses == 6
    again = session.rollout([[2], [0], [1]], 2, SAMPLING, step=2, epoch=1)
    assert again.stats.num_cache_misses == 0


def test_user_keys_keep_equal_prompts_apart() -> None:
    session = RolloutSession(MarkovEngine(policy(3)), OneHot())
    rolled = session.rollout([[0], [0]], 8, SAMPLING, step=0, epoch=0, user_keys=["math", "code"])
    assert responses(rolled)[:8] != responses(rolled)[8:]
    rolled = session.rollout([[0]], 8, SAMPLING, step=1, epoch=1, user_keys=["code"])
    assert rolled.stats.num_cache_misses == 0
    assert session.rollout([[0]], 8, SAMPLING, step=2, epoch=1).stats.num_cache_misses == 8


@pytest.mark.parametrize("rule", [Coupled(), Lenient(0.0)])
def test_rows_named_by_bytes_that_begin_alike_draw_different_noise(rule: AcceptanceRule) -> None:
    session = RolloutSession(MarkovEngine(policy(3)), rule)
    names = [f"gsm8k/train/{i}".encode() for i in range(8)]
    rolled = session.rollout([[0]] * 8, 1, SAMPLING, step=0, epoch=0, user_keys=names)
    assert len(set(map(tuple, responses(rolled)))) > 1
    rolled = session.rollout([[1]], 1, SAMPLING, step=1, epoch=1, user_keys=names[5:6])
    assert rolled.stats.num_cache_misses == 0


@pytest.mark.parametrize(
    ("names", "match"),
    [
        ([bytes(16), b"short"], r"user_keys\[1\]: expected at least 8 bytes, got 5"),
        ([b"math/train/00001", b"math/train/00002"], r"user_keys\[1\]: expected the 16 bytes of a"),
    ],
)
def test_bytes_that_name_no_row_are_refused(names: list[bytes], match: str) -> None:
    session = RolloutSession(MarkovEngine(policy(3)), Coupled())
    with pytest.raises(ValueError, match=match):
        session.rollout([[0], [1]], 1, SAMPLING, step=0, epoch=0, user_keys=names)


def test_reuse_off_and_rules_without_drafts_leave_the_cache_alone() -> None:
    results = []
    for rule, reuse in [
        (Lenient(0.5), False),
        (OneHot(), False),
        (NoReuse(), True),
        (Lenient(float("-inf")), True),
    ]:
        cache = RolloutCache()
        filler = RolloutSession(MarkovEngine(policy(3)), OneHot(), cache=cache, seed=1)
        filler.rollout([[0], [1]], 4, SAMPLING, step=0, epoch=0)
        before = cache.stats
        session = RolloutSession(MarkovEngine(policy(3)), rule, cache=cache, seed=1, reuse=reuse)
        rolled = session.rollout([[0], [1]], 4, SAMPLING, step=1, epoch=1)
        assert cache.stats == before
        assert rolled.stats.num_drafts == rolled.stats.num_cache_misses == 0
        results.append(responses(rolled))
    assert all(result == results[0] for result in results)  # one plain sampling, four ways to ask


def test_evaluation_is_plain_sampling_beside_the_training_run() -> None:
    cache = RolloutCache()
    engine = MarkovEngine(policy(3))
    session = RolloutSession(engine, Lenient(float("inf")), cache=cache, seed=1)
    trained = session.rollout([[0], [1]], 8, SAMPLING, step=0, epoch=0)
    engine.update_weights([("logits", policy(3, drift=0.8))])
    before = cache.stats
    first = session.evaluate([[0], [1]], 8, SAMPLING, step=0)
    assert cache.stats == before
    assert first.stats.num_drafts == 0
    assert responses(first) != responses(trained)
    bare = RolloutSession(engine, NoReuse(), seed=1)
    assert responses(bare.evaluate([[0], [1]], 8, SAMPLING, step=0)) == responses(first)
    assert responses(bare.evaluate([[0], [1]], 8, SAMPLING, step=1)) != responses(first)
    # Noise of its own: not what training would draw at that step with the same weights.
    trained = bare.rollout([[0], [1]], 8, SAMPLING, step=0, epoch=0)
    assert responses(trained) != responses(first)


def test_evaluation_follows_the_law_of_the_current_weights() -> None:
    engine = MarkovEngine(policy(1))
    session = RolloutSession(engine, Lenient(float("inf")), seed=1)
    one = SamplingParams(max_tokens=1)
    session.rollout([[0]], 50_000, one, step=0, epoch=0)
    engine.update_weights([("logits", policy(1, drift=0.8))])
    rolled = session.evaluate([[0]], 50_000, one, step=0)
    p = policy(1, drift=0.8).double().softmax(-1).numpy()
    assert_law(np.bincount(rolled.response_ids.numpy(), minlength=VOCAB), p[0])


def test_aborted_rollouts_are_returned_but_are_no_drafts() -> None:
    session = RolloutSession(MarkovEngine(policy(3), abort_after=1), OneHot())
    rolled = session.rollout([[0]], 4, SamplingParams(max_tokens=6), step=0, epoch=0)
    assert rolled.finish_reasons.tolist() == [1, 1, 2, 2]
    rolled = session.rollout([[0]], 4, SamplingParams(max_tokens=6), step=1, epoch=1)
    assert rolled.stats.num_cache_misses == 2


def test_a_schedule_moves_the_rule_with_the_step() -> None:
    def reused(rule: AcceptanceRule | Schedule, step: int) -> int:
        engine = MarkovEngine(policy(3))
        session = RolloutSession(engine, rule, seed=1)
        session.rollout([[0], [1]], 200, SAMPLING, step=100, epoch=0)
        engine.update_weights([("logits", policy(3, drift=0.8))])
        return session.rollout(
            [[0], [1]], 200, SAMPLING, step=step, epoch=1
        ).stats.num_reused_tokens

    schedule = Schedule(Lenient(4.0), start_log_lenience=-4.0, num_steps=10)
    there = {step: reused(schedule, step) for step in (0, 5, 10, 11)}
    rules = {0: Lenient(-4.0), 5: Lenient(0.0), 10: Lenient(4.0), 11: Lenient(4.0)}
    assert there == {step: reused(rule, step) for step, rule in rules.items()}
    assert there[0] < there[5] < there[10]


def test_the_stats_count_the_batch() -> None:
    session = RolloutSession(MarkovEngine(policy(3)), Lenient(0.5))
    prompts = [[i % VOCAB, i // VOCAB] for i in range(25)]
    for step in range(2):
        rolled = session.rollout(prompts, 40, SAMPLING, step=step, epoch=step)
        stats = rolled.stats
        assert stats.num_rollouts == rolled.batch == 1000
        assert stats.num_cache_misses == (1000 if step == 0 else 0)
        assert stats.num_drafts == 1000 - stats.num_cache_misses
        assert stats.num_response_tokens == rolled.response_ids.numel()
        assert stats.num_reused_tokens == int(rolled.accepted_lens.sum())


def test_what_a_baseline_throws_away_counts_as_draft() -> None:
    session = RolloutSession(MarkovEngine(policy(3)), RandomReuse(0.25))
    first = session.rollout([[0]], 400, SAMPLING, step=0, epoch=0)
    again = session.rollout([[0]], 400, SAMPLING, step=1, epoch=1)
    assert again.stats.num_drafts == 400
    assert again.stats.num_draft_tokens == first.stats.num_response_tokens
    assert 0.15 < again.stats.num_reused_tokens / again.stats.num_draft_tokens < 0.35


def test_rollout_seconds_run_from_the_first_line_to_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a clock that ticks once per look, lookup and storing take one tick each."""
    ticks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: float(next(ticks)))
    monkeypatch.setattr("spec_rollout.rollout.time", clock)
    session = RolloutSession(MarkovEngine(policy(3)), Lenient(0.5))
    stats = session.rollout([[0]], 4, SAMPLING, step=0, epoch=0).stats
    looks = next(ticks)
    assert stats.rollout_seconds == looks - 1
    assert stats.lookup_seconds == stats.store_seconds == 1
    assert session.evaluate([[0]], 4, SAMPLING, step=0).stats.rollout_seconds == 1


def test_drafting_needs_an_engine_that_proposes() -> None:
    message = (
        r"drafting: expected False with MarkovEngine, which does not propose from history; got True"
    )
    with pytest.raises(ValueError, match=message):
        RolloutSession(MarkovEngine(policy(3)), Coupled(), drafting=True)


class Recorder(MarkovEngine):
    """Keeps what it was asked."""

    supports_history = True
    requests: RolloutRequests

    def rollout(self, requests, *args):
        self.requests = requests
        return super().rollout(requests, *args)


@pytest.mark.parametrize("rule", [NoReuse(), Coupled(), RandomCut()], ids=str)
def test_history_is_every_cached_rollout_of_the_prompts(rule: AcceptanceRule) -> None:
    """Whole, by prompt, also where the rule has no drafts or cuts them unseen."""
    engine = Recorder(policy(3))
    session = RolloutSession(engine, rule, drafting=True)
    first = session.rollout([[0], [1]], 3, SAMPLING, step=0, epoch=0)
    assert engine.requests.history is not None
    assert engine.requests.history.token_ids.numel() == 0
    session.rollout([[1], [2], [0]], 3, SAMPLING, step=1, epoch=1)
    history = engine.requests.history
    rows = [row.tolist() for row in history.token_ids.split(history.cu_lens.diff().tolist())]
    assert rows == [*responses(first)[3:], [], [], [], *responses(first)[:3]]
    assert (
        history.row_groups.tolist()
        == history.request_groups.tolist()
        == [0] * 3 + [1] * 3 + [2] * 3
    )
    assert engine.requests.drafts.token_ids.numel() == 0 or rule.uses_drafts
    session = RolloutSession(engine, rule, cache=session.cache)
    session.rollout([[0]], 3, SAMPLING, step=2, epoch=2)
    assert engine.requests.history is None


def test_the_test_engine_is_an_engine() -> None:
    assert isinstance(MarkovEngine(policy(3)), RolloutEngine)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"prompts": []}, "prompts: expected at least one, got none"),
        ({"prompts": [[0], []]}, r"prompts\[1\]: expected at least one token"),
        ({"prompts": [[0], [1.5]]}, r"prompts\[1\]: .*integers, got float64"),
        ({"prompts": [[[0]]]}, r"prompts\[0\]: .*shape \[1, 1\]"),
        ({"prompts": [[0], [1], [-1]]}, r"prompts\[2\]: .*got -1"),
        ({"prompts": [[2**31]]}, r"prompts\[0\]: .*2147483648"),
        ({"prompts": [7]}, r"prompts\[0\]: .*shape \[\]"),
        ({"prompts": ["text"]}, r"prompts\[0\]: .*integers"),
        ({"num_samples": 0}, "num_samples: expected >= 1, got 0"),
        ({"step": -1}, "step: expected >= 0, got -1"),
        ({"epoch": -2}, "epoch: expected >= 0, got -2"),
        ({"user_keys": ["a", "b"]}, r"user_keys: expected one per prompt \(1\), got 2"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(change: dict, match: str) -> None:
    engine, cache = MarkovEngine(policy(3)), RolloutCache()
    session = RolloutSession(engine, OneHot(), cache=cache)
    good = {"prompts": [[0]], "num_samples": 2, "sampling": SAMPLING, "step": 0, "epoch": 0}
    with pytest.raises(ValueError, match=match):
        session.rollout(**(good | change))
    if "epoch" not in change:
        del good["epoch"]
        with pytest.raises(ValueError, match=match):
            session.evaluate(**(good | change))
    assert engine.num_calls == 0
    stats = cache.stats
    assert (stats.hits, stats.misses, stats.num_groups) == (0, 0, 0)


def test_a_rule_that_needs_logprobs_refuses_a_cache_without(tmp_path: Path) -> None:
    lean = RolloutCache(keep_logprobs=False)
    for rule in (Lenient(0.5), Schedule(Lenient(0.5), start_log_lenience=0.0, num_steps=9)):
        with pytest.raises(ValueError, match="cache: expected one that keeps log-probs"):
            RolloutSession(MarkovEngine(policy(3)), rule, cache=lean)
    RolloutSession(MarkovEngine(policy(3)), Lenient(0.5), cache=lean, reuse=False)
    session = RolloutSession(MarkovEngine(policy(3)), Coupled(), cache=lean)
    session.rollout([[0]], 2, SAMPLING, step=0, epoch=0)
    assert session.rollout([[0]], 2, SAMPLING, step=1, epoch=1).stats.num_generated_tokens == 0

    lean.save(tmp_path / "lean")
    loaded, engine = RolloutCache(), MarkovEngine(policy(3))
    loaded.load(tmp_path / "lean")
    session = RolloutSession(engine, Lenient(0.5), cache=loaded)
    with pytest.raises(ValueError, match=r"cache: expected drafts with log-probs, as Lenient"):
        session.rollout([[0]], 2, SAMPLING, step=1, epoch=1)
    assert engine.num_calls == 0
    session.rollout([[1]], 2, SAMPLING, step=1, epoch=1)  # no draft, nothing lacking


def test_bad_refresh_is_refused() -> None:
    with pytest.raises(ValueError, match=r"refresh_epochs: .*got 0"):
        RolloutSession(MarkovEngine(policy(3)), Coupled(), refresh_epochs=0)


def test_a_failing_engine_leaves_the_drafts() -> None:
    engine = MarkovEngine(policy(3))
    session = RolloutSession(engine, Coupled())
    first = session.rollout([[0]], 4, SAMPLING, step=0, epoch=0)
    with pytest.raises(ValueError, match="prompt_ids: expected < 5, got 6"):
        session.rollout([[0], [6]], 4, SAMPLING, step=1, epoch=1)
    again = session.rollout([[0]], 4, SAMPLING, step=2, epoch=1)
    assert responses(again) == responses(first)
    assert again.stats.num_cache_misses == 0


def test_rows_that_are_not_those_asked_for_are_not_stored() -> None:
    class Misordering(MarkovEngine):
        def rollout(
            self, requests: RolloutRequests, sampling: SamplingParams, acceptance: AcceptanceRule
        ) -> Rollouts:
            rollouts = super().rollout(requests, sampling, acceptance)
            return replace(rollouts, prompt_ids=rollouts.prompt_ids.flip(0))

    session = RolloutSession(Misordering(policy(3)), OneHot())
    with pytest.raises(RuntimeError, match="engine Misordering: expected the 2 requests back"):
        session.rollout([[0], [1]], 1, SAMPLING, step=0, epoch=0)
    assert session.cache.stats.num_groups == 0


def test_engines_are_told_how_long_responses_were() -> None:
    told: list[torch.Tensor | None] = []
    session = RolloutSession(MarkovEngine(policy(1)), NoReuse(), drafting=False, reuse=False)
    session.on_requests = lambda requests, rule: told.append(requests.expected_lens)
    session.rollout([[0], [1]], 3, SAMPLING, step=0, epoch=0)
    session.rollout([[0], [1]], 3, SAMPLING, step=1, epoch=1)
    assert told == [None, None]  # nothing is looked up

    told.clear()
    session = RolloutSession(MarkovEngine(policy(1)), Coupled())
    session.on_requests = lambda requests, rule: told.append(requests.expected_lens)
    first = session.rollout_rows([[0], [0], [1]], [0, 1, 0], SAMPLING, step=0, epoch=0)
    lens = first.response_lens.tolist()
    rows = ([[2], [0], [1], [0], [0]], [0, 1, 0, 5, 0])
    session.rollout_rows(*rows, SAMPLING, step=1, epoch=1)
    assert told[0] is None
    assert told[1] is not None
    # Unknown prompts may take all there is, unknown samples as much as the longest of their prompt.
    assert told[1].tolist() == [
        SAMPLING.max_tokens,
        lens[1],
        lens[2],
        max(lens[:2]),
        lens[0],
    ]


def test_responses_that_nothing_ends_are_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    def told(engine: MarkovEngine, sampling: SamplingParams) -> int:
        caplog.clear()
        session = RolloutSession(engine, NoReuse())
        session.evaluate([[0]], 2, sampling, step=0)
        session.rollout([[0]], 2, sampling, step=0, epoch=0)
        return caplog.text.count("SamplingParams(stop_token_ids=(4,)) would end them there")

    endless = SamplingParams(max_tokens=4)
    engine = MarkovEngine(policy(1))
    assert told(engine, endless) == 0  # it does not say what ends a text
    engine.eos_token_ids = (STOP,)  # type: ignore[attr-defined]
    assert told(engine, endless) == 1
    assert told(engine, SAMPLING) == 0
