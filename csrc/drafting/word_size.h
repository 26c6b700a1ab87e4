// How much a token says by itself: characters say little, words a lot.
#pragma once

#include <cmath>
#include <cstdint>
#include <unordered_map>

namespace spec_rollout {

// Entropy of single tokens, in bits, over the first 65,536 tokens of a text. `is_lasting`: and
// again over as many of every million, as the text may change.
class WordSize {
 public:
  static constexpr double kUnknownBits = 6.0;

  explicit WordSize(bool is_lasting) : is_lasting_(is_lasting) {}

  // More text. Returns whether enough has come since the last `measure` for another: twice as much
  // at first, then a whole sample.
  bool add(const int32_t* token_ids, int64_t count) {
    bool is_due = false;
    for (int64_t i = 0; i < count; ++i, ++num_seen_) {
      // What is due is to be measured first: of the next sample there may be a few tokens only.
      if (num_seen_ >= kPeriod && is_lasting_ && !is_due) {
        counts_.clear();
        num_seen_ = 0;
        due_ = kSample;
      }
      if (num_seen_ >= kSample) continue;
      ++counts_[token_ids[i]];
      if (num_seen_ + 1 == due_) {
        is_due = true;
        due_ *= 2;
      }
    }
    return is_due;
  }

  // Bits of a token of the sample so far.
  double measure() const {
    double total = 0.0, bits = 0.0;
    for (const auto& [token, n] : counts_) total += static_cast<double>(n);
    for (const auto& [token, n] : counts_) {
      const double p = static_cast<double>(n) / total;
      bits -= p * std::log2(p);
    }
    return bits;
  }

 private:
  static constexpr int64_t kSample = 1 << 16, kPeriod = 16 * kSample, kFirst = 1 << 10;

  bool is_lasting_;
  std::unordered_map<int32_t, int64_t> counts_;
  int64_t num_seen_ = 0, due_ = kFirst;
};

}  // namespace spec_rollout
