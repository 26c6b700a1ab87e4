// The distribution one row of logits stands for, worked out by a block: sums, top-k and top-p
// thresholds, and draws by Gumbel noise. Same decisions as csrc/cpu/target_row.h: they share the
// arithmetic.
#pragma once

#include <cfloat>

#include "launch.cuh"
#include "logits_row.cuh"

namespace spec_rollout::cuda {

constexpr float kKeepAll = -FLT_MAX;  // every token that can be drawn at all

// Random bits of kCount tokens from `token` on; a quad of noise may begin before it.
template <int kCount>
__device__ __forceinline__ void gumbel_bits_from(NoiseKey key, int64_t position, int32_t token,
                                                 uint32_t (&bits)[kCount]) {
  constexpr int kAlignedQuads = (kCount + 3) / 4;
  constexpr int kQuads = (kCount + 6) / 4;  // enough for any offset of the first token in its quad
  const int offset = token & 3;
  const uint32_t quad = static_cast<uint32_t>(token) >> 2;
  uint32_t all[4 * kQuads] = {};
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    if (q < kAlignedQuads || offset != 0) {
      const Philox4 four = gumbel_bits4(key, position, quad + static_cast<uint32_t>(q));
#pragma unroll
      for (int i = 0; i < 4; ++i) all[4 * q + i] = four.x[i];
    }
  }
  // all[offset + i] by constant indices only, so that it stays in registers.
  if (offset & 1) {
#pragma unroll
    for (int i = 0; i + 1 < 4 * kQuads; ++i) all[i] = all[i + 1];
  }
  if (offset & 2) {
#pragma unroll
    for (int i = 0; i + 2 < 4 * kQuads; ++i) all[i] = all[i + 2];
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) bits[i] = all[i];
}

// What is drawn from a row, besides its distribution.
struct DrawSpec {
  NoiseKey key;
  int64_t position;
  bool greedy = false;    // no noise
  int32_t excluded = -1;  // a token that takes no part, or has its score in `start`
  Best start;             // a candidate to beat
};

// Takes kCount tokens into an argmax. `bound` is a score that the final result is known to reach.
template <int kCount>
__device__ __forceinline__ void consider_tokens(const float (&x)[kCount], int32_t token,
                                                const DrawSpec& spec, float threshold, float bound,
                                                Best& best) {
  if (spec.greedy) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (x[i] >= threshold && token + i != spec.excluded) consider(x[i], token + i, best);
    }
    return;
  }
  bool any = false;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    any |= x[i] >= threshold && exact_add(x[i], kMaxGumbel) >= bound;
  }
  if (!any) return;
  uint32_t bits[kCount];
  gumbel_bits_from(spec.key, spec.position, token, bits);
  uint32_t candidates = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const bool may_win = x[i] >= threshold && exact_add(x[i], gumbel_bound(bits[i])) >= bound;
    candidates |= static_cast<uint32_t>(may_win) << i;
  }
  // Rare, so one copy of the logarithms serves all positions.
#pragma unroll 1
  while (candidates != 0) {
    const int index = __ffs(static_cast<int>(candidates)) - 1;
    candidates &= candidates - 1;
    float candidate = x[0];
    uint32_t candidate_bits = bits[0];
#pragma unroll
    for (int i = 1; i < kCount; ++i) {
      candidate = i == index ? x[i] : candidate;
      candidate_bits = i == index ? bits[i] : candidate_bits;
    }
    if (token + index != spec.excluded) {
      consider(exact_add(candidate, gumbel_from_bits(candidate_bits)), token + index, best);
    }
  }
}

struct RowDraw {
  OnlineSum total;  // over the kept tokens
  Best best;
};

// Sum and, if kDraw, argmax over the tokens with x >= threshold, in one read of the row.
template <bool kDraw, class Logit>
__device__ RowDraw block_sum_and_draw(const DeviceRow<Logit>& row, float threshold,
                                      const DrawSpec& spec, RowShared& shared) {
  RowDraw result;
  result.best = spec.start;
  visit_row<kDraw ? 2 : 4>(row, [&](int token, const auto& raw, bool has) {
    constexpr int kCount = sizeof(raw) / sizeof(raw[0]);
    float bound = 0.0f;
    if (kDraw) {
      bound = from_ordered_key(__reduce_max_sync(kFullMask, ordered_key(result.best.score)));
    }
    if (!has) return;
    float x[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      x[i] = row.value(raw[i]);
      if (x[i] < threshold) x[i] = -INFINITY;  // NaN stays, to be reported
    }
    add_to_sum(result.total, x);
    if (kDraw) consider_tokens(x, token, spec, threshold, bound, result.best);
  });
  result.total = block_reduce(result.total, shared.sums, merge_sums);
  if (kDraw) {
    result.best = block_reduce(result.best, shared.bests, [](Best a, const Best& b) {
      consider(b.score, b.id, a);
      return a;
    });
  }
  return result;
}

// Sums of weight(x, key) over the row, one for each of three weights.
template <class Logit, class Weigh>
__device__ RowShared::Weights block_weights(const DeviceRow<Logit>& row, RowShared& shared,
                                            Weigh weigh) {
  RowShared::Weights sums{};
  visit_row<2>(row, [&](int, const auto& raw, bool has) {
    constexpr int kCount = sizeof(raw) / sizeof(raw[0]);
    if (!has) return;
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
template <class Logit, class Weight>
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
        block_weights(row, shared, [&](Raw raw, RowShared::Weights& add) {
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
template <class Logit>
__device__ __noinline__ float filter_threshold(const DeviceRow<Logit> row,
                                               const RowSampling sampling, RowShared& shared) {
  float threshold = kKeepAll;
  if (sampling.top_k > 0) {
    threshold = fmaxf(threshold, block_select(row, static_cast<uint64_t>(sampling.top_k), shared,
                                              [](float) { return uint64_t{1}; }));
  }
  if (sampling.top_p < 1.0f) {
    const float max = block_sum(row, shared).max;
    const float kept = threshold;
    const auto weight = [max, kept](float x) { return x >= kept ? top_p_weight(x, max) : 0; };
    const uint64_t total =
        block_weights(row, shared, [&](typename Logit::Raw raw, RowShared::Weights& add) {
          add.at[0] += weight(row.value(raw));
        }).at[0];
    const uint64_t target = top_p_target(total, sampling.top_p);
    threshold = fmaxf(threshold, block_select(row, target, shared, weight));
  }
  return threshold;
}

template <class Logit>
__device__ __forceinline__ float block_threshold(const DeviceRow<Logit>& row,
                                                 const RowSampling& sampling, RowShared& shared) {
  if (sampling.top_k > 0 || sampling.top_p < 1.0f) return filter_threshold(row, sampling, shared);
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
