// One row of logits, read by a block: 16-byte loads from aligned addresses, single elements at the
// unaligned ends.
#pragma once

#include <cuda_fp16.h>

#include "reduce.cuh"
#include "spec_rollout/logits.h"

namespace spec_rollout::cuda {

// How an element type becomes float32, and integers of the same order as its values (for selection
// by bisection).
struct Float32Logit {
  using Raw = uint32_t;
  static constexpr int kBits = 32;
  static constexpr Raw kInfinity = 0x7f800000u;
  __device__ static float to_float(Raw raw) { return __uint_as_float(raw); }
};
struct Float16Logit {
  using Raw = uint16_t;
  static constexpr int kBits = 16;
  static constexpr Raw kInfinity = 0x7c00u;
  __device__ static float to_float(Raw raw) { return __half2float(__ushort_as_half(raw)); }
};
struct BFloat16Logit {
  using Raw = uint16_t;
  static constexpr int kBits = 16;
  static constexpr Raw kInfinity = 0x7f80u;
  __device__ static float to_float(Raw raw) {
    return __uint_as_float(static_cast<uint32_t>(raw) << 16);
  }
};

template <class Logit>
struct DeviceRow {
  using Raw = typename Logit::Raw;
  static constexpr int kVec = 16 / static_cast<int>(sizeof(Raw));
  static constexpr Raw kSign = static_cast<Raw>(Raw{1} << (Logit::kBits - 1));

  const Raw* data;
  int32_t vocab;
  float inv_temperature;

  __device__ DeviceRow(const LogitsView& view, int64_t row, float inv)
      : data(static_cast<const Raw*>(view.data) + row * view.row_stride),
        vocab(static_cast<int32_t>(view.vocab)),
        inv_temperature(inv) {}

  __device__ float value(Raw raw) const { return exact_mul(Logit::to_float(raw), inv_temperature); }
  __device__ float at(int64_t token) const { return value(data[token]); }

  // Integers in the order of the logits. x = logit / T has the same order (ties aside), so a
  // threshold found on keys is one on x.
  __device__ static Raw key(Raw raw) {
    return static_cast<Raw>((raw & kSign) ? ~raw : raw | kSign);
  }
  __device__ static Raw from_key(Raw key) {
    return static_cast<Raw>((key & kSign) ? key & static_cast<Raw>(~kSign) : ~key);
  }
};

// Calls visit(token, raw, has) for all of a row, once per element, by all threads of a block. All
// lanes of a warp call together, has = false where a lane has nothing, so a visitor may use warp
// operations. raw has kVec or 1 elements. kBatch: vectors a thread loads before it works on the
// first; more of them keep more bytes in flight.
template <int kBatch, class Logit, class Visit>
__device__ __forceinline__ void visit_row(const DeviceRow<Logit>& row, Visit&& visit) {
  using Raw = typename Logit::Raw;
  constexpr int kVec = DeviceRow<Logit>::kVec;
  const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(row.data) & 15u);
  const int to_boundary = ((16 - misaligned) & 15) / static_cast<int>(sizeof(Raw));
  const int head = to_boundary < row.vocab ? to_boundary : row.vocab;
  const int num_vectors = (row.vocab - head) / kVec;
  const int tail = head + num_vectors * kVec;
  const int thread = static_cast<int>(threadIdx.x);
  const int num_threads = static_cast<int>(blockDim.x);

  const int num_singles = head + row.vocab - tail;  // at most 2 * (kVec - 1), less than a warp
  if (thread < 32 && num_singles > 0) {
    Raw single[1] = {0};
    const bool has = thread < num_singles;
    const int token = thread < head ? thread : tail + (thread - head);
    if (has) single[0] = row.data[token];
    visit(token, single, has);
  }

  const uint4* vectors = reinterpret_cast<const uint4*>(row.data + head);
  const int lane = thread & 31;
  for (int first = thread - lane; first < num_vectors; first += kBatch * num_threads) {
    uint4 loaded[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int index = first + lane + j * num_threads;
      loaded[j] = index < num_vectors ? __ldg(vectors + index) : uint4{0, 0, 0, 0};
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (first + j * num_threads >= num_vectors) break;  // for the whole warp
      const int index = first + lane + j * num_threads;
      Raw raw[kVec];
      memcpy(raw, &loaded[j], sizeof raw);
      visit(head + index * kVec, raw, index < num_vectors);
    }
  }
}

// Log-prob of x under total, as on the CPU.
__device__ inline float logprob_of(float x, const OnlineSum& total) {
  const double difference = static_cast<double>(x) - static_cast<double>(total.max);
  return static_cast<float>(difference - log(static_cast<double>(total.sum)));
}

// What a block keeps in shared memory.
struct RowShared {
  OnlineSum sums[kMaxWarps];
  Best bests[kMaxWarps];
  struct Weights {
    uint64_t at[3];
  } weights[kMaxWarps];
};

template <class Logit>
__device__ OnlineSum block_sum(const DeviceRow<Logit>& row, RowShared& shared) {
  OnlineSum total;
  visit_row<4>(row, [&](int, const auto& raw, bool has) {
    constexpr int kCount = sizeof(raw) / sizeof(raw[0]);
    if (!has) return;
    float x[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = row.value(raw[i]);
    add_to_sum(total, x);
  });
  return block_reduce(total, shared.sums, merge_sums);
}

}  // namespace spec_rollout::cuda
