// The distribution that one row of logits stands for, after temperature, top-k and top-p:
// log-probabilities, the argmax, and draws by Gumbel noise. The row comes from memory once
// (log_sum); what follows reads it again from cache, and of that only the blocks that can matter.
#pragma once

#include <vector>

#include "filter.h"
#include "logits_row.h"
#include "philox_block.h"

namespace spec_rollout::cpu::SPEC_ROLLOUT_ISA {

constexpr int kGroupsOfBlock = kBlock / kNoiseGroup;
static_assert(kGroupsOfBlock == kPhiloxWords, "one batch of calls serves a block");

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
  // Groups of noise whose smallest exponential says that one of their tokens may win.
  void draw_block(int64_t block, NoiseKey key, int64_t position, int64_t excluded,
                  Best& best) const {
    alignas(64) float x[kBlock];
    alignas(64) float largest[kGroupsOfBlock];
    alignas(64) uint32_t bits[kGroupsOfBlock];
    const int num_groups = row_.load_block(block, x) / kNoiseGroup;
    const auto p = static_cast<uint64_t>(position);
    philox_block<true>(static_cast<uint32_t>(p), static_cast<uint32_t>(block * kPhiloxCalls),
                       static_cast<uint32_t>(p >> 32), kStreamGroup, key.k0, key.k1, bits);
    for (int g = 0; g < num_groups; ++g) {
      float top = x[g * kNoiseGroup];
      for (int i = 1; i < kNoiseGroup; ++i) top = std::max(top, x[g * kNoiseGroup + i]);
      largest[g] = top;
    }
    for (int g = 0; g < num_groups; ++g) {
      if (!(largest[g] >= threshold_) ||
          !(exact_add(largest[g], group_bound(bits[g])) >= best.score)) {
        continue;
      }
      draw_group(x + g * kNoiseGroup, block * kBlock + g * kNoiseGroup, bits[g], key, position,
                 excluded, best);
    }
  }

  void draw_group(const float* x, int64_t token, uint32_t group_bits, NoiseKey key,
                  int64_t position, int64_t excluded, Best& best) const {
    const float bound = group_bound(group_bits);
    for (int i = 0; i < kNoiseGroup; ++i) {
      if (!(x[i] >= threshold_) || !(exact_add(x[i], bound) >= best.score)) continue;
      if (token + i == excluded) continue;
      const float noise = i == leader_from_bits(group_bits) ? leader_gumbel(group_bits)
                                                            : gumbel(key, position, token + i);
      consider(exact_add(x[i], noise), static_cast<int32_t>(token + i), best);
    }
  }

  LogitsView logits_;
  LogitsRow row_;
  std::vector<float> block_max_, scratch_;
  LogSum total_;
  float threshold_ = kKeepAll;
};

}  // namespace spec_rollout::cpu::SPEC_ROLLOUT_ISA
