// The distribution one row of logits stands for, worked out by a block: sums, top-k and top-p
// thresholds, and draws by Gumbel noise. Same decisions as csrc/cpu/target_row.h: they share the
// arithmetic.
#pragma once

#include <cfloat>
#include <cstddef>

#include "launch.cuh"
#include "logits_row.cuh"

namespace spec_rollout::cuda {

constexpr float kKeepAll = -FLT_MAX;  // every token that can be drawn at all

// What is drawn from a row, besides its distribution.
struct DrawSpec {
  NoiseKey key{0};
  int64_t position = 0;
  int32_t excluded = -1;  // a token that takes no part, or has its score in `start`
  Best start;             // a candidate to beat
};

struct RowDraw {
  OnlineSum total;  // over the kept tokens
  Best best;
};

enum class Draw { kNone, kArgmax, kNoise };

// One thread's part of the sum of a row and, unless kDraw is kNone, of the argmax of its scores,
// with or without noise. What other warps have found only spares work: when it is seen does not
// change the result.
template <Draw kDraw, class Logit>
class RowSearch {
 public:
  using Raw = typename Logit::Raw;
  OnlineSum total;
  Best best;

  __device__ RowSearch(const DeviceRow<Logit>& row, const Best& start, RowShared::Search& shared)
      : best(start),
        row_(row),
        slope_(row.slope()),
        shared_(shared),
        differences_(shared.threshold > kKeepAll) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(&shared));
#if defined(__CUDA_ARCH__)
    // Hidden, so that it is kept: finding where shared memory begins waits for a special register.
    asm volatile("mov.u32 %0, %1;" : "=r"(address_) : "r"(address));
#else
    address_ = address;
#endif
  }

  // Tokens from `token` on, which is head + a multiple of kTokens; by all lanes of a warp.
  template <class Chunk>
  __device__ __forceinline__ void take(const Chunk& chunk, int32_t token) {
    float sums[kGroups], group = 0.0f;
    if (!differences_) {
      group = near_sums(chunk, sums);
      if (!(group <= kLargeTerms)) differences_ = !raise_and_sum(chunk, sums, group);
    }
    if (differences_) group = any_sums(chunk, sums);
    total.sum += group;
    if constexpr (kDraw != Draw::kNone) {
      const uint32_t key = bound_key();
      if (key != seen_) see(key);
      if constexpr (kDraw == Draw::kArgmax) {
        if (!(group * scale_ < 1.0f)) consider_all(chunk, token);
      } else {
        if (__any_sync(kFullMask, !(group * scale_ < kLeastExponential))) search(sums, token);
      }
    }
  }

  // The score of the likeliest token of a chunk: with one of every thread there is a bound before
  // any other token is looked at.
  template <class Chunk>
  __device__ __forceinline__ void begin(const Chunk& chunk, int32_t token) {
    float top = -INFINITY;
    int at = 0;
#pragma unroll 1
    for (int j = 0; j < kChunk; ++j) {
      float y[kVec];
      floats(chunk, j, y);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        if (!(y[i] > top)) continue;
        top = y[i];
        at = j * kVec + i;
      }
    }
    score(top, token + at);
    atomicMax(&shared_.bound, ordered_key(best.score));
  }

  // One token beside the vectors.
  __device__ __forceinline__ void take_single(const Raw (&raw)[1], int32_t token) {
    float y[1] = {Logit::to_float(raw[0])}, term[1];
    if (row_.scaled(y[0]) < shared_.threshold) y[0] = -INFINITY;  // NaN stays, to be reported
    add_to_sum(total, y, slope_, term);
    if (kDraw == Draw::kArgmax) offer(y[0], token);
    if (kDraw == Draw::kNoise) score(y[0], token);
    if (kDraw != Draw::kNone) atomicMax(&shared_.bound, ordered_key(best.score));
  }

  static constexpr int kVec = DeviceRow<Logit>::kVec;
  static constexpr int kTokens = kChunk * kVec;

 private:
  static constexpr int kGroups = kTokens / kNoiseGroup;
  static constexpr int kGroupVectors = kChunk / kGroups;
  static_assert(kTokens <= 32, "a lane per token");

  template <class Chunk>
  __device__ __forceinline__ static void floats(const Chunk& chunk, int j, float (&y)[kVec]) {
    const uint4 vector = chunk[j];
    Raw raw[kVec];
    memcpy(raw, &vector, sizeof raw);
    Logit::to_floats(raw, y);
  }

  // Sums of terms of kNoiseGroup tokens each, and of all, where ref is not far from 0.
  template <class Chunk>
  __device__ __forceinline__ float near_sums(const Chunk& chunk, float (&sums)[kGroups]) const {
    const float c = exact_mul(total.ref, slope_);
    float all = 0.0f;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int j = 0; j < kGroupVectors; ++j) {
        float y[kVec], term[kVec];
        floats(chunk, g * kGroupVectors + j, y);
        const float sum = near_terms(y, slope_, c, term);
        sums[g] = j == 0 ? sum : sums[g] + sum;
      }
      all = g == 0 ? sums[g] : all + sums[g];
    }
    return all;
  }

  // The same after moving ref; false, and nothing summed, where that is far.
  template <class Chunk>
  __device__ __forceinline__ bool raise_and_sum(const Chunk& chunk, float (&sums)[kGroups],
                                                float& group) {
#pragma unroll 1
    for (int j = 0; j < kChunk; ++j) {
      float y[kVec];
      floats(chunk, j, y);
      raise_ref(total, y, slope_);
    }
    seen_ = 0;
    if (is_far(exact_mul(total.ref, slope_))) return false;
    group = near_sums(chunk, sums);
    return true;
  }

  // The same for whatever logits, of filtered rows too. One copy of the code for all vectors.
  template <class Chunk>
  __device__ __forceinline__ float any_sums(const Chunk& chunk, float (&sums)[kGroups]) {
    float all = 0.0f;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) sums[g] = 0.0f;
    seen_ = 0;
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
#pragma unroll 1
      for (int j = 0; j < kChunk; ++j) {
        float y[kVec], term[kVec];
        floats(chunk, j, y);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          if (row_.scaled(y[i]) < shared_.threshold) y[i] = -INFINITY;  // NaN stays
        }
        if (pass == 0) {
          raise_ref(total, y, slope_);
          continue;
        }
        const float sum = any_terms(y, total, slope_, term);
        all += sum;
