"""Philox4x32-10 and the noise made from it, in torch's 64-bit integers and float64."""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF
STREAM_ACCEPT = 0
STREAM_GUMBEL = 1
STREAM_GROUP = 2
NOISE_GROUP = 8  # tokens whose smallest exponential is drawn first


def _mul_hi_lo(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a * b; b in 16-bit halves, since torch has no unsigned 64-bit
    product."""
    low, high = b & 0xFFFF, b >> 16
    mid = a * high + ((a * low) >> 16)  # < 2**48 + 2**32
    return mid >> 16, ((mid << 16) | ((a * low) & 0xFFFF)) & _MASK


def philox(counter: list[torch.Tensor], key: list[torch.Tensor]) -> list[torch.Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011) on int64 tensors that hold 32-bit words; all broadcast
    together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        hi0, lo0 = _mul_hi_lo(0xD2511F53, c0)
        hi1, lo1 = _mul_hi_lo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return [c0, c1, c2, c3]


def _words(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Low and high 32-bit words of int64s."""
    return value & _MASK, (value >> 32) & _MASK


def accept_uniforms(keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Uniforms in (0, 1] of the accept test; keys and positions broadcast together, int64. Returns
    float64."""
    k0, k1 = _words(keys)
    p0, p1 = _words(positions >> 2)  # one call serves four positions
    zero = torch.zeros_like(p0)
    words = torch.stack(philox([p0, zero, p1, zero + STREAM_ACCEPT], [k0, k1]), dim=-1)
    word = (positions & 3).expand(words.shape[:-1])[..., None]
    return (words.gather(-1, word)[..., 0].double() + 0.5) * 2.0**-32


def gumbel_noise(keys: torch.Tensor, positions: torch.Tensor, vocab: int) -> torch.Tensor:
    """Standard Gumbel noise -ln(exponential) of every token: [batch], [batch] -> [batch, vocab],
    float64.

    The exponentials of 8 neighbours are drawn as their smallest, that of a leader, and what the
    others have above it: the smallest of n independent standard exponentials is exponential with
    rate n, any of them alike, and the rest exceed it by independent standard exponentials.
    """
    k0, k1 = (w[:, None] for w in _words(keys))
    p0, p1 = (w[:, None] for w in _words(positions))

    def words(stream: int, count: int) -> torch.Tensor:
        calls = torch.arange((count + 3) // 4, device=keys.device)[None, :]
        zero = torch.zeros_like(p0 + calls)
        bits = philox([p0 + zero, calls + zero, p1 + zero, zero + stream], [k0, k1])
        return torch.stack(bits, dim=-1).flatten(1)[:, :count]

    group_bits = words(STREAM_GROUP, (vocab + NOISE_GROUP - 1) // NOISE_GROUP)
    group_bits = group_bits.repeat_interleave(NOISE_GROUP, dim=1)[:, :vocab]
    places = torch.arange(vocab, device=keys.device)[None, :] % NOISE_GROUP
    least_uniforms = ((group_bits >> 3).double() + 0.5) * 2.0**-29
    least = -torch.log1p(-least_uniforms) / NOISE_GROUP
    uniforms = (words(STREAM_GUMBEL, vocab).double() + 0.5) * 2.0**-32
    above = torch.where(places == (group_bits & 7), 0.0, -torch.log1p(-uniforms))
    return -torch.log(least + above)
