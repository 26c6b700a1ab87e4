// Top-k and top-p as a threshold on x: the kept tokens are those with x >= threshold, so ties with
// the last kept value are kept too, and no sorted order is ever made.
#pragma once

#include <vector>

#include "logits_row.h"

namespace spec_rollout::cpu::SPEC_ROLLOUT_ISA {

constexpr float kKeepAll = -FLT_MAX;  // every token that can be drawn at all

// What a token counts for: 1 (top-k), or its share of the probability (top-p).
struct CountWeight {
  void exps(const float*, float*) const {}
  uint64_t operator()(float) const { return 1; }
};
struct ShareWeight {
  float max;
  void exps(const float* x, float* e) const {
    for (int i = 0; i < kGroup; ++i) e[i] = exact_exp(exact_sub(x[i], max));
  }
  uint64_t operator()(float e) const { return fixed_point_weight(e); }
};

// The bin, counted from the top, in which the sum reaches `target`; what is above it is taken off
// `target`. Whole runs of bins are stepped over first: their sums vectorise.
inline uint32_t bin_at(const uint64_t* histogram, uint32_t num_bins, uint64_t& target) {
  constexpr uint32_t kRun = 64;
  uint32_t end = num_bins;
  for (; end > kRun; end -= kRun) {
    uint64_t sum = 0;
    for (uint32_t i = end - kRun; i < end; ++i) sum += histogram[i];
    if (sum >= target) break;
    target -= sum;
  }
  uint32_t bin = end - 1;
  while (bin > 0 && histogram[bin] < target) target -= histogram[bin--];
  return bin;
}

// The largest t with the weights of x_v >= t at least `target`, by radix selection on
// ordered_key(x): three passes over the blocks that reach `lower`, a value known not to be above t.
template <class Weight>
float select_threshold(const LogitsRow& row, const float* block_max, float lower, uint64_t target,
                       const Weight& weight) {
  struct Digit {
    int shift, bits;
  };
  constexpr Digit kDigits[] = {{21, 11}, {10, 11}, {0, 10}};
  uint64_t histogram[1 << 11];
  alignas(64) float x[kBlock];
  alignas(64) float e[kGroup];
  alignas(64) uint32_t bin_of[kGroup];
  uint32_t prefix = 0;
  for (const Digit& digit : kDigits) {
    const uint32_t mask = (1u << digit.bits) - 1;
    const uint32_t no_bin = mask + 1;
    std::fill(histogram, histogram + no_bin, 0);
    for (int64_t b = 0; b < row.num_blocks(); ++b) {
      if (!(block_max[b] >= lower)) continue;
      const int count = row.load_block(b, x);
      for (int g = 0; g < count; g += kGroup) {
        uint32_t any = 0;
        for (int i = 0; i < kGroup; ++i) {
          const uint32_t key = ordered_key(x[g + i]);
          // Shifted in two steps: one shift by 32 is not defined.
          const bool in = (x[g + i] >= lower) & (((key >> digit.shift) >> digit.bits) == prefix);
          bin_of[i] = in ? (key >> digit.shift) & mask : no_bin;
          any |= in;
        }
        if (!any) continue;
        weight.exps(x + g, e);
        for (int i = 0; i < kGroup; ++i) {
          if (bin_of[i] != no_bin) histogram[bin_of[i]] += weight(e[i]);
        }
      }
    }
    prefix = (prefix << digit.bits) | bin_at(histogram, mask + 1, target);
  }
  return from_ordered_key(prefix);
}

inline float top_k_threshold(const LogitsRow& row, const float* block_max, int64_t k,
                             std::vector<float>& scratch) {
  float lower = kKeepAll;
  if (k <= row.num_blocks()) {
    // k blocks have a token that reaches the k-th largest block maximum, so k tokens do.
    scratch.assign(block_max, block_max + row.num_blocks());
    std::nth_element(scratch.begin(), scratch.begin() + (k - 1), scratch.end(),
                     std::greater<float>());
    lower = std::max(lower, scratch[static_cast<size_t>(k - 1)]);
  }
  const float threshold =
      select_threshold(row, block_max, lower, static_cast<uint64_t>(k), CountWeight{});
  return threshold >= lower ? threshold : kKeepAll;  // else fewer than k tokens can be drawn
}

// Of the tokens with x >= kept.
inline float top_p_threshold(const LogitsRow& row, const float* block_max, float max, float kept,
                             float top_p) {
  alignas(64) float x[kBlock];
  alignas(64) float e[kGroup];
  const ShareWeight share{max};
  uint64_t total = 0;
  for (int64_t b = 0; b < row.num_blocks(); ++b) {
    if (!(block_max[b] >= kept && block_max[b] >= max - kFilterRange)) continue;
    const int count = row.load_block(b, x);
    for (int g = 0; g < count; g += kGroup) {
      share.exps(x + g, e);
      for (int i = 0; i < kGroup; ++i) total += x[g + i] >= kept ? share(e[i]) : 0;
    }
  }
  const uint64_t target = top_p_target(total, top_p);
  float range = kFilterRange;
  if (target < total) {
    // Tokens further below the maximum than this have too little weight, even all together, to be
    // needed.
    const double spare = static_cast<double>(total - target);
    range = std::min(
        range,
        static_cast<float>(std::log(static_cast<double>(row.vocab()) * 0x1p40 / spare)) + 0.01f);
  }
  return select_threshold(row, block_max, std::max(kept, max - range), target, share);
}

// The sum over the kept tokens.
inline LogSum kept_log_sum(const LogitsRow& row, const float* block_max, float threshold) {
  alignas(64) float x[kBlock];
  LogSumLanes lanes;
  for (int64_t b = 0; b < row.num_blocks(); ++b) {
    if (!(block_max[b] >= threshold)) continue;
    const int count = row.load_block(b, x);
    for (int i = 0; i < count; ++i) x[i] = x[i] >= threshold ? x[i] : -INFINITY;
    lanes.add(x, count);
  }
  return lanes.total();
}

}  // namespace spec_rollout::cpu::SPEC_ROLLOUT_ISA
