// The noise that tokens are drawn with, as a drafter foresees it.
#pragma once

#include <cmath>
#include <cstdint>

#include "spec_rollout/philox.h"

namespace spec_rollout {

// Whose noise it is: this package's, or that of vLLM's Model Runner V2, drawn in float32 (its
// default) or float64.
enum class NoiseLaw : int { kPhilox = 0, kVllm = 1, kVllm64 = 2 };

namespace vllm_noise {

// MurmurHash3 (Austin Appleby, public domain) of seed, position and token, as vLLM takes it
// (vllm/v1/worker/gpu/sample/gumbel.py).
inline uint32_t rotl(uint32_t x, int n) { return (x << n) | (x >> (32 - n)); }

inline uint32_t mix(uint32_t h, uint32_t word) {
  h ^= rotl(word * 0xCC9E2D51u, 15) * 0x1B873593u;
  return rotl(h, 13) * 5u + 0xE6546B64u;
}

inline uint32_t hash(int64_t seed, int64_t position, int64_t token, uint32_t domain) {
  uint32_t h = mix(domain, static_cast<uint32_t>(seed));
  h = mix(h, static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32));
  h = mix(h, static_cast<uint32_t>(position));
  h = mix(h, static_cast<uint32_t>(token)) ^ 16u;
  h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
  h = (h ^ (h >> 13)) * 0xC2B2AE35u;
  return h ^ (h >> 16);
}

// To float32 accuracy: it says which token is likely to be drawn, and draws none.
inline float gumbel(int64_t seed, int64_t position, int64_t token, bool is_float64) {
  const uint32_t low = hash(seed, position, token, 0);
  double u = (low + 0.5) * 0x1p-32;
  if (!is_float64) return static_cast<float>(-std::log(-std::log1p(-u)));
  const uint64_t high = hash(seed, position, token, 0x9E3779B9u);
  u = (static_cast<double>((high << 32 | low) >> 11) + 0.5) * 0x1p-53;
  return static_cast<float>(-std::log(-std::log(u)));
}

}  // namespace vllm_noise

// Noise of a token at a position, by the request's key or, for vLLM, seed.
inline float noise_of(NoiseLaw law, int64_t key, int64_t position, int64_t token) {
  if (law == NoiseLaw::kPhilox) return gumbel(NoiseKey(key), position, token);
  return vllm_noise::gumbel(key, position, token, law == NoiseLaw::kVllm64);
}

}  // namespace spec_rollout
