"""The counter-based noise: known answers, resolution where it matters, its law."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from laws import SMALLEST_P, assert_law
from scipy import stats

from spec_rollout import _C
from spec_rollout.ops.reference import noise

# Counter, key, output: the known answers that the authors of Philox publish for philox4x32-10.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected) -> None:
    assert _C.philox(*counter, *key) == expected
    reference = noise.philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert tuple(int(w) for w in reference) == expected


def test_exact_log_is_accurate_to_float32() -> None:
    for value in [2.0**-33, 2.0**-24, 1e-3, 0.25, 0.70710677, 0.7071068, 0.9999999, 1.0, 3.0, 16.6]:
        value = float(torch.tensor(value))
        assert _C.exact_log(value) == pytest.approx(math.log(value), rel=2e-7, abs=1e-12)
    assert _C.exact_log(1.0) == 0.0


def test_uniform_covers_zero_to_one_with_resolution_at_zero() -> None:
    assert _C.uniform_from_bits(0) == 2.0**-33
    assert _C.uniform_from_bits(1) == 3 * 2.0**-33
    assert _C.uniform_from_bits(2**32 - 1) == 1.0


def test_gumbel_is_finite_and_resolves_its_upper_tail() -> None:
    # The largest values win over large vocabularies: neighbours must differ there.
    ln2, last = math.log(2), 2**32 - 1
    for leader in range(8):
        for own in (0, 12345, last):  # of no account for the leader
            assert _C.gumbel_from_bits(leader, own, leader) == pytest.approx(33 * ln2, rel=1e-6)
            assert _C.gumbel_from_bits(8 + leader, own, leader) == pytest.approx(
                33 * ln2 - math.log(3), rel=1e-6
            )
        follower = (leader + 3) % 8
        assert _C.gumbel_from_bits(leader, 0, follower) == pytest.approx(32 * ln2, rel=1e-6)
        assert _C.gumbel_from_bits(leader, 1, follower) == pytest.approx(31 * ln2, rel=1e-6)
        assert _C.gumbel_from_bits(8 + leader, 0, follower) == pytest.approx(31 * ln2, rel=1e-6)
    # The smallest: uniforms end at 1 - 2^-24.
    assert _C.gumbel_from_bits(last, 0, 7) == pytest.approx(-math.log(3 * ln2), rel=1e-6)
    assert _C.gumbel_from_bits(last, last, 0) == pytest.approx(-math.log(27 * ln2), rel=1e-6)


def _words_of_all_sizes(generator: torch.Generator, count: int) -> list[int]:
    """Random words shifted by 0 to 31 bits, and those around powers of two."""
    words = torch.randint(0, 2**32, (count,), generator=generator)
    words >>= torch.randint(0, 32, (count,), generator=generator)
    powers = [2**k + d for k in range(33) for d in (-9, -8, -1, 0, 1, 7, 8)]
    return words.tolist() + [w for w in powers if 0 <= w < 2**32] + list(range(64))


def test_group_bound_is_above_the_noise_of_every_token_of_the_group(generator) -> None:
    for word in _words_of_all_sizes(generator, 20_000):
        bound = _C.group_bound(word)
        leader = _C.gumbel_from_bits(word, 0, word & 7)
        for own in (0, word ^ 0x5A5A5A5A):  # 0 gives the others the largest noise they can have
            assert max(_C.gumbel_from_bits(word, own, place) for place in range(8)) == leader
        assert leader <= bound
        if leader > 5:
            assert bound - leader < 0.11


def _native_noise(keys: torch.Tensor, positions: torch.Tensor, vocab: int) -> torch.Tensor:
    out = torch.empty(len(keys), vocab)
    _C.gumbel_noise(keys, positions, out, 2)
    return out


def test_gumbel_noise_equals_reference(generator) -> None:
    keys = torch.randint(-(2**63), 2**63 - 1, (40,), generator=generator)
    positions = torch.randint(0, 2**34, (40,), generator=generator)
    errors = []
    for vocab in (1, 4, 7, 8, 29, 32, 1003):
        out = _native_noise(keys, positions, vocab)
        expected = noise.gumbel_noise(keys, positions, vocab)
        # Float32 uniforms are coarse near 1, that is near the bottom of the range, and a leader's
        # further up, where its exponential over 8 is still small. Above that the two agree to
        # rounding. At the bottom, which no winner comes from, they hardly ever differ visibly.
        for above, atol in ((-math.inf, 0.3), (0.0, 5e-5), (2.0, 2e-6)):
            upper = expected > above
            assert torch.allclose(out.double()[upper], expected[upper], atol=atol, rtol=1e-6)
        errors.append((out.double() - expected).abs().flatten())
    assert (torch.cat(errors) > 5e-6).double().mean() < 0.002


def _differs(sample: np.ndarray, cdf: Callable[[np.ndarray], np.ndarray]) -> bool:
    """Whether a sample is not from a distribution."""
    return stats.kstest(sample.ravel(), cdf).pvalue < SMALLEST_P


def _related(columns: np.ndarray) -> bool:
    """Whether ranks in any two columns are correlated, more than chance makes one pair in a
    hundred million: there are thousands of pairs."""
    correlations = np.abs(np.corrcoef(stats.rankdata(columns, axis=0), rowvar=False))
    return bool((np.triu(correlations, 1) > 5.7 / math.sqrt(len(columns))).any())


_WHOLE, _LEFT = 3, 5  # groups of 8, and tokens in the incomplete group after them


@pytest.fixture(scope="module", params=["native", "reference"])
def sample(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray]:
    """Noise of [rows, groups, 8] tokens and of the [rows, 5] after them."""
    make = _native_noise if request.param == "native" else noise.gumbel_noise
    g = torch.Generator().manual_seed(7)
    keys = torch.randint(-(2**63), 2**63 - 1, (20_000,), generator=g)
    positions = torch.randint(0, 2**34, (20_000,), generator=g)
    rows = make(keys, positions, 8 * _WHOLE + _LEFT).double().numpy()
    return rows[:, : 8 * _WHOLE].reshape(-1, _WHOLE, 8), rows[:, 8 * _WHOLE :]


class TestLawOfGumbelNoise:
    """That it is drawn by groups cannot be told from the noise: tokens are independent, each
    standard Gumbel."""

    def test_of_each_token(self, sample) -> None:
        groups, left = sample
        assert not _differs(groups, stats.gumbel_r.cdf)
        assert not any(_differs(groups[:, :, place], stats.gumbel_r.cdf) for place in range(8))
        assert not any(_differs(left[:, place], stats.gumbel_r.cdf) for place in range(_LEFT))

    def test_of_the_largest(self, sample) -> None:
        """Shifted by the logarithm of their number, and equally likely to be any, however large it
        is."""
        groups, left = sample
        for tokens, count in ((groups.reshape(-1, 8), 8), (left, _LEFT)):
            assert not _differs(tokens.max(1), stats.gumbel_r(math.log(count)).cdf)
            large = tokens.max(1) > np.quantile(tokens.max(1), 0.9)
            for winners in (tokens.argmax(1), tokens[large].argmax(1)):
                assert_law(np.bincount(winners, minlength=count), np.full(count, 1 / count))
        rows = np.concatenate([groups.reshape(-1, 8 * _WHOLE), left], axis=1)
        assert not _differs(rows.max(1), stats.gumbel_r(math.log(rows.shape[1])).cdf)

    def test_of_the_gaps_in_a_group(self, sample) -> None:
        """Of n exponentials in ascending order, the k-th gap times n - k is standard exponential,
        and independent."""
        groups, left = sample
        for tokens, count in ((groups.reshape(-1, 8), 8), (left, _LEFT)):
            ascending = np.sort(np.exp(-tokens), axis=1)
            gaps = np.diff(ascending, axis=1, prepend=0.0) * np.arange(count, 0, -1)
            assert not any(_differs(gaps[:, k], stats.expon.cdf) for k in range(count))
            assert not _related(gaps)

    def test_of_two_tokens(self, sample) -> None:
        """Independent as a whole, and where they are large."""
        groups, left = sample
        assert not _related(groups.reshape(-1, 8))
        assert not _related(groups.reshape(-1, 8) > 2)
        # Words of a call are of several groups, or of half a group: pairs of a row, too.
        rows = np.concatenate([groups.reshape(-1, 8 * _WHOLE), left], axis=1)
        assert not _related(rows)
        assert not _related(rows > 2)
        assert not _related(np.column_stack([groups.max(2), left.max(1)]))

    def test_of_the_number_of_large_ones_in_a_group(self, sample) -> None:
        groups, _ = sample
        for limit in (0.0, 2.0):
            counts = np.bincount((groups > limit).sum(2).ravel(), minlength=9)
            assert_law(counts, stats.binom(8, stats.gumbel_r.sf(limit)).pmf(np.arange(9)))


@pytest.mark.parametrize(
    "gumbel_noise", [_native_noise, noise.gumbel_noise], ids=["native", "reference"]
)
def test_streams_and_positions_are_independent(gumbel_noise, generator) -> None:
    keys = torch.randint(-(2**63), 2**63 - 1, (20_000,), generator=generator)
    positions = torch.zeros_like(keys)

    def of(keys: torch.Tensor, positions: torch.Tensor) -> np.ndarray:
        group = gumbel_noise(keys, positions, 8).double()
        accept = noise.accept_uniforms(keys, positions)
        return torch.stack([accept, group[:, 0], group[:, 7], group.amax(1)], dim=1).numpy()

    here = of(keys, positions)
    assert not _related(here[:, :3])
    assert not _related(here[:, [0, 3]])
    for other in (
        of(keys, positions + 1),
        of(keys, positions + 2**32),
        of(keys + 1, positions),
        of(keys ^ 2**40, positions),
    ):
        for i, j in itertools.product(range(4), repeat=2):
            assert not _related(np.column_stack([here[:, i], other[:, j]])), (i, j)


def test_accept_bits_equal_reference(generator) -> None:
    keys = torch.randint(-(2**63), 2**63 - 1, (200,), generator=generator)
    positions = torch.randint(0, 2**34, (200,), generator=generator)
    uniforms = noise.accept_uniforms(keys, positions)
    for key, position, u in zip(keys.tolist(), positions.tolist(), uniforms.tolist(), strict=True):
        assert (_C.accept_bits(key, position) + 0.5) * 2.0**-32 == u
