// The distribution one row of logits stands for, worked out by a block: sums, top-k and top-p
// thresholds, and draws by Gumbel noise. Same decisions as csrc/cpu/target_row.h: they share the
// arithmetic.
#pragma once

#include <cfloat>

#include "launch.cuh"
#include "logits_row.cuh"

namespace spec_rollout::cuda {

constexpr float kKeepAll = -FLT_MAX;  // every token that can be drawn at all

// values[i] by constant indices only, so that they stay in registers; i is in range.
template <class T, int kCount>
__device__ __forceinline__ T pick(const T (&values)[kCount], int i) {
  T value = values[0];
#pragma unroll
  for (int j = 1; j < kCount; ++j) value = j == i ? values[j] : value;
  return value;
}

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

  // `shared` has the threshold, the bound, and the excluded token.
  __device__ RowSearch(const DeviceRow<Logit>& row, const DrawSpec& spec, RowShared& shared)
      : best(spec.start), row_(row), slope_(row.slope()), spec_(spec), shared_(shared) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(&shared.bound));
#if defined(__CUDA_ARCH__)
    // Hidden, so that it is kept: finding where shared memory begins waits for a special register.
    asm volatile("mov.u32 %0, %1;" : "=r"(bound_address_) : "r"(address));
#else
    bound_address_ = address;
#endif
  }

  // Two vectors of whole quads, without a filter: the hot path. False where ref is far from 0, or
  // has not been found, and nothing has been done. again(j, raw) gives the vectors once more where
  // their exact scores are wanted: registers would hold them through all the noise.
  template <int kVec, class Again>
  __device__ __forceinline__ bool take_pair(const Raw (&a)[kVec], int32_t token_a,
                                            const Raw (&b)[kVec], int32_t token_b, Again again) {
    float term_a[kVec], term_b[kVec];
    const float c = exact_mul(total.ref, slope_);
    float group = terms(a, c, term_a) + terms(b, c, term_b);
    const uint32_t key = kDraw == Draw::kNone ? 0 : bound_key();
    if (!(group <= kLargeTerms) || key != seen_) {
      if (!(group <= kLargeTerms)) {
        float y[kVec];
        Logit::to_floats(a, y);
        raise_ref(total, y, slope_);
        Logit::to_floats(b, y);
        raise_ref(total, y, slope_);
        const float new_c = exact_mul(total.ref, slope_);
        if (is_far(new_c)) return false;
        group = terms(a, new_c, term_a) + terms(b, new_c, term_b);
      }
      if (kDraw != Draw::kNone) see(bound_key());
    }
    total.sum += group;
    if (kDraw == Draw::kNone || group * scale_ < kReachable) return true;
    // All quads before the one branch: their rounds are chains that hide each other's latency.
    if (kDraw == Draw::kNoise && !(reaches(term_a, token_a) | reaches(term_b, token_b)))
      return true;
#pragma unroll 1
    for (int j = 0; j < 2; ++j) {
      Raw raw[kVec];
      float term[kVec];
      again(j, raw);
      terms(raw, exact_mul(total.ref, slope_), term);
      consider(raw, term, j == 0 ? token_a : token_b);
    }
    return true;
  }

  // Any elements: unaligned ones, of filtered rows, or far ones.
  template <int kCount>
  __device__ __forceinline__ void take(const Raw (&raw)[kCount], int32_t token) {
    float y[kCount], term[kCount];
    Logit::to_floats(raw, y);
    if (shared_.threshold > kKeepAll) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (row_.scaled(y[i]) < shared_.threshold) y[i] = -INFINITY;  // NaN stays, to be reported
      }
    }
    const float ref = total.ref;
    const float group = add_to_sum(total, y, slope_, term);
    if (kDraw == Draw::kNone) return;
    const uint32_t key = bound_key();
    if (key != seen_ || ref != total.ref) see(key);
    if (group * scale_ < kReachable) return;
    consider(raw, term, token);
  }

  // The score of the likeliest token of a vector's first quad of noise: with one of every thread
  // there is a bound before any other token is looked at.
  template <int kVec>
  __device__ __forceinline__ void begin(const Raw (&raw)[kVec], int32_t token) {
    const Philox4 four = bits_of(token);
    uint32_t bits = four.x[0];
    float x = row_.scaled(Logit::to_float(raw[0]));
    int32_t id = token;
#pragma unroll
    for (int i = 1; i < 4; ++i) {
      const float other = row_.scaled(Logit::to_float(raw[i]));
      if (!(other > x)) continue;
      x = other;
      bits = four.x[i];
      id = token + i;
    }
    if (!(x >= shared_.threshold) || id == shared_.excluded) return;
    offer(exact_add(x, gumbel_from_bits(bits)), id);
    atomicMax(&shared_.bound, ordered_key(best.score));
  }

 private:
  template <int kCount>
  __device__ __forceinline__ float terms(const Raw (&raw)[kCount], float c,
                                         float (&term)[kCount]) const {
    float y[kCount];
    Logit::to_floats(raw, y);
    return near_terms(y, slope_, c, term);
  }

  __device__ __forceinline__ uint32_t bound_key() const {
#if defined(__CUDA_ARCH__)
    uint32_t key;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(key) : "r"(bound_address_) : "memory");
    return key;
#else
    return shared_.bound;
