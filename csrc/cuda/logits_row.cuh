// One row of logits, read by a block: 16-byte loads from aligned addresses, single elements at the
// unaligned ends.
#pragma once

#include <cuda_fp16.h>

#include <type_traits>

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

// A row on its way from device memory to a block. Loops that need many registers have few threads,
// which must have more bytes in flight each than registers could hold: copies go to shared memory
// by themselves. A warp takes 32 * kChunk vectors at a time, which its lanes copy side by side, so
// that accesses are coalesced, but read as kChunk neighbours each: those share a call of Philox.
// Only the lanes of a warp wait for each other. Addresses are those of shared memory, 32 bits wide:
// a generic pointer would be converted at every use.
constexpr int kChunk = 4;
constexpr int kWarpChunk = 32 * kChunk;
constexpr int kRingVectors = 2048;
constexpr int kRingBytes = kRingVectors * sizeof(uint4);
constexpr int kRingAlignment = 4096;  // of addresses: shared memory itself may begin anywhere

// values[i] by constant indices only, so that they stay in registers; i is in range.
template <class T, int kCount>
__device__ __forceinline__ T pick(const T (&values)[kCount], int i) {
  T value = values[0];
#pragma unroll
  for (int j = 1; j < kCount; ++j) value = j == i ? values[j] : value;
  return value;
}

// kChunk vectors of neighbouring tokens, that a thread reads from shared memory each time it is
// asked for one, for loops that have no registers for all of them ...
class SharedChunk {
 public:
  __device__ explicit SharedChunk(uint32_t address) : address_(address) {}
  __device__ __forceinline__ uint4 operator[](int j) const {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address_ ^ static_cast<uint32_t>(j * sizeof(uint4)))
                 : "memory");
    return v;
  }

 private:
  uint32_t address_;  // of the first vector; see RowRing
};

// ... or has in registers.
class RegisterChunk {
 public:
  __device__ __forceinline__ explicit RegisterChunk(const SharedChunk& chunk) {
#pragma unroll
    for (int j = 0; j < kChunk; ++j) vectors_[j] = chunk[j];
  }
  // By constant indices only, so that they stay there.
  __device__ __forceinline__ uint4 operator[](int j) const {
    uint4 v = vectors_[0];
#pragma unroll
    for (int i = 1; i < kChunk; ++i) {
      v.x = i == j ? vectors_[i].x : v.x;
      v.y = i == j ? vectors_[i].y : v.y;
      v.z = i == j ? vectors_[i].z : v.z;
      v.w = i == j ? vectors_[i].w : v.w;
    }
    return v;
  }

 private:
  uint4 vectors_[kChunk];
};

template <int kThreads, class Logit>
class RowRing {
 public:
  static constexpr int kDepth = kRingVectors / (kThreads * kChunk);  // chunks in flight
  static_assert(kDepth == 1 || kDepth == 2);
  using Chunk = std::conditional_t<kDepth == 1, RegisterChunk, SharedChunk>;

  // Starts the copies of the first chunks.
  __device__ __forceinline__ RowRing(const DeviceRow<Logit>& row, const RowParts<Logit>& parts,
                                     unsigned char* ring)
      : next_(reinterpret_cast<const uint4*>(row.data + parts.head) + first_chunk() + lane()),
        left_(parts.num_vectors - first_chunk() - lane()) {
    const auto memory = static_cast<uint32_t>(__cvta_generic_to_shared(ring));
    const uint32_t base = ((memory + kRingAlignment - 1) & ~(kRingAlignment - 1u)) +
                          kBytes * static_cast<uint32_t>(kDepth * first_chunk());
    static_assert(kRingAlignment % (2 * kSlot) == 0, "a bit of the address says which slot it is");
    // Vector i of a chunk lies in place i ^ ((i / 8) % 4): both copies and reads of eight lanes
    // touch all banks once.
    write_ = base + kBytes * static_cast<uint32_t>(lane() ^ (lane() / 8));
    read_ = base + kBytes * static_cast<uint32_t>(kChunk * lane() + lane() / 2 % 4);
#pragma unroll
    for (int j = 0; j < kDepth; ++j) copy(write_ + j * kSlot);
  }

