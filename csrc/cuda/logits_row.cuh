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
  template <int kCount>
  __device__ __forceinline__ static void to_floats(const Raw (&raw)[kCount], float (&x)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = to_float(raw[i]);
  }
};
struct Float16Logit {
  using Raw = uint16_t;
  static constexpr int kBits = 16;
  static constexpr Raw kInfinity = 0x7c00u;
  __device__ static float to_float(Raw raw) { return __half2float(__ushort_as_half(raw)); }
  template <int kCount>
  __device__ __forceinline__ static void to_floats(const Raw (&raw)[kCount], float (&x)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = to_float(raw[i]);
  }
};
struct BFloat16Logit {
  using Raw = uint16_t;
  static constexpr int kBits = 16;
  static constexpr Raw kInfinity = 0x7f80u;
  __device__ static float to_float(Raw raw) {
    return __uint_as_float(static_cast<uint32_t>(raw) << 16);
  }
  // Two at a time: one instruction each.
  template <int kCount>
  __device__ __forceinline__ static void to_floats(const Raw (&raw)[kCount], float (&x)[kCount]) {
    if constexpr (kCount % 2 == 0) {
#pragma unroll
      for (int i = 0; i < kCount; i += 2) {
        uint32_t pair;
        memcpy(&pair, &raw[i], sizeof pair);
        x[i] = __uint_as_float(pair << 16);
        x[i + 1] = __uint_as_float(pair & 0xffff0000u);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[i] = to_float(raw[i]);
    }
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
  // The same of several elements. Most rows have temperature 1, and a branch around the products is
  // one instruction.
  template <int kCount>
  __device__ __forceinline__ void values(const Raw (&raw)[kCount], float (&x)[kCount]) const {
    Logit::to_floats(raw, x);
    if (inv_temperature != 1.0f) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[i] = exact_mul(x[i], inv_temperature);
    }
  }
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

// The part of a row that is read in 16-byte vectors, and the elements around it.
template <class Logit>
struct RowParts {
  int head, num_vectors, tail, num_singles;

  __device__ explicit RowParts(const DeviceRow<Logit>& row) {
    constexpr int kVec = DeviceRow<Logit>::kVec;
    const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(row.data) & 15u);
    const int to_boundary =
        ((16 - misaligned) & 15) / static_cast<int>(sizeof(typename Logit::Raw));
    head = to_boundary < row.vocab ? to_boundary : row.vocab;
    num_vectors = (row.vocab - head) / kVec;
    tail = head + num_vectors * kVec;
    num_singles = head + row.vocab - tail;  // at most 2 * (kVec - 1), less than a warp
  }
};

template <class Logit, class Visit>
__device__ __forceinline__ void visit_singles(const DeviceRow<Logit>& row,
                                              const RowParts<Logit>& parts, Visit&& visit) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread >= parts.num_singles) return;
  const int token = thread < parts.head ? thread : parts.tail + (thread - parts.head);
  const typename Logit::Raw single[1] = {row.data[token]};
  visit(token, single);
}

// Calls visit(token, raw) for all of a row, once per element, by all threads of a block; raw has
// kVec elements or 1. A thread loads kBatch vectors before it works on the first: for visitors that
// leave most registers, and so most threads, free.
template <int kBatch, class Logit, class Visit>
__device__ __forceinline__ void visit_row(const DeviceRow<Logit>& row, Visit&& visit) {
  constexpr int kVec = DeviceRow<Logit>::kVec;
  const RowParts<Logit> parts(row);
  visit_singles(row, parts, visit);
  const uint4* vectors = reinterpret_cast<const uint4*>(row.data + parts.head);
  const int num_threads = static_cast<int>(blockDim.x);
  for (int first = static_cast<int>(threadIdx.x); first < parts.num_vectors;
       first += kBatch * num_threads) {
    uint4 loaded[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int index = first + j * num_threads;
      loaded[j] = index < parts.num_vectors ? __ldg(vectors + index) : uint4{0, 0, 0, 0};
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int index = first + j * num_threads;
      if (index >= parts.num_vectors) break;
      typename Logit::Raw raw[kVec];
      memcpy(raw, &loaded[j], sizeof raw);
      visit(parts.head + index * kVec, raw);
    }
  }
}

// Vectors on their way from device memory, kDepth per thread: visitors that need many registers
// have few threads, which must have more bytes in flight each than registers could hold.
constexpr int kRingVectors = 2048;

__device__ __forceinline__ void copy_async(uint4* to, const uint4* from) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// visit_row through `ring`. Each thread reads what it copied itself, so no barrier is needed.
template <int kThreads, class Logit, class Visit>
__device__ __forceinline__ void visit_row_async(const DeviceRow<Logit>& row, uint4* ring,
                                                Visit&& visit) {
  constexpr int kVec = DeviceRow<Logit>::kVec;
  constexpr int kDepth = kRingVectors / kThreads;  // a power of two
  const RowParts<Logit> parts(row);
  const int num_threads = static_cast<int>(blockDim.x);
  const int thread = static_cast<int>(threadIdx.x);
  const uint4* vectors = reinterpret_cast<const uint4*>(row.data + parts.head);
#pragma unroll
  for (int j = 0; j < kDepth; ++j) {
    const int index = thread + j * num_threads;
    if (index < parts.num_vectors) copy_async(ring + index, vectors + index);
    commit_copies();
  }
  visit_singles(row, parts, visit);
  int slot = thread;
  for (int index = thread; index < parts.num_vectors; index += num_threads) {
    wait_for_copies<kDepth - 1>();
    typename Logit::Raw raw[kVec];
    memcpy(raw, ring + slot, sizeof raw);
    visit(parts.head + index * kVec, raw);
    const int next = index + kDepth * num_threads;
    if (next < parts.num_vectors) copy_async(ring + slot, vectors + next);
    commit_copies();
    slot += num_threads;
    if (slot >= kDepth * num_threads) slot = thread;
  }
}

// What a block keeps in shared memory.
struct RowShared {
  uint4 ring[kRingVectors];
  OnlineSum sums[kMaxWarps];
  Best bests[kMaxWarps];
  struct Weights {
    uint64_t at[3];
  } weights[kMaxWarps];
  uint32_t bound;  // ordered key of the best score that any warp has found in the row
};

}  // namespace spec_rollout::cuda
