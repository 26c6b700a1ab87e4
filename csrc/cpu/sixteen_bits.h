// Values of 16 bits as float32, one and as many as a vector holds, and back.
#pragma once

#include "simd.h"
#include "spec_rollout/numerics.h"

namespace spec_rollout::cpu::SPEC_ROLLOUT_ISA {

inline float half_to_float(uint16_t half) {
  // The exponent is moved by a multiplication, which handles subnormals too; infinity and NaN keep
  // theirs.
  const float scaled = float_from_bits((half & 0x7fffu) << 13) * 0x1p112f;
  const uint32_t special = (half & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  return float_from_bits(float_bits(scaled) | special |
                         (static_cast<uint32_t>(half & 0x8000u) << 16));
}
inline float bfloat16_to_float(uint16_t x) {
  return float_from_bits(static_cast<uint32_t>(x) << 16);
}

struct BFloat16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return bfloat16_to_float(x.bits); }

// To the nearest, of two equally near the even one, as torch does.
template <class T>
T narrow(float x);
template <>
inline float narrow<float>(float x) {
  return x;
}
template <>
inline BFloat16 narrow<BFloat16>(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(x == x ? rounded : 0x7fc0u)};
}
// What x is after it was kept as a T.
template <class T>
float rounded(float x) {
  return to_float(narrow<T>(x));
}

typedef uint16_t VecHalf __attribute__((vector_size(kVecBytes / 2)));
typedef uint32_t VecU __attribute__((vector_size(kVecBytes)));

inline VecF load(const BFloat16* p) {
  VecHalf half;
  std::memcpy(&half, p, sizeof half);
  const VecU bits = __builtin_convertvector(half, VecU) << 16;
  VecF v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

inline void store(float* p, VecF v) { std::memcpy(p, &v, sizeof v); }

inline void store(BFloat16* p, VecF v) {
  VecU bits;
  std::memcpy(&bits, &v, sizeof bits);
  bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  bits = v == v ? bits : bits - bits + 0x7fc0u;
  const VecHalf half = __builtin_convertvector(bits, VecHalf);
  std::memcpy(p, &half, sizeof half);
}

template <class T>
VecF rounded(VecF v) {
  T kept[kVecLanes];
  store(kept, v);
  return load(kept);
}

// The first `count` values, fewer than a vector's, and zeros.
template <class T>
VecF load_some(const T* p, int64_t count) {
  T whole[kVecLanes] = {};
  std::memcpy(whole, p, count * sizeof(T));
  return load(whole);
}

}  // namespace spec_rollout::cpu::SPEC_ROLLOUT_ISA