#pragma unroll
        for (int g = 0; g < kGroups; ++g) sums[g] += g == j / kGroupVectors ? sum : 0.0f;
      }
    }
    return all;
  }

  // A word of shared_, read each time.
  template <size_t kOffset>
  __device__ __forceinline__ uint32_t shared_word() const {
    uint32_t word = 0;
#if defined(__CUDA_ARCH__)
    asm volatile("ld.shared.u32 %0, [%1 + %2];"
                 : "=r"(word)
                 : "r"(address_), "n"(kOffset)
                 : "memory");
#endif
    return word;
  }
  __device__ __forceinline__ uint32_t bound_key() const {
    return shared_word<offsetof(RowShared::Search, bound)>();
  }
  __device__ __forceinline__ int head() const {
    return static_cast<int>(shared_word<offsetof(RowShared::Search, head)>());
  }

  // Read each time, and so the keys of Philox's rounds made each time: they would take 20
  // registers.
  struct Noise {
    NoiseKey key{0};
    int64_t position;
  };
  __device__ __forceinline__ Noise noise() const {
    uint4 words = shared_.noise;
#if defined(__CUDA_ARCH__)
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                 : "r"(address_)
                 : "memory");
#endif
    Noise result;
    result.key.k0 = words.x;
    result.key.k1 = words.y;
    result.position = static_cast<int64_t>(uint64_t{words.w} << 32 | words.z);
    return result;
  }

  __device__ __forceinline__ void see(uint32_t key) {
    seen_ = key;
    const float gap = reach_gap(row_.scaled(total.ref), from_ordered_key(key));
    scale_ = reach_scale(gap);
  }

  // A candidate: logit and token, whose score without noise counts.
  __device__ __forceinline__ void offer(float y, int32_t token) {
    const float x = row_.scaled(y);
    if (x >= shared_.threshold) consider(x, token, best);
  }
  // The same with noise.
  __device__ __forceinline__ void score(float y, int32_t token) {
    const float x = row_.scaled(y);
    if (!(x >= shared_.threshold) || token == shared_.excluded) return;
    const Noise mine = noise();
    consider(exact_add(x, gumbel(mine.key, mine.position, token)), token, best);
  }

  template <class Chunk>
  __device__ __forceinline__ void consider_all(const Chunk& chunk, int32_t token) {
#pragma unroll 1
    for (int j = 0; j < kChunk; ++j) {
      float y[kVec];
      floats(chunk, j, y);
#pragma unroll
      for (int i = 0; i < kVec; ++i) offer(y[i], token + j * kVec + i);
    }
    const uint32_t key = ordered_key(best.score);
    if (key > seen_) atomicMax(&shared_.bound, key);
  }

  // Looks whether the noise of some group lets one of its tokens reach the bound.
  __device__ __forceinline__ void search(const float (&sums)[kGroups], int32_t token) {
    // The groups that the chunk has tokens of: one more where its first is not a group's first.
    uint32_t bits[kGroups + 1];
    const uint32_t first = static_cast<uint32_t>(token) / kNoiseGroup;
    const Noise mine = noise();
    const Philox4 four = group_bits4(mine.key, mine.position, first >> 2);
    if constexpr (kGroups == 4) {
#pragma unroll
      for (int g = 0; g < 4; ++g) bits[g] = four.x[g];
    } else {
      const bool upper = (first & 2) != 0;
      bits[0] = upper ? four.x[2] : four.x[0];
      bits[1] = upper ? four.x[3] : four.x[1];
      bits[2] = four.x[2];
    }
    bool reaches = false;
    if (head() == 0) {
      bits[kGroups] = 0;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) reaches |= group_may_reach(bits[g], sums[g], scale_);
    } else {
      if (kGroups == 4 || (first & 2) != 0) {
        bits[kGroups] = group_bits4(mine.key, mine.position, (first >> 2) + 1).x[0];
      }
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        reaches |= group_may_reach(min(bits[g], bits[g + 1]), sums[g], scale_);
      }
    }
    unsigned lanes = __ballot_sync(kFullMask, reaches);
