// float32 in its upper half, where half the memory matters more than the last digits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace spec_rollout {

inline uint16_t upper_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (!std::isnan(value)) bits += 0x8000u;  // to the nearest
  return static_cast<uint16_t>(bits >> 16);
}

inline float from_upper_half(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace spec_rollout
