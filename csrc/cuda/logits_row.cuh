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
  static constexpr uint4 kNothing = {0xff800000u, 0xff800000u, 0xff800000u,
                                     0xff800000u};  // of -inf
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
  static constexpr uint4 kNothing = {0xfc00fc00u, 0xfc00fc00u, 0xfc00fc00u,
                                     0xfc00fc00u};  // of -inf
  __device__ static float to_float(Raw raw) { return __half2float(__ushort_as_half(raw)); }
  template <int kCount>
  __device__ __forceinline__ static void to_floats(const Raw (&raw)[kCount], float (&x)[kCount]) {
    if constexpr (kCount % 2 == 0) {
#pragma unroll
      for (int i = 0; i < kCount; i += 2) {
        __half2 pair;
        memcpy(&pair, &raw[i], sizeof pair);
        const float2 both = __half22float2(pair);
        x[i] = both.x;
        x[i + 1] = both.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[i] = to_float(raw[i]);
    }
  }
};
struct BFloat16Logit {
  using Raw = uint16_t;
  static constexpr int kBits = 16;
  static constexpr Raw kInfinity = 0x7f80u;
  static constexpr uint4 kNothing = {0xff80ff80u, 0xff80ff80u, 0xff80ff80u,
                                     0xff80ff80u};  // of -inf
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

  __device__ float raw_at(int64_t token) const { return Logit::to_float(data[token]); }
  // x = logit / temperature, of which scores are made.
  __device__ float scaled(float logit) const { return exact_mul(logit, inv_temperature); }
  __device__ float value(Raw raw) const { return scaled(Logit::to_float(raw)); }
  __device__ float at(int64_t token) const { return value(data[token]); }
  __device__ float slope() const { return slope_of(inv_temperature); }

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

// Vectors on their way from device memory, kDepth per thread: loops that need many registers have
// few threads, which must have more bytes in flight each than registers could hold. Each thread
// reads what it copied itself, so no barrier is needed. Addresses are those of shared memory, 32
// bits wide: a generic pointer would be converted at every use.
constexpr int kRingVectors = 2048;

template <int kThreads, class Logit>
class RowRing {
 public:
  static constexpr int kDepth = kRingVectors / kThreads;
  static_assert(kDepth % 2 == 0, "vectors are taken in pairs");

  // Starts the copies of the first vectors.
  __device__ __forceinline__ RowRing(const DeviceRow<Logit>& row, const RowParts<Logit>& parts,
                                     uint4* ring)
      : vectors_(reinterpret_cast<const uint4*>(row.data + parts.head)),
        num_vectors_(parts.num_vectors),
        slot_(static_cast<uint32_t>(__cvta_generic_to_shared(ring + threadIdx.x))),
        end_(slot_ + kDepth * stride()) {
    int index = static_cast<int>(threadIdx.x);
    uint32_t slot = slot_;
#pragma unroll
    for (int j = 0; j < kDepth; j += 2) {
      copy(slot, index);
      copy(slot + stride(), index + num_threads());
      commit();
      slot += 2 * stride();
      index += 2 * num_threads();
    }
  }

  // Vectors `index` and index + blockDim.x of the row, once they are there; the second one may be
  // beyond its end.
  __device__ __forceinline__ void take(uint4 (&pair)[2]) const {
    asm volatile("cp.async.wait_group %0;" ::"n"(kDepth / 2 - 1) : "memory");
    pair[0] = load(slot_);
    pair[1] = load(slot_ + stride());
  }

  // One of them once more, until `advance`.
  template <class Element, int kVec>
  __device__ __forceinline__ void again(int which, Element (&raw)[kVec]) const {
    const uint4 vector = load(slot_ + which * stride());
    memcpy(raw, &vector, sizeof raw);
  }

  // Starts the copies that take these two vectors' places. To be called when they have been worked
  // on.
  __device__ __forceinline__ void advance(int index) {
    copy(slot_, index + kDepth * num_threads());
    copy(slot_ + stride(), index + (kDepth + 1) * num_threads());
    commit();
    slot_ += 2 * stride();
    if (slot_ >= end_) slot_ -= kDepth * stride();
  }

 private:
  __device__ static int num_threads() { return static_cast<int>(blockDim.x); }
  __device__ static uint32_t stride() { return blockDim.x * static_cast<uint32_t>(sizeof(uint4)); }
  __device__ static uint4 load(uint32_t address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
  }
  __device__ void copy(uint32_t to, int index) const {
    if (index < num_vectors_) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(vectors_ + index)
                   : "memory");
    }
  }
  __device__ static void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

  const uint4* vectors_;
  int num_vectors_;
  uint32_t slot_, end_;
};

// Calls visit(token, raw) for all of a row, once per element, by all threads of a block, through
// `ring`; raw has kVec elements or 1.
template <int kThreads, class Logit, class Visit>
__device__ __forceinline__ void visit_row_async(const DeviceRow<Logit>& row, uint4* ring_memory,
                                                Visit&& visit) {
  constexpr int kVec = DeviceRow<Logit>::kVec;
  const RowParts<Logit> parts(row);
  const int num_threads = static_cast<int>(blockDim.x);
  RowRing<kThreads, Logit> ring(row, parts, ring_memory);
  visit_singles(row, parts, visit);
  for (int index = static_cast<int>(threadIdx.x); index < parts.num_vectors;
       index += 2 * num_threads) {
    uint4 pair[2];
    ring.take(pair);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (index + j * num_threads >= parts.num_vectors) break;
      typename Logit::Raw raw[kVec];
      memcpy(raw, &pair[j], sizeof raw);
      visit(parts.head + (index + j * num_threads) * kVec, raw);
    }
    ring.advance(index);
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
  uint32_t bound;    // ordered key of the best score that any warp has found in the row
  int32_t excluded;  // as in DrawSpec
  float threshold;   // on the scores of the row
};

}  // namespace spec_rollout::cuda
