"""The counter-based noise: known answers, resolution where it matters, the same bits at every instruction-set level."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys

import pytest
import torch
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
    assert _C.gumbel_from_bits(0) == pytest.approx(33 * math.log(2), rel=1e-6)
    assert _C.gumbel_from_bits(1) == pytest.approx(33 * math.log(2) - math.log(3), rel=1e-6)
    assert math.isfinite(_C.gumbel_from_bits(2**32 - 1))
    assert _C.gumbel_from_bits(2**32 - 1) == pytest.approx(-math.log(24 * math.log(2)), rel=1e-6)


def test_gumbel_noise_equals_reference_and_its_law(generator) -> None:
    keys = torch.randint(-(2**63), 2**63 - 1, (40,), generator=generator)
    positions = torch.randint(0, 2**34, (40,), generator=generator)
    out = torch.empty(40, 1003)
    _C.gumbel_noise(keys, positions, out, 2)
    expected = noise.gumbel_noise(keys, positions, 1003)
    # Near the bottom of the range float32 uniforms are coarse; everywhere else the two agree to rounding.
    assert torch.allclose(out.double(), expected, atol=1e-3)
    upper = expected > 0
    assert torch.allclose(out.double()[upper], expected[upper], atol=2e-6, rtol=1e-6)
    assert stats.kstest(out.flatten().numpy(), stats.gumbel_r.cdf).pvalue > 1e-4


def test_streams_and_positions_are_independent(generator) -> None:
    keys = torch.randint(-(2**63), 2**63 - 1, (20000,), generator=generator)
    zero = torch.zeros(20000, dtype=torch.int64)
    u = noise.accept_uniforms(keys, zero)
    neighbours = [
        noise.accept_uniforms(keys, zero + 1),
        noise.accept_uniforms(keys + 1, zero),
        noise.gumbel_noise(keys, zero, 1)[:, 0],
    ]
    for other in neighbours:
        assert abs(stats.spearmanr(u.numpy(), other.numpy()).statistic) < 0.03


def test_accept_bits_equal_reference(generator) -> None:
    keys = torch.randint(-(2**63), 2**63 - 1, (200,), generator=generator)
    positions = torch.randint(0, 2**34, (200,), generator=generator)
    uniforms = noise.accept_uniforms(keys, positions)
    for key, position, u in zip(keys.tolist(), positions.tolist(), uniforms.tolist(), strict=True):
        assert (_C.accept_bits(key, position) + 0.5) * 2.0**-32 == u


_DIGEST = """
import hashlib, torch
from spec_rollout import _C, ops
from spec_rollout.acceptance import Lenient
g = torch.Generator().manual_seed(5)
keys = torch.randint(-2**63, 2**63 - 1, (300,), generator=g)
noise = torch.empty(300, 517)
_C.gumbel_noise(keys, keys.abs() >> 20, noise, 2)
lens = torch.randint(0, 400, (300,), generator=g)
target = -torch.rand(300, 400, generator=g)
draft = target + 0.02 * torch.randn(300, 400, generator=g)
accepted = ops.accept_prefix(draft, target, rule=Lenient(0.0), keys=keys, draft_lens=lens)
print(_C.build_info()["isa_in_use"], hashlib.sha256(noise.numpy().tobytes() + accepted.numpy().tobytes()).hexdigest())
"""


def test_same_bits_at_every_instruction_set_level() -> None:
    digests = {}
    for level in _C.build_info()["isa_levels"]:
        run = subprocess.run(
            [sys.executable, "-c", _DIGEST],
            env={**os.environ, "SPEC_ROLLOUT_ISA": level},
            capture_output=True,
            text=True,
            check=True,
        )
        used, digest = run.stdout.split()
        digests[used] = digest  # a level this machine lacks falls back to another
    assert len(set(digests.values())) == 1
    assert len(next(iter(digests.values()))) == hashlib.sha256().digest_size * 2
