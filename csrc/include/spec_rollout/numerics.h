// Float32 arithmetic that gives the same bits on every compiler, CPU and GPU: each operation is one
// correctly rounded IEEE-754 operation, and nothing is left for a compiler to contract or reorder.
// (Host code is compiled with -ffp-contract=off.)
#pragma once

#include <cmath>
#include <cstring>

#include "spec_rollout/platform.h"

namespace spec_rollout {
inline namespace SPEC_ROLLOUT_ISA {

SR_HD float exact_add(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

SR_HD float exact_sub(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fsub_rn(a, b);
#else
  return a - b;
#endif
}

SR_HD float exact_mul(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

SR_HD float exact_fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

SR_HD uint32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

SR_HD float float_from_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

// Natural logarithm of a positive normal float, within 2 units in the last place. x = m * 2^e with
// m in [sqrt(1/2), sqrt(2)); ln m by the minimax polynomial of Cephes' logf (S. Moshier); ln 2 in
// two parts.
SR_HD float exact_log(float x) {
  // 0x3f3504f3 is sqrt(1/2): subtracting it puts the exponent's carry where the mantissa passes
  // that point.
  const uint32_t bits = float_bits(x) - 0x3f3504f3u;
  const int32_t exponent = static_cast<int32_t>(bits) >> 23;
  const float m = float_from_bits((bits & 0x007fffffu) + 0x3f3504f3u);
  const float e = static_cast<float>(exponent);
  const float f = exact_sub(m, 1.0f);
  const float z = exact_mul(f, f);
  float p = 7.0376836292e-2f;
  p = exact_fma(p, f, -1.1514610310e-1f);
  p = exact_fma(p, f, 1.1676998740e-1f);
  p = exact_fma(p, f, -1.2420140846e-1f);
  p = exact_fma(p, f, 1.4249322787e-1f);
  p = exact_fma(p, f, -1.6668057665e-1f);
  p = exact_fma(p, f, 2.0000714765e-1f);
  p = exact_fma(p, f, -2.4999993993e-1f);
  p = exact_fma(p, f, 3.3333331174e-1f);
  float y = exact_mul(exact_mul(p, f), z);
  y = exact_fma(e, -2.12194440e-4f, y);
  y = exact_fma(-0.5f, z, y);
  y = exact_add(y, f);
  return exact_fma(e, 0.693359375f, y);
}

}  // namespace SPEC_ROLLOUT_ISA
}  // namespace spec_rollout
