// One row of logits, read in blocks that fit the first-level cache: whatever the dtype, a block
// becomes float32 values logit / T, and no more than a block is ever held as float32.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "sixteen_bits.h"
#include "spec_rollout/check.h"
#include "spec_rollout/logits.h"

namespace spec_rollout::cpu::SPEC_ROLLOUT_ISA {

constexpr int kBlock = 512;  // tokens
constexpr int kGroup =
    64;  // blocks are padded to a multiple of this; the noise of a group is made at once

class LogitsRow {
 public:
  LogitsRow(const LogitsView& view, int64_t row, float inv_temperature)
      : dtype_(view.dtype), vocab_(view.vocab), inv_temperature_(inv_temperature) {
    const int64_t item = view.dtype == DType::kFloat32 ? 4 : 2;
    data_ = static_cast<const char*>(view.data) + row * view.row_stride * item;
  }

  int64_t vocab() const { return vocab_; }
  int64_t num_blocks() const { return (vocab_ + kBlock - 1) / kBlock; }

  // Values of tokens block * kBlock ..., then -inf up to a multiple of kGroup; returns that
  // multiple.
  int load_block(int64_t block, float* x) const {
    const int64_t begin = block * kBlock;
    const int count = static_cast<int>(std::min<int64_t>(kBlock, vocab_ - begin));
    switch (dtype_) {
      case DType::kBFloat16:
        convert(static_cast<const uint16_t*>(data_) + begin, count, x, bfloat16_to_float);
        break;
      case DType::kFloat16:
        convert(static_cast<const uint16_t*>(data_) + begin, count, x, half_to_float);
        break;
      default:
        convert(static_cast<const float*>(data_) + begin, count, x, [](float v) { return v; });
    }
    const int padded = (count + kGroup - 1) / kGroup * kGroup;
    for (int i = count; i < padded; ++i) x[i] = -INFINITY;
    return padded;
  }

  float at(int64_t token) const {
    float logit;
    switch (dtype_) {
      case DType::kBFloat16:
        logit = bfloat16_to_float(static_cast<const uint16_t*>(data_)[token]);
        break;
      case DType::kFloat16:
        logit = half_to_float(static_cast<const uint16_t*>(data_)[token]);
        break;
      default:
        logit = static_cast<const float*>(data_)[token];
    }
    return exact_mul(logit, inv_temperature_);
  }

 private:
  template <class T, class ToFloat>
  void convert(const T* logits, int count, float* x, ToFloat to_float) const {
    const float scale = inv_temperature_;
    if (count == kBlock) {  // a constant number of iterations: no scalar remainder
      for (int i = 0; i < kBlock; ++i) x[i] = exact_mul(to_float(logits[i]), scale);
    } else {
      for (int i = 0; i < count; ++i) x[i] = exact_mul(to_float(logits[i]), scale);
    }
  }

  const void* data_;
  DType dtype_;
  int64_t vocab_;
  float inv_temperature_;
};

// log sum_v e^(x_v), held as the maximum and sum_v e^(x_v - max).
struct LogSum {
  float max = -INFINITY;
  double sum = 0.0;

  // A good row has the 1 of its maximum in the sum. NaN or +inf anywhere makes the sum NaN; without
  // any finite value it stays near 0.
  bool valid() const { return sum >= 0.5; }
  float logprob(float x) const {
    return static_cast<float>((static_cast<double>(x) - max) - std::log(sum));
  }
};

// Sum and maximum are kept per vector lane, the sum rescaled once a block, so that nothing is
// reduced across lanes before the row ends.
class LogSumLanes {
 public:
  LogSumLanes() : max_(splat(-FLT_MAX)), sum_(splat(0.0f)) {}

  // Returns the block's maximum per lane.
  VecF add(const float* x, int count) {
    VecF top0 = splat(-INFINITY), top1 = top0;
    for (int i = 0; i < count; i += 2 * kVecLanes) {
      top0 = vec_max(top0, load(x + i));
      top1 = vec_max(top1, load(x + i + kVecLanes));
    }
    const VecF top = vec_max(top0, top1);
    const VecF max = vec_max(max_, top);
    VecF sum0 = sum_ * vec_exp(max_ - max), sum1 = splat(0.0f);
    VecF part0 = splat(0.0f);
    for (int i = 0; i < count; i += 2 * kVecLanes) {
      part0 = part0 + vec_exp(load(x + i) - max);
      sum1 = sum1 + vec_exp(load(x + i + kVecLanes) - max);
    }
    max_ = max;
    sum_ = sum0 + (part0 + sum1);
    return top;
  }

  LogSum total() const {
    LogSum result;
    result.max = reduce_max(max_);
    for (int i = 0; i < kVecLanes; ++i) {
      result.sum +=
          static_cast<double>(sum_[i]) * std::exp(static_cast<double>(max_[i]) - result.max);
    }
    return result;
  }

 private:
  VecF max_, sum_;
};

// block_max, if given, receives the maximum of each block.
inline LogSum log_sum(const LogitsRow& row, float* block_max) {
  alignas(64) float x[kBlock];
  LogSumLanes lanes;
  const int64_t num_blocks = row.num_blocks();
  for (int64_t b = 0; b < num_blocks; ++b) {
    const VecF top = lanes.add(x, row.load_block(b, x));
    if (block_max != nullptr) block_max[b] = reduce_max(top);
  }
  return lanes.total();
}

// Raises what made a row invalid.
[[noreturn]] inline void fail_bad_row(const LogitsView& view, int64_t row) {
  const LogitsRow values(view, row, 1.0f);
  for (int64_t v = 0; v < view.vocab; ++v) {
    const float x = values.at(v);
    if (x != x || x == INFINITY) {
      fail("logits: expected numbers below +inf, got ", x, " at [", row, ", ", v, "]");
    }
  }
  fail(
      "logits: expected a finite logit in every row (after division by the temperature), got none "
      "in row ",
      row);
}

}  // namespace spec_rollout::cpu::SPEC_ROLLOUT_ISA
