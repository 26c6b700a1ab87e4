"""The laws of the rules on Model Runner V2, on real samples, against their closed forms.

Triton's interpreter takes milliseconds for a row of logits, so every row counts. A request makes two
steps, and shows a string of tokens: one behind its prompt, and those of the chunk that follows, up to
the first that is not the draft's. So each string has draft tokens tested behind a prefill, in a chunk
and behind one; the law of the strings is known, and with it that of the tokens at each place.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from laws import SMALLEST_P, p_value
from v2_samples import VOCAB, drafted, generate, params

from spec_rollout.acceptance import AcceptanceRule, Coupled, Lenient, OneHot

PROMPT = [11, 29, 5, 47, 8]
# Tokens proposed at a time, and of a draft: one behind the prefill, a chunk, and one behind it.
CHUNK = 2
DRAFT_LEN = 2 + CHUNK
SLOTS = 128
String = tuple[int, ...]
# Given the tokens before: the probabilities of the next where the draft is followed further, and
# where it ends. [2, VOCAB].
Split = Callable[[String], np.ndarray]
# Given the tokens before: the law of the next one of a draft. [VOCAB].
DraftLaw = Callable[[String], np.ndarray]
# What is compared with its law at each place, None where a string does not come so far.
PLACES: dict[str, Callable[[String], Any]] = {
    "after prefill": lambda s: s[0],
    "in chunk": lambda s: (s[1], len(s) == 2),
    "further in chunk": lambda s: (s[2], len(s) == 3) if len(s) > 2 else None,
    "after chunk": lambda s: s[3] if len(s) == 4 else None,
}


@pytest.fixture(scope="module")
def model(model_dir: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir).float().eval()


@pytest.fixture(scope="module")
def llm(make_llm: Any) -> Any:
    return make_llm(
        CHUNK, max_num_seqs=SLOTS, num_gpu_blocks_override=2 * SLOTS, max_num_batched_tokens=1024
    )


class Target:
    """The sampling distributions of responses to PROMPT."""

    def __init__(self, model: Any, *, temperature: float = 1.0, top_k: int = 0) -> None:
        self._model = model
        self._temperature = temperature
        self._top_k = top_k
        self._known: dict[String, np.ndarray] = {}

    def __call__(self, response: Iterable[int] = ()) -> np.ndarray:
        """That of the token behind `response`. [VOCAB], float64."""
        given = tuple(response)
        if given not in self._known:
            with torch.no_grad():
                logits = self._model(torch.tensor([[*PROMPT, *given]])).logits[0, -1]
            logits = logits.double() / self._temperature
            if self._top_k:
                logits[logits < logits.topk(self._top_k).values[-1]] = -torch.inf
            self._known[given] = logits.softmax(-1).numpy()
        return self._known[given]


def contrary(target: Target) -> DraftLaw:
    """Drafts prefer what the target does not: its law the other way round."""

    def law(given: String) -> np.ndarray:
        p = target(given)
        support = np.flatnonzero(p)
        support = support[p[support].argsort()]
        q = np.zeros_like(p)
        q[support] = p[support][::-1]
        return q

    return law


def contrary_at_last(target: Target) -> DraftLaw:
    """Drafts of which most come to their last token, and that is of `contrary`."""

    def law(given: String) -> np.ndarray:
        q = contrary(target)(given)
        return q if len(given) == DRAFT_LEN - 1 else (target(given) + q) / 2

    return law


def likeliest(target: Target) -> DraftLaw:
    """All drafts have the likeliest tokens."""

    def law(given: String) -> np.ndarray:
        p = target(given)
        return (np.arange(p.size) == p.argmax()).astype(float)

    return law


def lenient(target: Target, drafts: DraftLaw, log_lenience: float) -> Split:
    """What `Lenient` does."""

    def split(given: String) -> np.ndarray:
        p = target(given)
        kept = np.minimum(drafts(given), np.exp(log_lenience) * p)
        return np.stack([kept, (1 - kept.sum()) * p])

    return split


def unbiased(target: Target, drafts: DraftLaw) -> Split:
    """What speculative sampling does, which keeps the target's law."""

    def split(given: String) -> np.ndarray:
        p = target(given)
        kept = np.minimum(drafts(given), p)
        return np.stack([kept, p - kept])

    return split


def by_draw(target: Target, drafts: DraftLaw) -> Split:
    """A draft's token is kept where it is what a draw gives."""

    def split(given: String) -> np.ndarray:
        kept = drafts(given) * target(given)
        return np.stack([kept, target(given) - kept])

    return split


def drawn_again(target: Target, drafts: DraftLaw) -> Split:
    """The same if a rejected token may be drawn again, by other noise than it was tested by."""

    def split(given: String) -> np.ndarray:
        kept = drafts(given) * target(given)
        return np.stack([kept, (1 - kept.sum()) * target(given)])

    return split


