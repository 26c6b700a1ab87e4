"""The laws of acceptance rules, on real samples of the engine, against their closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from laws import SMALLEST_P, assert_law, p_value
from vllm_samples import VOCAB, make_requests

from spec_rollout.acceptance import AcceptanceRule, Coupled, Lenient, OneHot
from spec_rollout.drafting import Payoff, StepCost
from spec_rollout.packed import cu_lens_from
from spec_rollout.types import Drafts, History, RolloutRequests, SamplingParams

NUM_REQUESTS = 20_000
PROMPT = np.array([11, 29, 5, 47, 8], np.int32)

pytestmark = pytest.mark.slow


def target_probs(model: Any, context: list[int], sampling: SamplingParams) -> np.ndarray:
    """The sampling distribution after `context`, float64. [VOCAB]."""
    with torch.no_grad():
        x = model(torch.tensor([context])).logits[0, -1].double() / sampling.temperature
    if sampling.top_k:
        x[x < x.topk(sampling.top_k).values[-1]] = -torch.inf
    if sampling.top_p < 1:
        ordered, ids = x.sort(descending=True)
        probs = ordered.softmax(-1)
        x[ids[probs.cumsum(-1) - probs >= sampling.top_p]] = -torch.inf
    return x.softmax(-1).numpy()


def lenient_law(p: np.ndarray, q: np.ndarray, log_lenience: float) -> np.ndarray:
    kept = np.minimum(q, np.exp(log_lenience) * p)
    return kept + (1 - kept.sum()) * p


def sample_at(
    engine: Any,
    model: Any,
    rule: AcceptanceRule,
    sampling: SamplingParams,
    *,
    prefix: list[int],
    drafted: np.ndarray,
    draft_logprobs: np.ndarray,
    seed: int,
) -> np.ndarray:
    """Counts of the response's token at position len(prefix), whose drafts are `drafted`. [VOCAB].

    The prefix is accepted for sure: under `Lenient` it claims to have been next to impossible when
    it was drawn.
    """
    n = len(prefix)
    tokens = np.concatenate(
        [np.tile(np.array(prefix, np.int32), (drafted.size, 1)), drafted[:, None]], 1
    )
    logprobs = np.concatenate([np.full((drafted.size, n), -80.0), draft_logprobs[:, None]], 1)
    flat = torch.from_numpy(tokens.astype(np.int32).ravel())
    base = make_requests([PROMPT] * drafted.size, seed=seed)
    requests = RolloutRequests(
        base.prompt_ids,
        base.cu_prompt_lens,
        base.keys,
        Drafts(
            flat,
            cu_lens_from(torch.full((drafted.size,), n + 1)),
            torch.from_numpy(logprobs.astype(np.float32).ravel()),
            torch.zeros(drafted.size, dtype=torch.bool),
        ),
    )
    rollouts = engine.rollout(requests, sampling, rule)
    responses = rollouts.response_ids.reshape(drafted.size, n + 1).numpy()
    assert (responses[:, :n] == np.array(prefix)).all()
    # Log-probs are the target's, whatever was drafted.
    found = rollouts.logprobs.reshape(drafted.size, n + 1)[:, n].numpy()
    expected = np.log(target_probs(model, [*PROMPT, *prefix], sampling)[responses[:, n]])
    np.testing.assert_allclose(found, expected, atol=2e-4)
    accepted = rollouts.accepted_lens.numpy() == n + 1
    assert (responses[accepted, n] == drafted[accepted]).all()
    assert 0 < accepted.sum() < drafted.size
    return np.bincount(responses[:, n], minlength=VOCAB)


# Where the tested token sits: after the prefill; inside a chunk; in the row after a chunk (vLLM's
# bonus). (tokens of the draft before it, num_speculative_tokens)
PLACES = {"after prefill": (0, 64), "in chunk": (2, 64), "after chunk": (2, 1)}
SAMPLINGS = {
    "plain": SamplingParams(max_tokens=1),
    "filtered": SamplingParams(temperature=0.8, top_k=24, top_p=0.9, max_tokens=1),
}


def likely_prefix(
    model: Any, length: int, sampling: SamplingParams, after: list[int] | None = None
) -> list[int]:
    prefix = list(after or [])
    for _ in range(length):
        prefix.append(int(target_probs(model, [*PROMPT, *prefix], sampling).argmax()))
    return prefix[-length:] if length else []


def with_len(sampling: SamplingParams, n: int) -> SamplingParams:
    return SamplingParams(sampling.temperature, sampling.top_k, sampling.top_p, max_tokens=n)


@pytest.fixture(scope="module")
def law_engine(make_engine: Any) -> Any:
    def make(k: int) -> Any:
        return make_engine(
            num_speculative_tokens=k,
            max_num_seqs=256,
            max_num_batched_tokens=4096,
            num_gpu_blocks_override=1024,
        )

    return make


@pytest.mark.parametrize(
    ("place", "sampling"),
    [(p, s) for p in PLACES for s in SAMPLINGS if p != "in chunk" or s == "filtered"],
)
def test_lenient_law(law_engine: Any, hf_model: Any, place: str, sampling: str) -> None:
    length, k = PLACES[place]
    params = with_len(SAMPLINGS[sampling], length + 1)
    prefix = likely_prefix(hf_model, length, params)
    p = target_probs(hf_model, [*PROMPT, *prefix], params)
    rng = np.random.default_rng(1)
    q = (p + rng.dirichlet(np.ones(VOCAB))) / 2
    drafted = rng.choice(VOCAB, NUM_REQUESTS, p=q)
    counts = sample_at(
        law_engine(k), hf_model, Lenient(0.0), params,
        prefix=prefix, drafted=drafted, draft_logprobs=np.log(q[drafted]), seed=2,
    )  # fmt: skip
    assert_law(counts, lenient_law(p, q, 0.0))
    assert p_value(counts, p) < SMALLEST_P  # the test can tell: it is not the target's law


def test_laws_with_history(law_engine: Any, hf_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lenient's law at the draft's token, and the target's behind it, with likely proposals."""
    # As much as there is, whatever it costs.
    monkeypatch.setattr(Payoff, "threshold", lambda self, rows: 0.0)
    monkeypatch.setattr(Payoff, "worth", lambda self, rows, proposed, expected, **_: proposed > 0)
    monkeypatch.setattr(StepCost, "room", lambda self, rows: 10**6)
    monkeypatch.setattr(Payoff, "pays", lambda self, rows: True)
    params = SamplingParams(max_tokens=6)
    p = target_probs(hf_model, list(PROMPT), params)
    rng = np.random.default_rng(8)
    q = (p + rng.dirichlet(np.ones(VOCAB))) / 2
    count = NUM_REQUESTS // 2
    drafted = rng.choice(VOCAB, count, p=q).astype(np.int32)
    # Behind every token, what is likeliest there: with the wrong test, these would come too often.
    rows = [[t, *likely_prefix(hf_model, 3, params, [t])] for t in range(VOCAB)]
    base = make_requests([PROMPT] * count, seed=9)
    requests = RolloutRequests(
        base.prompt_ids,
        base.cu_prompt_lens,
        base.keys,
        Drafts(
            torch.from_numpy(drafted),
            cu_lens_from(torch.ones(count, dtype=torch.int64)),
            torch.from_numpy(np.log(q[drafted]).astype(np.float32)),
            torch.zeros(count, dtype=torch.bool),
        ),
        History(
            torch.tensor(rows * 20, dtype=torch.int32).ravel(),
            cu_lens_from(torch.full((20 * VOCAB,), 4)),
            torch.arange(20).repeat_interleave(VOCAB),
            torch.arange(count) % 20,
        ),
    )
    rollouts = law_engine(64).rollout(requests, params, Lenient(0.0))
    assert rollouts.stats.num_accepted_proposals > count // 10
    out = rollouts.response_ids.reshape(count, 6).numpy()
    assert_law(np.bincount(out[:, 0], minlength=VOCAB), lenient_law(p, q, 0.0))
    common = int(np.bincount(out[:, 0]).argmax())
    rows_at = out[out[:, 0] == common]
    for position in (1, 2):
        # Of all that came before in these rows: each law by how often it was asked.
        before, times = np.unique(rows_at[:, :position], axis=0, return_counts=True)
        laws = [target_probs(hf_model, [*PROMPT, *ids.tolist()], params) for ids in before]
        law = np.average(laws, axis=0, weights=times)
        assert_law(np.bincount(rows_at[:, position], minlength=VOCAB), law)


