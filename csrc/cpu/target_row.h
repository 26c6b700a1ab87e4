// The distribution that one row of logits stands for, after temperature, top-k and top-p:
// log-probabilities, the argmax, and draws by Gumbel noise. The row comes from memory once
// (log_sum); what follows reads it again from cache, and of that only the blocks that can matter.
#pragma once

#include <vector>

#include "filter.h"
#include "logits_row.h"

namespace spec_rollout::cpu::SPEC_ROLLOUT_ISA {

// Random bits of the kGroup tokens from `token` (a multiple of 4) on.
inline void gumbel_bits_of_group(NoiseKey key, int64_t position, int64_t token, uint32_t* bits) {
  const uint32_t quad = static_cast<uint32_t>(token >> 2);
  for (uint32_t i = 0; i < kGroup / 4; ++i) {
    const Philox4 four = gumbel_bits4(key, position, quad + i);
    for (int j = 0; j < 4; ++j) bits[4 * i + j] = four.x[j];
  }
}

class TargetRow {
 public:
  explicit TargetRow(const LogitsView& logits)
      : logits_(logits),
        row_(logits, 0, 1.0f),
        block_max_(static_cast<size_t>(row_.num_blocks())) {}

  void load(int64_t row, const RowSampling& sampling) {
    row_ = LogitsRow(logits_, row, sampling.inv_temperature);
    total_ = log_sum(row_, block_max_.data());
    if (!total_.valid()) fail_bad_row(logits_, row);
    threshold_ = kKeepAll;
    if (sampling.top_k > 0) {
      threshold_ = top_k_threshold(row_, block_max_.data(), sampling.top_k, scratch_);
    }
    if (sampling.top_p < 1.0f) {
      threshold_ = top_p_threshold(row_, block_max_.data(), total_.max, threshold_, sampling.top_p);
    }
    if (threshold_ > kKeepAll) total_ = kept_log_sum(row_, block_max_.data(), threshold_);
  }

  bool kept(int64_t token) const { return row_.at(token) >= threshold_; }

  float logprob(int64_t token) const {
    const float x = row_.at(token);
    return x >= threshold_ ? total_.logprob(x) : -INFINITY;
  }

  // logit / T + noise.
  float score(int64_t token, NoiseKey key, int64_t position) const {
    return exact_add(row_.at(token), gumbel(key, position, token));
  }

  int32_t argmax() const {
    alignas(64) float x[kBlock];
    int64_t b = 0;
    while (block_max_[static_cast<size_t>(b)] != total_.max) ++b;
    row_.load_block(b, x);
    int i = 0;
    while (x[i] != total_.max) ++i;
    return static_cast<int32_t>(b * kBlock + i);
  }

  // The kept token other than `excluded` (-1: none) with the largest score, if that beats `best`.
  Best draw(NoiseKey key, int64_t position, int64_t excluded = -1, Best best = Best()) const {
    // The block with the largest logit first: it is likely to set a score that rules out most
    // others.
    const auto top = std::max_element(block_max_.begin(), block_max_.end());
    const int64_t first = top - block_max_.begin();
    draw_block(first, key, position, excluded, best);
    for (int64_t b = 0; b < row_.num_blocks(); ++b) {
      const float block_max = block_max_[static_cast<size_t>(b)];
      if (b == first || !(block_max >= threshold_)) continue;
      if (exact_add(block_max, kMaxGumbel) < best.score) continue;
      draw_block(b, key, position, excluded, best);
    }
    return best;
  }

 private:
  void draw_block(int64_t block, NoiseKey key, int64_t position, int64_t excluded,
                  Best& best) const {
    alignas(64) float x[kBlock];
    const int count = row_.load_block(block, x);
    for (int i = 0; i < count; i += kGroup) {
      draw_group(x + i, block * kBlock + i, key, position, excluded, best);
    }
  }

  void draw_group(const float* x, int64_t token, NoiseKey key, int64_t position, int64_t excluded,
                  Best& best) const {
    const float threshold = threshold_, score = best.score;
    int any = 0;
    for (int i = 0; i < kGroup; ++i) {
      any |= (x[i] >= threshold) & (exact_add(x[i], kMaxGumbel) >= score);
    }
    if (!any) return;
    alignas(64) uint32_t bits[kGroup];
    alignas(64) float bound[kGroup];
    gumbel_bits_of_group(key, position, token, bits);
    any = 0;
    for (int i = 0; i < kGroup; ++i) {
      bound[i] = x[i] >= threshold ? exact_add(x[i], gumbel_bound(bits[i])) : -INFINITY;
      any |= (bound[i] >= score) & (bound[i] > -INFINITY);
    }
    if (!any) return;
    for (int i = 0; i < kGroup; ++i) {
      if (!(bound[i] >= best.score) || bound[i] == -INFINITY || token + i == excluded) continue;
      consider(exact_add(x[i], gumbel_from_bits(bits[i])), static_cast<int32_t>(token + i), best);
    }
  }

  LogitsView logits_;
  LogitsRow row_;
  std::vector<float> block_max_, scratch_;
  LogSum total_;
  float threshold_ = kKeepAll;
};

}  // namespace spec_rollout::cpu::SPEC_ROLLOUT_ISA