#pragma unroll 1
    while (lanes != 0) {
      score_chunk(__ffs(static_cast<int>(lanes)) - 1, bits, token);
      lanes &= lanes - 1;
    }
  }

  // All tokens of one lane's chunk, one by each lane.
  __device__ __forceinline__ void score_chunk(int source, const uint32_t (&bits)[kGroups + 1],
                                              int32_t first_token) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int32_t token = __shfl_sync(kFullMask, first_token, source) + lane;
    const bool known = lane < kTokens && token < shared_.end;
    const float y = known ? row_.raw_at(token) : -INFINITY;
    const float ref = __shfl_sync(kFullMask, total.ref, source);
    const float scale = __shfl_sync(kFullMask, scale_, source);
    uint32_t group_bits = 0;
    const int group = (head() + lane) / kNoiseGroup;
#pragma unroll
    for (int g = 0; g <= kGroups; ++g) {
      const uint32_t word = __shfl_sync(kFullMask, bits[g], source);
      if (g == group) group_bits = word;
    }
    const Noise mine = noise();
    const Philox4 four = gumbel_bits4(mine.key, mine.position, static_cast<uint32_t>(token) >> 2);
    const uint32_t own = four.word(token & 3);
    const int place = token % kNoiseGroup;
    const bool leads = place == leader_from_bits(group_bits);
    const float x = row_.scaled(y);
    if (x >= shared_.threshold && token != shared_.excluded &&
        token_may_reach(group_bits, own, leads, term_of(y, ref, slope_), scale)) {
      consider(exact_add(x, gumbel_from_bits(group_bits, own, place)), token, best);
    }
    const uint32_t key = __reduce_max_sync(kFullMask, ordered_key(best.score));
    if (key > seen_) {
      if (lane == 0) atomicMax(&shared_.bound, key);
      see(key);
    }
  }

  const DeviceRow<Logit>& row_;
  const float slope_;
  RowShared::Search& shared_;
  uint32_t address_;   // of shared_
  bool differences_;   // terms are made of differences, if any: ref is far, or the row is filtered
  uint32_t seen_ = 0;  // the bound that scale_ stands for; 0: none
  float scale_ = INFINITY;
};

