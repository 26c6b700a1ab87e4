// The few vector operations that compilers do not find by themselves in the loops over logits:
// float reductions (which they may not reorder) and fused multiply-add. Everything else is plain
// loops.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "spec_rollout/platform.h"

namespace spec_rollout::cpu::SPEC_ROLLOUT_ISA {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif
constexpr int kVecLanes = kVecBytes / 4;

typedef float VecF __attribute__((vector_size(kVecBytes)));
typedef int32_t VecI __attribute__((vector_size(kVecBytes)));

inline VecF splat(float x) { return x - VecF{}; }

inline VecF load(const float* p) {
  VecF v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// The larger of each pair; NaN in `b` is kept. Compiles to one instruction.
inline VecF vec_max(VecF a, VecF b) { return a > b ? a : b; }

inline VecF vec_fma(VecF a, VecF b, VecF c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

inline float reduce_max(VecF v) {
  float best = v[0];
  for (int i = 1; i < kVecLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// e^x for x <= 0, relative error about 1e-7 with FMA, |x| * 6e-8 without, not the same bits at
// every instruction-set level. At least e^-86 (so -inf gives no zero but something far below the
// rounding of a sum that has a 1 in it); NaN gives NaN.
inline VecF vec_exp(VecF x) {
  const VecF magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const VecF log2e = splat(1.44269504f);
  x = vec_max(splat(-86.0f), x);
  const VecF shifted = vec_fma(x, log2e, magic);
  const VecF f = vec_fma(x, log2e, magic - shifted);  // x log2(e) - n, in [-1/2, 1/2]
  // 2^f; coefficients minimise the largest relative error on that interval.
  VecF p = splat(1.326472720e-3f);
  p = vec_fma(p, f, splat(9.671512640e-3f));
  p = vec_fma(p, f, splat(5.550733743e-2f));
  p = vec_fma(p, f, splat(2.402224209e-1f));
  p = vec_fma(p, f, splat(6.931469776e-1f));
  p = vec_fma(p, f, splat(1.0f));
  VecI bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000;
  VecF scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

}  // namespace spec_rollout::cpu::SPEC_ROLLOUT_ISA