#endif
  }

  __device__ __forceinline__ void see(uint32_t key) {
    seen_ = key;
    const float gap = reach_gap(row_.scaled(total.ref), from_ordered_key(key));
    scale_ = reach_scale(gap);
  }

  __device__ __forceinline__ void offer(float score, int32_t token) {
    spec_rollout::consider(score, token, best);
  }

  __device__ __forceinline__ Philox4 bits_of(int32_t token) const {
    return gumbel_bits4(spec_.key, spec_.position, static_cast<uint32_t>(token) >> 2);
  }

  // Whether a token of a vector that begins with a quad of noise may reach the bound.
  template <int kVec>
  __device__ __forceinline__ bool reaches(const float (&term)[kVec], int32_t token) const {
    bool any = false;
#pragma unroll
    for (int first = 0; first < kVec; first += 4) {
      const Philox4 four = bits_of(token + first);
#pragma unroll
      for (int i = 0; i < 4; ++i) any |= may_reach(four.x[i], term[first + i], scale_);
    }
    return any;
  }

  // Exact scores of the tokens that may reach the bound. Rare, so one copy of the logarithms serves
  // all. Element i of raw and term is token `token + i`, which may be anywhere in its quad.
  template <int kCount>
  __device__ __forceinline__ void consider(const Raw (&raw)[kCount], const float (&term)[kCount],
                                           int32_t token) {
    if constexpr (kDraw == Draw::kArgmax) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float x = row_.scaled(Logit::to_float(raw[i]));
        if (x >= shared_.threshold) offer(x, token + i);
      }
    } else if constexpr (kDraw == Draw::kNoise) {
#pragma unroll 1
      for (int first = -(token & 3); first < kCount; first += 4) {
        const Philox4 four = bits_of(token + first);
#pragma unroll 1
        for (int i = 0; i < 4; ++i) {
          const int element = first + i;
          if (element < 0 || element >= kCount) continue;
          const uint32_t bits = pick(four.x, i);
          if (!may_reach(bits, pick(term, element), scale_)) continue;
          const float x = row_.scaled(Logit::to_float(pick(raw, element)));
          if (x >= shared_.threshold && token + element != shared_.excluded) {
            offer(exact_add(x, gumbel_from_bits(bits)), token + element);
            see(max(seen_, ordered_key(best.score)));
          }
        }
      }
    }
    const uint32_t key = ordered_key(best.score);
    if (key >= seen_) atomicMax(&shared_.bound, key);
  }

  const DeviceRow<Logit>& row_;
  const float slope_;
  const DrawSpec& spec_;
  RowShared& shared_;
  uint32_t bound_address_;
  // No token of a group reaches the bound whose terms sum to less than this over scale_.
  static constexpr float kReachable = kDraw == Draw::kNoise ? kLeastUniform : 1.0f;
  uint32_t seen_ = 0;  // the bound that scale_ stands for
  float scale_ = INFINITY;
};

// Sum over the tokens with x >= threshold and, unless kDraw is kNone, their argmax, in one read of
// the row.
template <Draw kDraw, int kThreads, class Logit>
__device__ RowDraw block_sum_and_draw(const DeviceRow<Logit>& row, float threshold,
                                      const DrawSpec& spec, RowShared& shared) {
  constexpr int kVec = DeviceRow<Logit>::kVec;
  DrawSpec uniform = spec;
  if (kDraw == Draw::kNoise) {
    // Same for all lanes, and after a reduction the compiler knows it.
    uniform.key.k0 = __reduce_or_sync(kFullMask, spec.key.k0);
    uniform.key.k1 = __reduce_or_sync(kFullMask, spec.key.k1);
  }
  if (threadIdx.x == 0) {
    shared.threshold = threshold;
    shared.bound = ordered_key(spec.start.score);
    shared.excluded = spec.excluded;
  }
  __syncthreads();
  const RowParts<Logit> parts(row);
  const int num_threads = static_cast<int>(blockDim.x);
  RowRing<kThreads, Logit> ring(row, parts, shared.ring);
  RowSearch<kDraw, Logit> search(row, uniform, shared);
  bool special = shared.threshold > kKeepAll || (kDraw == Draw::kNoise && (parts.head & 3) != 0);
  visit_singles(row, parts, [&](int token, const auto& raw) { search.take(raw, token); });
  if (kDraw == Draw::kNoise && !special) {
    if (static_cast<int>(threadIdx.x) < parts.num_vectors) {
      uint4 pair[2];
      ring.take(pair);
      typename Logit::Raw first[kVec];
      memcpy(first, &pair[0], sizeof first);
      search.begin(first, parts.head + static_cast<int>(threadIdx.x) * kVec);
    }
    __syncthreads();
  }
  for (int index = static_cast<int>(threadIdx.x); index < parts.num_vectors;
       index += 2 * num_threads) {
    uint4 pair[2];
    ring.take(pair);
    const bool both = index + num_threads < parts.num_vectors;
    if (!both) pair[1] = Logit::kNothing;
    typename Logit::Raw a[kVec], b[kVec];
    memcpy(a, &pair[0], sizeof a);
    memcpy(b, &pair[1], sizeof b);
    const int32_t token_a = parts.head + index * kVec, token_b = token_a + num_threads * kVec;
    const auto again = [&](int j, typename Logit::Raw(&raw)[kVec]) {
      ring.again(j, raw);
      const uint4 nothing = Logit::kNothing;
      if (j == 1 && !both) memcpy(raw, &nothing, sizeof raw);
    };
    if (!special) special = !search.take_pair(a, token_a, b, token_b, again);
    if (special) {
#pragma unroll 1
      for (int j = 0; j < 1 + both; ++j) {
        typename Logit::Raw raw[kVec];
        again(j, raw);
        search.take(raw, j == 0 ? token_a : token_b);
      }
    }
    ring.advance(index);
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
  visit_row_async<kThreads>(row, shared.ring, [&](int, const auto& raw) {
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