// Sum over the tokens with x >= threshold and, unless kDraw is kNone, their argmax, in one read of
// the row.
template <Draw kDraw, int kThreads, class Logit>
__device__ RowDraw block_sum_and_draw(const DeviceRow<Logit>& row, float threshold,
                                      const DrawSpec& spec, RowShared& shared) {
  const RowParts<Logit> parts(row);
  if (threadIdx.x == 0) {
    const auto position = static_cast<uint64_t>(spec.position);
    shared.search = {{spec.key.k0, spec.key.k1, static_cast<uint32_t>(position),
                      static_cast<uint32_t>(position >> 32)},
                     ordered_key(spec.start.score),
                     threshold,
                     spec.excluded,
                     parts.head,
                     parts.tail};
  }
  __syncthreads();
  using Ring = RowRing<kThreads, Logit>;
  using Search = RowSearch<kDraw, Logit>;
  Ring ring(row, parts, shared.ring);
  Search search(row, spec.start, shared.search);
  visit_singles(row, parts, [&](int token, const auto& raw) { search.take_single(raw, token); });
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int32_t token = parts.head + (Ring::first_chunk() + kChunk * lane) * Search::kVec;
  if (kDraw == Draw::kNoise) {
    if (Ring::num_chunks(parts) > 0) search.begin(ring.peek(), token);
    __syncthreads();
  }
  for (int left = Ring::num_chunks(parts); left > 0; --left) {
    ring.take([&](const typename Ring::Chunk& chunk) { search.take(chunk, token); });
    token += Ring::stride() * Search::kVec;
  }
  const float slope = row.slope();
  RowDraw result{block_reduce(search.total, shared.sums,
                              [slope](const OnlineSum& a, const OnlineSum& b) {
                                return merge_sums(a, b, slope);
                              }),
                 search.best};
  if (kDraw != Draw::kNone) {
    result.best = block_reduce(result.best, shared.bests, [](Best a, const Best& b) {
      consider(b.score, b.id, a);
      return a;
    });
  }
  return result;
}

// Sums of weight(x, key) over the row, one for each of three weights.
template <int kThreads, class Logit, class Weigh>
__device__ RowShared::Weights block_weights(const DeviceRow<Logit>& row, RowShared& shared,
                                            Weigh weigh) {
  RowShared::Weights sums{};
  visit_row_async<kThreads>(row, shared.ring, [&](const auto& raw) {
    constexpr int kCount = sizeof(raw) / sizeof(raw[0]);
#pragma unroll
    for (int i = 0; i < kCount; ++i) weigh(raw[i], sums);
  });
  return block_reduce(sums, shared.weights, [](RowShared::Weights a, const RowShared::Weights& b) {
#pragma unroll
    for (int j = 0; j < 3; ++j) a.at[j] += b.at[j];
    return a;
  });
}