def test_lenient_law_with_lenience(law_engine: Any, hf_model: Any) -> None:
    params = SamplingParams(max_tokens=1)
    p = target_probs(hf_model, list(PROMPT), params)
    rng = np.random.default_rng(3)
    q = (p + rng.dirichlet(np.ones(VOCAB))) / 2
    drafted = rng.choice(VOCAB, NUM_REQUESTS, p=q)
    counts = sample_at(
        law_engine(64), hf_model, Lenient(0.5), params,
        prefix=[], drafted=drafted, draft_logprobs=np.log(q[drafted]), seed=4,
    )  # fmt: skip
    assert_law(counts, lenient_law(p, q, 0.5))
    assert p_value(counts, lenient_law(p, q, 0.0)) < SMALLEST_P


@pytest.mark.parametrize("sampling", list(SAMPLINGS))
def test_one_hot_law_is_the_targets(law_engine: Any, hf_model: Any, sampling: str) -> None:
    params = SAMPLINGS[sampling]
    p = target_probs(hf_model, list(PROMPT), params)
    # The likeliest token, always: the worst bias if rejection did not exclude it.
    drafted = np.full(NUM_REQUESTS, int(p.argmax()))
    counts = sample_at(
        law_engine(64), hf_model, OneHot(), params,
        prefix=[], drafted=drafted, draft_logprobs=np.zeros(NUM_REQUESTS), seed=5,
    )  # fmt: skip
    assert_law(counts, p)
    biased = (1 - p[drafted[0]]) * p
    biased[drafted[0]] += p[drafted[0]]
    assert p_value(counts, biased) < SMALLEST_P


