// Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC
// 2011) and the uniforms made from it. The same integers on every device; each use has a stream of
// its own.
#pragma once

#include "spec_rollout/numerics.h"
#include "spec_rollout/platform.h"

namespace spec_rollout {
inline namespace SPEC_ROLLOUT_ISA {

// Streams never share a draw: the uniform that accepts a token is independent of the noise that
// draws one.
enum NoiseStream : uint32_t { kStreamAccept = 0, kStreamGumbel = 1, kStreamGroup = 2 };

struct Philox4 {
  uint32_t x[4];

  // x[i] where i is not known at compile time, without a table in memory.
  SR_HD uint32_t word(int i) const {
    const uint32_t even = (i & 2) ? x[2] : x[0], odd = (i & 2) ? x[3] : x[1];
    return (i & 1) ? odd : even;
  }
};

SR_HD Philox4 philox4x32_10(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0,
                            uint32_t k1) {
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    // Both halves from one product: nvcc would make two of a high and a low multiplication.
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return Philox4{{c0, c1, c2, c3}};
}

// The noise key of a row, split into Philox's two key words.
struct NoiseKey {
  uint32_t k0, k1;
  SR_HD explicit NoiseKey(int64_t key)
      : k0(static_cast<uint32_t>(static_cast<uint64_t>(key))),
        k1(static_cast<uint32_t>(static_cast<uint64_t>(key) >> 32)) {}
};

// Random bits of the accept test at response positions 4 * quad .. 4 * quad + 3.
SR_HD Philox4 accept_bits4(NoiseKey key, uint64_t quad) {
  return philox4x32_10(static_cast<uint32_t>(quad), 0u, static_cast<uint32_t>(quad >> 32),
                       kStreamAccept, key.k0, key.k1);
}

SR_HD uint32_t accept_bits(NoiseKey key, int64_t position) {
  return accept_bits4(key, static_cast<uint64_t>(position) >> 2)
      .word(static_cast<int>(position & 3));
}

// Gumbel noise is -ln of a standard exponential per token, and an argmax is won by small ones. So
// the vocabulary is cut into groups of kNoiseGroup tokens, and a group's smallest exponential is
// drawn first: it has the law of an exponential over the group's size, belongs to each token alike,
// and what the others have above it is again standard exponential, and independent. The noise of a
// token is thus independent of all others', as if it had been drawn alone, but one call of Philox
// says of 32 tokens whether any of them can win at all.
constexpr int kNoiseGroup = 8;

// Random bits of the smallest exponentials of groups 4 * quad .. 4 * quad + 3.
SR_HD Philox4 group_bits4(NoiseKey key, int64_t position, uint32_t quad) {
  const uint64_t p = static_cast<uint64_t>(position);
  return philox4x32_10(static_cast<uint32_t>(p), quad, static_cast<uint32_t>(p >> 32), kStreamGroup,
                       key.k0, key.k1);
}

// Random bits of what tokens 4 * quad .. 4 * quad + 3 have above their group's smallest.
SR_HD Philox4 gumbel_bits4(NoiseKey key, int64_t position, uint32_t quad) {
  const uint64_t p = static_cast<uint64_t>(position);
  return philox4x32_10(static_cast<uint32_t>(p), quad, static_cast<uint32_t>(p >> 32),
                       kStreamGumbel, key.k0, key.k1);
}

// The token of a group that has its smallest exponential, 0 .. kNoiseGroup - 1: the bits that the
// uniform does not use.
SR_HD int leader_from_bits(uint32_t group_bits) {
  return static_cast<int>(group_bits & (kNoiseGroup - 1));
}

// Uniform in (0, 1]: full float32 resolution near 0, where small acceptance probabilities are
// decided.
SR_HD float uniform_from_bits(uint32_t bits) {
  return exact_fma(static_cast<float>(bits), 0x1p-32f, 0x1p-33f);
}

// Standard exponential -ln(1 - v) of a uniform v, with full relative resolution for small values:
// these are the ones that win an argmax over a large vocabulary. ln(1 - v) = ln(w) + (error of w =
// 1
// - v) to float32 accuracy.
SR_HD float exponential_from_uniform(float v) {
  v = v < 1.0f - 0x1p-24f ? v : 1.0f - 0x1p-24f;
  const float w = exact_sub(1.0f, v);
  const float correction = exact_sub(exact_sub(1.0f, w), v);
  return -exact_add(exact_log(w), correction);
}

SR_HD float exponential_from_bits(uint32_t bits) {
  return exponential_from_uniform(uniform_from_bits(bits));
}

// The smallest exponential of a group, from 29 bits: down to 2^-33, as one of 32 bits by itself.
SR_HD float least_from_bits(uint32_t group_bits) {
  const float v = exact_fma(static_cast<float>(group_bits >> 3), 0x1p-29f, 0x1p-30f);
  return exact_mul(exponential_from_uniform(v), 1.0f / kNoiseGroup);
}

// Standard Gumbel noise -ln(exponential), in (-2.94, 22.88), of a group's leader and of a token
// with `bits` of its own.
SR_HD float leader_gumbel(uint32_t group_bits) { return -exact_log(least_from_bits(group_bits)); }
SR_HD float follower_gumbel(uint32_t group_bits, uint32_t bits) {
  return -exact_log(exact_add(least_from_bits(group_bits), exponential_from_bits(bits)));
}

// Noise of the token at `place` in its group.
SR_HD float gumbel_from_bits(uint32_t group_bits, uint32_t bits, int place) {
  return place == leader_from_bits(group_bits) ? leader_gumbel(group_bits)
                                               : follower_gumbel(group_bits, bits);
}

SR_HD float gumbel(NoiseKey key, int64_t position, int64_t token) {
  const uint32_t group = static_cast<uint32_t>(token / kNoiseGroup);
  const uint32_t group_bits = group_bits4(key, position, group >> 2).word(group & 3);
  const int place = static_cast<int>(token % kNoiseGroup);
  if (place == leader_from_bits(group_bits)) return leader_gumbel(group_bits);
  return follower_gumbel(
      group_bits, gumbel_bits4(key, position, static_cast<uint32_t>(token >> 2)).word(token & 3));
}

}  // namespace SPEC_ROLLOUT_ISA
}  // namespace spec_rollout
