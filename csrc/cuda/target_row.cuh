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

// What a thread knows while it looks for the argmax under noise.
struct NoiseSearch {
  Best best;
  uint32_t bound_key = 0;  // the block's bound that `bound` and `scale` stand for
  float bound = -INFINITY;
  float ref = -INFINITY;  // what `scale` is relative to
  float scale = INFINITY;
  float unreachable = 0.0f;
};

// Takes the tokens of one quad of noise into the search. Element i of x and term is token `token +
// i`; the quad begins at element `first`, which may be before the elements do.
template <int kCount>
__device__ __forceinline__ void consider_quad(const float (&x)[kCount], const float (&term)[kCount],
                                              int first, int32_t token, const DrawSpec& spec,
                                              float threshold, NoiseSearch& search,
                                              uint32_t* shared_bound) {
  const Philox4 four =
      gumbel_bits4(spec.key, spec.position, static_cast<uint32_t>(token + first) >> 2);
  bool any = false;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool has = first + i >= 0 && first + i < kCount;
    any |= has && may_reach(four.x[i], pick(term, first + i), search.scale);
  }
  if (!any) return;
  // Rare, so one copy of the logarithms serves all four.
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {
    if (first + i < 0 || first + i >= kCount) continue;
    const float candidate = pick(x, first + i);
    if (candidate >= threshold && token + first + i != spec.excluded) {
      consider(exact_add(candidate, gumbel_from_bits(pick(four.x, i))), token + first + i,
               search.best);
    }
  }
  const uint32_t key = ordered_key(search.best.score);
  if (key > search.bound_key) atomicMax(shared_bound, key);
}

// Takes kCount tokens, whose terms relative to `ref` sum to `group`, into the search. What other
// warps have found only spares work: when it is seen does not change the result.
template <int kCount>
__device__ __forceinline__ void consider_tokens(const float (&x)[kCount],
                                                const float (&term)[kCount], float group, float ref,
                                                int32_t token, const DrawSpec& spec,
                                                float threshold, NoiseSearch& search,
                                                uint32_t* shared_bound) {
  const uint32_t key = *static_cast<volatile uint32_t*>(shared_bound);
  if (key != search.bound_key || ref != search.ref) {
    search.bound_key = key;
    search.ref = ref;
    search.scale = reach_scale(ref, from_ordered_key(key));
    search.unreachable = unreachable_sum(search.scale);
  }
  if (group < search.unreachable) return;
  if (kCount % 4 == 0 && (token & 3) == 0) {
#pragma unroll
    for (int first = 0; first < kCount; first += 4) {
      consider_quad(x, term, first, token, spec, threshold, search, shared_bound);
    }
  } else {
    // Vectors that begin within a quad: only where the vocabulary is no multiple of four.
#pragma unroll 1
    for (int first = -(token & 3); first < kCount; first += 4) {
      consider_quad(x, term, first, token, spec, threshold, search, shared_bound);
    }
  }
}

struct RowDraw {
  OnlineSum total;  // over the kept tokens
  Best best;
};

enum class Draw { kNone, kArgmax, kNoise };

// Sum over the tokens with x >= threshold and, unless kDraw is kNone, their argmax, without or with
// noise, in one read of the row.
template <Draw kDraw, int kThreads, class Logit>
__device__ RowDraw block_sum_and_draw(const DeviceRow<Logit>& row, float threshold,
                                      const DrawSpec& spec, RowShared& shared) {
  OnlineSum total;
  NoiseSearch search;
  search.best = spec.start;
  DrawSpec uniform = spec;
  if (kDraw == Draw::kNoise) {
    // Same for all lanes, and after a reduction the compiler knows it: the round keys of the noise
    // are worked out once per warp.
    uniform.key.k0 = __reduce_or_sync(kFullMask, spec.key.k0);
    uniform.key.k1 = __reduce_or_sync(kFullMask, spec.key.k1);
    if (threadIdx.x == 0) shared.bound = ordered_key(spec.start.score);
    __syncthreads();
  }
  const bool filtered = threshold > kKeepAll;
  visit_row_async<kThreads>(row, shared.ring, [&](int token, const auto& raw) {
    constexpr int kCount = sizeof(raw) / sizeof(raw[0]);
    float x[kCount];
    row.values(raw, x);
    if (filtered) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (x[i] < threshold) x[i] = -INFINITY;  // NaN stays, to be reported
      }
    }
    float term[kCount];
    const float group = add_to_sum(total, x, term);
    if (kDraw == Draw::kArgmax) {
      float largest = x[0];
#pragma unroll
      for (int i = 1; i < kCount; ++i) largest = fmaxf(largest, x[i]);
      if (largest >= search.best.score) {
#pragma unroll 1
        for (int i = 0; i < kCount; ++i) {
          const float candidate = pick(x, i);
          if (candidate >= threshold) consider(candidate, token + i, search.best);
        }
      }
    } else if (kDraw == Draw::kNoise) {
      consider_tokens(x, term, group, total.ref, token, uniform, threshold, search, &shared.bound);
    }
  });
  RowDraw result{block_reduce(total, shared.sums, merge_sums), search.best};
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
