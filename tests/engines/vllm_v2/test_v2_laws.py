"""The laws of the rules on Model Runner V2, on real samples, against their closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from laws import p_value
from v2_samples import VOCAB, drafted, generate, params

from spec_rollout.acceptance import AcceptanceRule, Coupled, Lenient, OneHot

PROMPT = [11, 29, 5, 47, 8]
# Tokens of the draft before the tested one, and the engine's widest chunk.
PLACES = {"after prefill": (0, 8), "in chunk": (2, 8), "after chunk": (2, 1)}


@pytest.fixture(scope="module")
def model(model_dir: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir).float().eval()


def target(
    model: Any, context: list[int], *, temperature: float = 1.0, top_k: int = 0
) -> np.ndarray:
    """The sampling distribution after a context. [VOCAB], float64."""
    with torch.no_grad():
        logits = model(torch.tensor([context])).logits[0, -1].double() / temperature
    if top_k:
        logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
    return logits.softmax(-1).numpy()


def lenient_law(p: np.ndarray, q: np.ndarray, log_lenience: float) -> np.ndarray:
    kept = np.minimum(q, np.exp(log_lenience) * p)
    return kept + (1 - kept.sum()) * p


def drawn(
    llm: Any,
    rule: AcceptanceRule,
    prefix: list[int],
    tokens: np.ndarray,
    logprobs: np.ndarray,
    **kw: Any,
) -> np.ndarray:
    """Counts of the token behind `prefix`, which is taken for sure. [VOCAB].

    Under `Lenient` the prefix claims to have been next to impossible when it was drawn.
    """
    n = len(prefix)
    sampling = [
        drafted(
            params(10_000 + i, max_tokens=n + 1, **kw),
            [*prefix, int(token)],
            rule,
            key=20_000 + i,
            logprobs=np.array([-80.0] * n + [logprob], np.float32),
        )
        for i, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True))
    ]
    rows = np.array(generate(llm, [PROMPT] * len(sampling), sampling).tokens)
    assert (rows[:, :n] == prefix).all()
    return np.bincount(rows[:, n], minlength=VOCAB)


@pytest.mark.v2_large
@pytest.mark.parametrize("place", list(PLACES))
def test_lenient_law(make_llm: Any, model: Any, place: str) -> None:
    length, k = PLACES[place]
    kw = {"temperature": 0.8, "top_k": 6}
    prefix: list[int] = []
    for _ in range(length):
        prefix.append(int(target(model, [*PROMPT, *prefix], **kw).argmax()))
    p = target(model, [*PROMPT, *prefix], **kw)
    rng = np.random.default_rng(1)
    q = np.zeros(VOCAB)
    q[p > 0] = rng.dirichlet(np.ones(int((p > 0).sum())))
    tokens = rng.choice(VOCAB, 3000, p=q)
    llm = make_llm(k, max_num_seqs=128, num_gpu_blocks_override=256, max_num_batched_tokens=1024)
    counts = drawn(llm, Lenient(0.3), prefix, tokens, np.log(q[tokens]), **kw)
    assert p_value(counts, lenient_law(p, q, 0.3)) > 1e-4
    # The test can tell: it is neither the target's law, nor that of another lenience.
    assert p_value(counts, p) < 1e-6
    assert p_value(counts, lenient_law(p, q, -0.7)) < 1e-4


@pytest.mark.v2_large
@pytest.mark.parametrize("rule", [OneHot(), Coupled()])
def test_lossless_laws(make_llm: Any, model: Any, rule: AcceptanceRule) -> None:
    p = target(model, PROMPT, top_k=6)
    tokens = np.full(3000, int(p.argmax()))
    llm = make_llm(8, max_num_seqs=128, num_gpu_blocks_override=256, max_num_batched_tokens=1024)
    counts = drawn(llm, rule, [], tokens, np.zeros(3000), top_k=6)
    assert p_value(counts, p) > 1e-4
    biased = (1 - p[tokens[0]]) * p
    biased[tokens[0]] += p[tokens[0]]
    assert p_value(counts, biased) < 1e-6


def test_a_rejected_draft_is_not_taken_up_again(make_llm: Any, model: Any) -> None:
    """Not even where the draw that followed gave the draft's token."""
    likely = [int(target(model, PROMPT).argmax())]
    for _ in range(3):
        likely.append(int(target(model, [*PROMPT, *likely]).argmax()))
    # The first is rejected for sure, whatever it claims of the others.
    logprobs = np.array([80.0, -80.0, -80.0, -80.0], np.float32)
    cold = [params(i, max_tokens=4, temperature=0.3) for i in range(24)]
    sampling = [drafted(cold[i], likely, Lenient(0.0), key=i, logprobs=logprobs) for i in range(24)]
    llm = make_llm(8)
    plain = generate(make_llm(), [PROMPT] * 24, cold)
    assert sum(row[0] == likely[0] for row in plain.tokens) > 2
    assert generate(llm, [PROMPT] * 24, sampling).tokens == plain.tokens


def test_the_bonus_of_coupled(make_llm: Any) -> None:
    """With a large one the draft is given whole, with none nothing of it."""
    draft = [3, 4, 5, 6]
    given = [
        drafted(params(i, max_tokens=6), draft, Coupled(bonus))
        for i, bonus in enumerate((60.0, 0.0))
    ]
    plain = generate(make_llm(), [PROMPT] * 2, [params(i, max_tokens=6) for i in range(2)])
    tokens = generate(make_llm(8), [PROMPT] * 2, given).tokens
    assert tokens[0][:4] == draft
    assert tokens[1] == plain.tokens[1]
