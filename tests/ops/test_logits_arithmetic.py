"""What the CUDA kernels make of a row of logits, in the functions that host and device share, run
on the CPU."""

from __future__ import annotations

import numpy as np
import pytest

from spec_rollout import _C

KINDS = {
    "normal": lambda rng, n: rng.normal(0, 3, n),
    "peaked": lambda rng, n: np.where(np.arange(n) == n // 3, 25.0, rng.normal(-5, 2, n)),
    "rising": lambda rng, n: np.linspace(-300, 300, n),
    "falling": lambda rng, n: np.linspace(300, -300, n),
    "equal": lambda rng, n: np.full(n, -7.5),
    "masked": lambda rng, n: np.where(rng.random(n) < 0.9, -np.inf, rng.normal(0, 3, n)),
    "one left": lambda rng, n: np.where(np.arange(n) == n - 1, 0.5, -np.inf),
    "large": lambda rng, n: rng.normal(0, 1e4, n),
    # Where a product with log2(e) is too coarse: differences come first.
    "far": lambda rng, n: 2.0**24 + 16 * rng.integers(0, 4, n),
    "farthest": lambda rng, n: np.where(np.arange(n) % 5 == 0, 1e30, -1e30),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
@pytest.mark.parametrize(("vocab", "threads"), [(1, 1), (13, 1), (1003, 32), (20_000, 256)])
def test_log_probs_of_an_online_sum(kind, temperature, vocab, threads) -> None:
    logits = KINDS[kind](np.random.default_rng(vocab), vocab).astype(np.float32)
    if np.isneginf(logits).all():
        logits[0] = 1.0
    inverse = float(np.float32(1) / np.float32(temperature))
    got, valid = _C.online_logprobs(logits, inverse, threads)
    assert valid
    x = logits.astype(np.float64) * inverse
    largest = x.max()
    truth = x - largest - np.log(np.exp(x - largest).sum())
    finite = np.isfinite(truth)
    # Float32 holds the logits of the last two kinds, but nothing between them.
    np.testing.assert_allclose(got[finite], truth[finite], atol=4e-6, rtol=2e-6)
    assert np.isneginf(got[~finite]).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
@pytest.mark.parametrize("far", [False, True])
def test_the_log_prob_of_a_lone_token_is_zero(temperature, far) -> None:
    """Below it a test could reject the token, and no other could be drawn."""
    inverse = float(np.float32(1) / np.float32(temperature))
    alone = np.random.default_rng(0).normal(0, 1e8 if far else 40, 2000).astype(np.float32)
    row = np.full(100, -np.inf, np.float32)
    for place, logit in enumerate(alone):
        row[:] = -np.inf
        row[place % 100] = logit
        got, valid = _C.online_logprobs(row, inverse, 8)
        assert valid
        assert got[place % 100] == 0.0, logit


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("at", [0, 500, 1002])
def test_bad_logits_make_the_sum_invalid(bad, at) -> None:
    logits = np.random.default_rng(0).normal(0, 3, 1003).astype(np.float32)
    logits[at] = bad
    assert not _C.online_logprobs(logits, 1.0, 32)[1]
    assert not _C.online_logprobs(np.full(9, -np.inf, np.float32), 1.0, 4)[1]


@pytest.mark.parametrize(
    ("logits", "temperature", "valid"),
    [
        ([5.0, 6.0, 1.0], 1e-38, False),  # two are +inf, and which is above the other?
        ([-5.0, -6.0], 1e-38, False),  # nothing is finite
        ([-1.0, -6.0], 1e-38, True),
        ([1.0, -6.0], 1e-38, True),
        ([5e3, 6e3], 1e-34, True),
        ([1e30, 1.0], 1e-8, True),
        ([1e30, 1.0], 1e-9, False),
        ([3e38, -3e38], 1.0, True),
        ([3e38, -3e38], 3e38, True),
    ],
)
def test_the_score_of_the_likeliest_token_is_a_number(logits, temperature, valid) -> None:
    inverse = float(np.float32(1) / np.float32(temperature))
    row = np.full(100, -np.inf, np.float32)
    row[7 : 7 + len(logits)] = logits
    assert _C.online_logprobs(row, inverse, 8)[1] is valid


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("spread", [0.5, 3.0, 1000.0])
@pytest.mark.parametrize("offset", [0.0, -200.0, 40_000.0])
def test_no_token_that_reaches_the_bound_is_left_out(temperature, spread, offset) -> None:
    """Leaving one out would change a token; letting one pass costs a logarithm."""
    rng = np.random.default_rng(1)
    n = 4003  # the last group has 3 tokens
    inverse = float(np.float32(1) / np.float32(temperature))
    logits = (rng.normal(0, spread, n) + offset).astype(np.float32)
    group_bits = rng.integers(0, 2**32, (n + 7) // 8, dtype=np.uint32)
    bits = rng.integers(0, 2**32, n, dtype=np.uint32)
    # Large noise, as the tokens have that win: leaders of the first eighth, and some of their
    # groups' others.
    group_bits[: n // 64] >>= 12
    bits[: n // 16] >>= 12
    words = np.repeat(group_bits, 8)[:n]
    noise = np.array(
        [
            _C.gumbel_from_bits(int(word), int(own), i % 8)
            for i, (word, own) in enumerate(zip(words, bits, strict=True))
        ],
        np.float32,
    )
    scores = logits * np.float32(inverse) + noise
    passed_in_vain = 0
    for bound in np.sort(scores)[[0, n // 2, -50, -2, -1]]:
        for ref in np.sort(logits)[[n // 2, -1]]:
            may = _C.may_reach_bound(logits, group_bits, bits, inverse, float(ref), float(bound))
            assert may[scores >= bound].all()
            if bound == scores.max() and ref == logits.max():
                passed_in_vain += int(may.sum()) - 1
    assert passed_in_vain <= n // 1000
    highest = float(logits.max())
    assert not _C.may_reach_bound(logits, group_bits, bits, inverse, highest, np.inf).any()
    assert _C.may_reach_bound(logits, group_bits, bits, inverse, highest, -np.inf).all()
