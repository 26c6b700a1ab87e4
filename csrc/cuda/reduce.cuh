// Reductions over a block: a fixed tree of shuffles, so results do not depend on timing; every
// thread gets the result.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace spec_rollout::cuda {

constexpr int kMaxWarps = 16;
constexpr unsigned kFullMask = 0xffffffffu;

template <class T>
__device__ __forceinline__ T shuffle_xor(const T& value, int lane_mask) {
  static_assert(sizeof(T) % 4 == 0, "shuffled word by word");
  uint32_t words[sizeof(T) / 4];
  memcpy(words, &value, sizeof(T));
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T) / 4); ++i) {
    words[i] = __shfl_xor_sync(kFullMask, words[i], lane_mask);
  }
  T result;
  memcpy(&result, words, sizeof(T));
  return result;
}

// merge must be associative and commutative up to rounding. `shared` has room for kMaxWarps values
// and may be reused by the next call at once. Blocks have a power of two of warps.
template <class T, class Merge>
__device__ T block_reduce(T value, T* shared, Merge merge) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) value = merge(value, shuffle_xor(value, mask));
  const int warp = static_cast<int>(threadIdx.x) >> 5, lane = static_cast<int>(threadIdx.x) & 31;
  const int num_warps = static_cast<int>(blockDim.x) >> 5;
  if (lane == 0) shared[warp] = value;
  __syncthreads();
  value = shared[lane & (num_warps - 1)];
  for (int mask = num_warps >> 1; mask > 0; mask >>= 1) {
    value = merge(value, shuffle_xor(value, mask));
  }
  __syncthreads();
  return value;
}

}  // namespace spec_rollout::cuda