def string_law(split: Split, target: Target) -> dict[String, float]:
    """The probability of each string that two steps may show."""
    law: Counter[String] = Counter()

    def add(given: String, prob: float) -> None:
        kept, ended = prob * split(given)
        for token in np.flatnonzero(kept + ended).tolist():
            string = (*given, token)
            if len(string) == DRAFT_LEN:
                law[string] += kept[token] + ended[token]
                continue
            if kept[token]:
                add(string, kept[token])
            if given:
                law[string] += ended[token]
                continue
            # The second step only draws.
            for last, p in enumerate(target(string)):
                if p:
                    law[*string, last] += ended[token] * p

    add((), 1.0)
    return dict(law)


def p_values(found: Counter[String], law: dict[String, float]) -> dict[str, float]:
    """Of the tokens at each place; all 0 if a string is impossible."""
    if not found.keys() <= law.keys():
        return dict.fromkeys(PLACES, 0.0)
    values = {}
    for place, show in PLACES.items():
        counts: Counter[Any] = Counter()
        probs: Counter[Any] = Counter()
        for string, prob in law.items():
            if (shown := show(string)) is not None:
                counts[shown] += found[string]
                probs[shown] += prob
        total = sum(probs.values())
        values[place] = p_value(
            np.array([counts[shown] for shown in probs]),
            np.array([probs[shown] / total for shown in probs]),
        )
    return values


_numbers = itertools.count()


def shown(llm: Any, sampling: list[Any]) -> Counter[String]:
    """What requests show in two steps, after which they are aborted."""
    engine = llm.llm_engine
    strings: Counter[String] = Counter()
    for first in range(0, len(sampling), SLOTS):
        latest = {}
        for one in sampling[first : first + SLOTS]:
            one.logprobs = None
            engine.add_request(f"law-{next(_numbers)}", {"prompt_token_ids": PROMPT}, one)
        for _ in range(2):
            latest |= {output.request_id: output for output in engine.step()}
        engine.abort_request([i for i, o in latest.items() if not o.finished], internal=False)
        strings.update(tuple(output.outputs[0].token_ids) for output in latest.values())
    assert strings.total() == len(sampling)
    return strings


def requests(num: int, rule: AcceptanceRule, drafts: DraftLaw, **kw: Any) -> Iterator[Any]:
    """Parameters of requests with drafts."""
    rng = np.random.default_rng(1)
    for i in range(num):
        draft: String = ()
        logprobs = []
        for _ in range(DRAFT_LEN):
            q = drafts(draft)
            draft = (*draft, int(rng.choice(VOCAB, p=q)))
            logprobs.append(np.log(q[draft[-1]]))
        yield drafted(
            params(10_000 + i, max_tokens=DRAFT_LEN, **kw),
            draft,
            rule,
            key=20_000 + i,
            logprobs=np.array(logprobs, np.float32),
        )


# Three tokens, none of them next to certain or impossible.
FILTERS = {"temperature": 0.2, "top_k": 3}


@pytest.mark.v2_large
@pytest.mark.parametrize(
    ("drafts_of", "told", "likely"),
    [
        (contrary, ("after prefill", "in chunk", "further in chunk"), SMALLEST_P),
        (contrary_at_last, ("after chunk",), 1e-3),
    ],
)
def test_lenient_law(
    llm: Any, model: Any, drafts_of: Any, told: tuple[str, ...], likely: float
) -> None:
    target = Target(model, **FILTERS)
    drafts = drafts_of(target)
    found = shown(llm, list(requests(8 * SLOTS, Lenient(0.3), drafts, **FILTERS)))
    law = string_law(lenient(target, drafts, 0.3), target)
    for place, p in p_values(found, law).items():
        assert p > SMALLEST_P, place
    # The test can tell it from a rule without bias, at each place by itself: a tenth to a fifth of
    # what is shown there is other than by that (total variation).
    values = p_values(found, string_law(unbiased(target, drafts), target))
    assert max(values[place] for place in told) < likely, values
    if drafts_of is contrary:
        # And from a lenience that is off by a factor of 1.5 either way, which it sees in a chunk.
        # (By the non-central chi-square of these laws: with a probability above 0.999; a factor of
        # 1.35 with one of 0.89, should the lenience be too small, and above 0.999 if too large.)
        for wrong in (-0.1, 0.7):
            values = p_values(found, string_law(lenient(target, drafts, wrong), target))
            assert values["in chunk"] < SMALLEST_P


@pytest.mark.v2_large
@pytest.mark.parametrize("rule", [OneHot(), Coupled()])
def test_lossless_laws(llm: Any, model: Any, rule: AcceptanceRule) -> None:
    target = Target(model, **FILTERS)
    drafts = likeliest(target)
    found = shown(llm, list(requests(3 * SLOTS, rule, drafts, **FILTERS)))
    for place, p in p_values(found, string_law(by_draw(target, drafts), target)).items():
        assert p > SMALLEST_P, place
    # The test can tell it from a test and a draw by noise of their own, which favours the draft.
    values = p_values(found, string_law(drawn_again(target, drafts), target))
    assert all(values[place] < SMALLEST_P for place in ("after prefill", "in chunk"))


def test_a_rejected_draft_is_not_taken_up_again(make_llm: Any, model: Any) -> None:
    """Not even where the draw that followed gave the draft's token."""
    target = Target(model)
    likely: list[int] = []
    for _ in range(4):
        likely.append(int(target(likely).argmax()))
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
