// Many Philox calls at once. Compilers turn the 32 x 32 -> 64 bit products of philox4x32_10 into
// slow 64-bit ones; the vector units have the right instruction, so it is named here. Same integers
// as philox4x32_10, at every level.
#pragma once

#include "spec_rollout/philox.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace spec_rollout::cpu::SPEC_ROLLOUT_ISA {

constexpr int kPhiloxCalls = 16;
constexpr int kPhiloxWords = 4 * kPhiloxCalls;

namespace philox_block_detail {

// Each 64-bit lane holds one 32-bit word of one call; what is in its upper half does not matter.
#if defined(__AVX512F__)
typedef uint64_t Lanes __attribute__((vector_size(64)));
constexpr Lanes kOrder = {
    0, 4, 1, 5, 2, 6, 3, 7};  // of the calls in the lanes, so that `store` puts them in a row
inline Lanes mul(Lanes a, Lanes b) {
  return reinterpret_cast<Lanes>(
      _mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}
inline void store(uint32_t* out, Lanes even, Lanes odd) {
  const auto a = reinterpret_cast<__m512i>(even), b = reinterpret_cast<__m512i>(odd);
  _mm512_storeu_si512(out, _mm512_maskz_unpacklo_epi64(0xff, a, b));
  _mm512_storeu_si512(out + 16, _mm512_maskz_unpackhi_epi64(0xff, a, b));
}
#elif defined(__AVX2__)
typedef uint64_t Lanes __attribute__((vector_size(32)));
constexpr Lanes kOrder = {0, 2, 1, 3};
inline Lanes mul(Lanes a, Lanes b) {
  return reinterpret_cast<Lanes>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}
inline void store(uint32_t* out, Lanes even, Lanes odd) {
  const auto a = reinterpret_cast<__m256i>(even), b = reinterpret_cast<__m256i>(odd);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_unpacklo_epi64(a, b));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 8), _mm256_unpackhi_epi64(a, b));
}
#endif

}  // namespace philox_block_detail

// bits[4 i + w] = word w of the call with counter (c0 + i, c1, c2, c3), or (c0, c1 + i, c2, c3) if
// kSecondVaries. The sum must not carry beyond 32 bits.
template <bool kSecondVaries = false>
void philox_block(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1,
                  uint32_t* bits) {
#if defined(__AVX2__)
  using philox_block_detail::kOrder;
  using philox_block_detail::Lanes;
  constexpr int kLanes = sizeof(Lanes) / 8;
  constexpr int kGroups = kPhiloxCalls / kLanes;
  Lanes x0[kGroups], x1[kGroups], x2[kGroups], x3[kGroups];
  for (int g = 0; g < kGroups; ++g) {
    const Lanes calls = kOrder + static_cast<uint64_t>(g * kLanes);
    x0[g] = kSecondVaries ? Lanes{} + c0 : calls + c0;
    x1[g] = kSecondVaries ? calls + c1 : Lanes{} + c1;
    x2[g] = Lanes{} + c2;
    x3[g] = Lanes{} + c3;
  }
  const Lanes m0 = Lanes{} + 0xD2511F53u, m1 = Lanes{} + 0xCD9E8D57u;
  for (int round = 0; round < 10; ++round) {
    for (int g = 0; g < kGroups; ++g) {
      const Lanes p0 = philox_block_detail::mul(x0[g], m0),
                  p1 = philox_block_detail::mul(x2[g], m1);
      x0[g] = (p1 >> 32) ^ x1[g] ^ k0;
      x2[g] = (p0 >> 32) ^ x3[g] ^ k1;
      x1[g] = p1;
      x3[g] = p0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int g = 0; g < kGroups; ++g) {
    philox_block_detail::store(bits + 4 * kLanes * g, (x0[g] & 0xffffffffu) | (x1[g] << 32),
                               (x2[g] & 0xffffffffu) | (x3[g] << 32));
  }
#else
  for (uint32_t i = 0; i < kPhiloxCalls; ++i) {
    const Philox4 out = kSecondVaries ? philox4x32_10(c0, c1 + i, c2, c3, k0, k1)
                                      : philox4x32_10(c0 + i, c1, c2, c3, k0, k1);
    for (int w = 0; w < 4; ++w) bits[4 * i + w] = out.x[w];
  }
#endif
}

}  // namespace spec_rollout::cpu::SPEC_ROLLOUT_ISA