  // Vector of the row that this warp's first chunk begins with; the next one is stride() on.
  __device__ static int first_chunk() { return static_cast<int>(threadIdx.x) / 32 * kWarpChunk; }
  __device__ static int stride() { return static_cast<int>(blockDim.x) * kChunk; }
  __device__ static int num_chunks(const RowParts<Logit>& parts) {
    return (parts.num_vectors - first_chunk() + stride() - 1) / stride();
  }

  // This lane's part of the warp's chunk, once it is there; -inf beyond the end of the row.
  __device__ __forceinline__ SharedChunk peek() const {
    asm volatile("cp.async.wait_group %0;" ::"n"(kDepth - 1) : "memory");
    __syncwarp();
    return SharedChunk(read_);
  }

  // Calls work(chunk) with it and starts the copies that take its place, as soon as it is read.
  template <class Work>
  __device__ __forceinline__ void take(Work&& work) {
    const Chunk chunk(peek());
    if constexpr (kDepth == 1) advance();
    work(chunk);
    if constexpr (kDepth == 2) advance();
  }

 private:
  static constexpr uint32_t kBytes = sizeof(uint4);
  static constexpr uint32_t kSlot = kBytes * kWarpChunk;

  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ static void start(uint32_t to, const uint4* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  }
  __device__ static void clear(uint32_t to) {
    const uint4 v = Logit::kNothing;
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z),
                 "r"(v.w)
                 : "memory");
  }
  __device__ __forceinline__ void advance() {
    __syncwarp();  // all lanes have read theirs
    copy(write_);
    if constexpr (kDepth == 2) {
      write_ ^= kSlot;
      read_ ^= kSlot;
    }
  }
  __device__ __forceinline__ void copy(uint32_t to) {
    if (left_ > 32 * (kChunk - 1)) {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) start(to + 32 * kBytes * j, next_ + 32 * j);
    } else {
#pragma unroll 1
      for (int j = 0; j < kChunk; ++j) {
        if (left_ > 32 * j) {
          start(to + 32 * kBytes * j, next_ + 32 * j);
        } else {
          clear(to + 32 * kBytes * j);
        }
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
    next_ += stride();
    left_ -= stride();
  }

  const uint4* next_;  // what this lane's next copies begin with
  int left_;           // vectors from there to the end of the row
  uint32_t write_, read_;
};

// Calls visit(raw) for all of a row, once per element, by all threads of a block, through `ring`;
// raw has kVec elements or 1, some of them -inf beyond the end of the row.
template <int kThreads, class Logit, class Visit>
__device__ __forceinline__ void visit_row_async(const DeviceRow<Logit>& row,
                                                unsigned char* ring_memory, Visit&& visit) {
  const RowParts<Logit> parts(row);
  using Ring = RowRing<kThreads, Logit>;
  Ring ring(row, parts, ring_memory);
  visit_singles(row, parts, [&](int, const auto& raw) { visit(raw); });
  for (int left = Ring::num_chunks(parts); left > 0; --left) {
    ring.take([&](const typename Ring::Chunk& chunk) {
#pragma unroll 1
      for (int j = 0; j < kChunk; ++j) {
        typename Logit::Raw raw[DeviceRow<Logit>::kVec];
        const uint4 vector = chunk[j];
        memcpy(raw, &vector, sizeof raw);
        visit(raw);
      }
    });
  }
}

// What a block keeps in shared memory.
struct RowShared {
  unsigned char ring[kRingBytes + kRingAlignment];
  OnlineSum sums[kMaxWarps];
  Best bests[kMaxWarps];
  struct Weights {
    uint64_t at[3];
  } weights[kMaxWarps];
  struct Search {
    uint4 noise;        // low and high words of the key, then of the position
    uint32_t bound;     // ordered key of the best score that any warp has found in the row
    float threshold;    // on the scores of the row
    int32_t excluded;   // as in DrawSpec
    int32_t head, end;  // the vectors' first token, and the one after their last
  } search;
};

}  // namespace spec_rollout::cuda