// The largest x with the weights of x_v >= x at least `target`: bisection on the keys of the
// logits, into four parts a pass. Integer sums, so the result does not depend on their order.
template <int kThreads, class Logit, class Weight>
__device__ float block_select(const DeviceRow<Logit>& row, uint64_t target, RowShared& shared,
                              Weight weight) {
  using Raw = typename Logit::Raw;
  using Row = DeviceRow<Logit>;
  // The weights from `low` on reach the target (or nothing does), those from `high` on, `above`, do
  // not.
  uint32_t low = static_cast<uint32_t>(static_cast<Raw>(~(Logit::kInfinity | Row::kSign))) + 1;
  uint32_t high = Row::key(Logit::kInfinity);
  uint64_t above = 0;
  while (high - low > 1) {
    const uint32_t quarter = (high - low) / 4 > 0 ? (high - low) / 4 : 1;
    const RowShared::Weights sums =
        block_weights<kThreads>(row, shared, [&](Raw raw, RowShared::Weights& add) {
          const uint32_t key = Row::key(raw);
          if (key < low + quarter || key >= high) return;
          const uint64_t w = weight(row.value(raw));
          add.at[0] += w;
          if (key >= low + 2 * quarter) add.at[1] += w;
          if (key >= low + 3 * quarter) add.at[2] += w;
        });
    uint32_t next_low = low, next_high = high;
    uint64_t next_above = above;
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      const uint32_t pivot = low + static_cast<uint32_t>(j + 1) * quarter;
      if (pivot >= high) break;
      if (above + sums.at[j] >= target) {
        next_low = pivot;
      } else {
        next_high = pivot;
        next_above = above + sums.at[j];
        break;
      }
    }
    low = next_low;
    high = next_high;
    above = next_above;
  }
  return row.value(Row::from_key(static_cast<Raw>(low)));
}

// Threshold on x of the tokens that top-k, then top-p keep. A call of its own: most rows have no
// filter, and its registers must not burden theirs.
template <int kThreads, class Logit>
__device__ __noinline__ float filter_threshold(const DeviceRow<Logit> row,
                                               const RowSampling sampling, RowShared& shared) {
  float threshold = kKeepAll;
  if (sampling.top_k > 0) {
    threshold = fmaxf(threshold, block_select<kThreads>(row, static_cast<uint64_t>(sampling.top_k),
                                                        shared, [](float) { return uint64_t{1}; }));
  }
  if (sampling.top_p < 1.0f) {
    const float max =
        block_sum_and_draw<Draw::kArgmax, kThreads>(row, kKeepAll, {}, shared).best.score;
    const float kept = threshold;
    const auto weight = [max, kept](float x) { return x >= kept ? top_p_weight(x, max) : 0; };
    const uint64_t total =
        block_weights<kThreads>(row, shared, [&](typename Logit::Raw raw, RowShared::Weights& add) {
          add.at[0] += weight(row.value(raw));
        }).at[0];
    const uint64_t target = top_p_target(total, sampling.top_p);
    threshold = fmaxf(threshold, block_select<kThreads>(row, target, shared, weight));
  }
  return threshold;
}

template <int kThreads, class Logit>
__device__ __forceinline__ float block_threshold(const DeviceRow<Logit>& row,
                                                 const RowSampling& sampling, RowShared& shared) {
  if (sampling.top_k > 0 || sampling.top_p < 1.0f) {
    return filter_threshold<kThreads>(row, sampling, shared);
  }
  return kKeepAll;
}

// Raises what is wrong with a row's parameters; returns usable ones.
__device__ inline RowSampling checked_sampling(const SamplingArgs& args, int64_t row, int64_t vocab,
                                               int32_t* status) {
  const bool good = valid_temperature(row_temperature(args, row)) &&
                    valid_top_k(row_top_k(args, row)) && valid_top_p(row_top_p(args, row)) &&
                    (row_top_p(args, row) == 1.0f || vocab <= kMaxFilterVocab);
  if (!good) {
    if (threadIdx.x == 0) raise_status(status, kStatusBadSampling);
    return RowSampling{};
  }
  return row_sampling(args, row, vocab);
}

}  // namespace spec_rollout::cuda