@pytest.mark.parametrize("k", [1, 64])
def test_one_hot_law_inside_a_draft(law_engine: Any, hf_model: Any, k: int) -> None:
    """Drafts of three tokens: position 2 where the first two passed, and position 1 of all."""
    params = SamplingParams(max_tokens=3)
    context = list(PROMPT)
    draft = []
    for _ in range(3):
        draft.append(int(target_probs(hf_model, context + draft, params).argmax()))
    tokens = np.tile(np.array(draft, np.int32), (2 * NUM_REQUESTS, 1))
    base = make_requests([PROMPT] * len(tokens), seed=6)
    drafts = Drafts(
        torch.from_numpy(tokens.ravel()),
        cu_lens_from(torch.full((len(tokens),), 3)),
        None,
        torch.zeros(len(tokens), dtype=torch.bool),
    )
    requests = RolloutRequests(base.prompt_ids, base.cu_prompt_lens, base.keys, drafts)
    out = law_engine(k).rollout(requests, params, OneHot()).response_ids.reshape(-1, 3).numpy()
    rows = np.arange(len(out))
    for position in range(3):
        rows = rows if position == 0 else rows[out[rows, position - 1] == draft[position - 1]]
        p = target_probs(hf_model, context + draft[:position], params)
        counts = np.bincount(out[rows, position], minlength=VOCAB)
        assert counts.sum() > 200
        assert_law(counts, p)


def test_coupled_law_is_the_targets(law_engine: Any, hf_model: Any) -> None:
    params = SAMPLINGS["filtered"]
    p = target_probs(hf_model, list(PROMPT), params)
    drafted = np.full(NUM_REQUESTS, int(p.argmax()))
    counts = sample_at(
        law_engine(64), hf_model, Coupled(), params,
        prefix=[], drafted=drafted, draft_logprobs=np.zeros(NUM_REQUESTS), seed=7,
    )  # fmt: skip
    assert_law(counts, p)
