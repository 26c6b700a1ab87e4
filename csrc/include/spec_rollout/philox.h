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
enum NoiseStream : uint32_t { kStreamAccept = 0, kStreamGumbel = 1 };

struct Philox4 {
  uint32_t x[4];
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
  return accept_bits4(key, static_cast<uint64_t>(position) >> 2).x[position & 3];
}

// Random bits of the Gumbel noise of tokens 4 * quad .. 4 * quad + 3 at a response position.
SR_HD Philox4 gumbel_bits4(NoiseKey key, int64_t position, uint32_t quad) {
  const uint64_t p = static_cast<uint64_t>(position);
  return philox4x32_10(static_cast<uint32_t>(p), quad, static_cast<uint32_t>(p >> 32),
                       kStreamGumbel, key.k0, key.k1);
}

// Uniform in (0, 1]: full float32 resolution near 0, where small acceptance probabilities are
// decided.
SR_HD float uniform_from_bits(uint32_t bits) {
  return exact_fma(static_cast<float>(bits), 0x1p-32f, 0x1p-33f);
}

// Standard exponential -ln(1 - v), v uniform, with full relative resolution for small values: these
// are the ones that win an argmax over a large vocabulary. ln(1 - v) = ln(w) + (error of w = 1 - v)
// to float32 accuracy.
SR_HD float exponential_from_bits(uint32_t bits) {
  float v = exact_fma(static_cast<float>(bits), 0x1p-32f, 0x1p-33f);
  v = v < 1.0f - 0x1p-24f ? v : 1.0f - 0x1p-24f;
  const float w = exact_sub(1.0f, v);
  const float correction = exact_sub(exact_sub(1.0f, w), v);
  return -exact_add(exact_log(w), correction);
}

// Standard Gumbel noise -ln(-ln(uniform)), in (-2.82, 22.88).
SR_HD float gumbel_from_bits(uint32_t bits) { return -exact_log(exponential_from_bits(bits)); }

SR_HD float gumbel(NoiseKey key, int64_t position, int64_t token) {
  return gumbel_from_bits(
      gumbel_bits4(key, position, static_cast<uint32_t>(token >> 2)).x[token & 3]);
}

}  // namespace SPEC_ROLLOUT_ISA
}  // namespace spec_rollout
