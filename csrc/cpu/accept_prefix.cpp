#include <atomic>

#include "kernels.h"
#include "offsets.h"
#include "parallel.h"

namespace spec_rollout::cpu::SPEC_ROLLOUT_ISA {
namespace {

constexpr int kLanes = 16;  // one AVX-512 register of floats; a row is left within this many tokens of its rejection
constexpr int kBlock = 64;  // positions whose random bits are made together: kLanes Philox calls of four words

// Random bits of the positions of one block, made when a token of it first needs its uniform.
class BlockBits {
 public:
  explicit BlockBits(NoiseKey key) : key_(key) {}

  const uint32_t* at(int64_t position) {
    const uint64_t block = static_cast<uint64_t>(position) / kBlock;
    if (block != block_) fill(block);
    return bits_ + static_cast<uint64_t>(position) % kBlock;
  }

 private:
  // The loop is free of branches so that compilers vectorise it over the calls.
  void fill(uint64_t block) {
    block_ = block;
    const uint64_t first = block * (kBlock / 4);
    const uint32_t low = static_cast<uint32_t>(first), high = static_cast<uint32_t>(first >> 32);
    uint32_t words[4][kLanes];
    for (int i = 0; i < kLanes; ++i) {  // no carry into `high`: `first` is a multiple of kLanes
      const Philox4 out = philox4x32_10(low + static_cast<uint32_t>(i), 0u, high, kStreamAccept,
                                        key_.k0, key_.k1);
      for (int w = 0; w < 4; ++w) words[w][i] = out.x[w];
    }
    for (int i = 0; i < kLanes; ++i) {
      for (int w = 0; w < 4; ++w) bits_[4 * i + w] = words[w][i];
    }
  }

  NoiseKey key_;
  uint64_t block_ = ~uint64_t{0};
  uint32_t bits_[kBlock];
};

// Number of leading accepted tokens among kLanes, whose positions lie in one block. Sets `nan` if a log-prob is NaN.
template <bool kReadsDraft>
int accept_lanes(const RuleParams& rule, const float* target, const float* draft, BlockBits& noise,
                 int64_t position, bool& nan) {
  float threshold[kLanes];
  int any_nan = 0, any_negative = 0;
  for (int i = 0; i < kLanes; ++i) {
    const float q = kReadsDraft ? draft[i] : 0.0f;
    threshold[i] = accept_threshold(rule, target[i], q);
    any_nan |= (target[i] != target[i]) | (q != q);
    any_negative |= !(threshold[i] >= 0.0f);
  }
  nan |= any_nan != 0;
  if (!any_negative) return kLanes;  // no token needs its uniform
  const uint32_t* bits = noise.at(position);
  int count = kLanes;
  for (int i = 0; i < kLanes; ++i) {
    const bool accepted =
        (threshold[i] >= 0.0f) | (exact_log(uniform_from_bits(bits[i])) <= threshold[i]);
    const int rejected_at = accepted ? kLanes : i;
    count = rejected_at < count ? rejected_at : count;
  }
  return count;
}

template <bool kReadsDraft>
int64_t accept_row(const AcceptPrefixArgs& args, int64_t row, int64_t draft_begin,
                   int64_t target_begin, int64_t len, bool& nan) {
  const int64_t start = args.positions ? args.positions[row] : 0;
  const float* target = args.target_logprobs + target_begin;
  const float* draft = kReadsDraft ? args.draft_logprobs + draft_begin : nullptr;
  BlockBits noise{NoiseKey(args.keys[row])};
  int64_t i = 0;
  while (i < len) {
    const int64_t position = start + i;
    if (i + kLanes <= len && position % kLanes == 0) {
      const int count = accept_lanes<kReadsDraft>(
          args.rule, target + i, kReadsDraft ? draft + i : nullptr, noise, position, nan);
      if (count < kLanes) return i + count;
      i += kLanes;
      continue;
    }
    const float q = kReadsDraft ? draft[i] : 0.0f;
    nan |= (target[i] != target[i]) | (q != q);
    const float threshold = accept_threshold(args.rule, target[i], q);
    if (!(threshold >= 0.0f) && !accept_test(threshold, *noise.at(position))) return i;
    ++i;
  }
  return len;
}

}  // namespace

void accept_prefix(const AcceptPrefixArgs& args, int num_threads) {
  const bool packed = static_cast<bool>(args.cu_lens);
  if (packed) {
    check_cu_lens("cu_draft_lens", args.cu_lens, args.batch, args.max_len);
  } else {
    check_range("draft_lens", args.lens, args.batch, 0, args.max_len + 1);
  }
  std::atomic<int64_t> nan_row{-1};
  const int64_t mean_len = packed && args.batch > 0 ? args.max_len / args.batch : args.max_len;
  const int64_t grain = 1 + 16384 / (1 + mean_len);  // about 16k tokens a piece: 20 us of work
  parallel_for(args.batch, grain, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t len = packed ? args.cu_lens[r + 1] - args.cu_lens[r] : args.lens[r];
      const int64_t draft_begin = packed ? args.cu_lens[r] : r * args.draft_row_stride;
      const int64_t target_begin = packed ? args.cu_lens[r] : r * args.target_row_stride;
      bool nan = false;
      args.accepted_lens[r] = static_cast<int32_t>(
          args.draft_logprobs != nullptr
              ? accept_row<true>(args, r, draft_begin, target_begin, len, nan)
              : accept_row<false>(args, r, draft_begin, target_begin, len, nan));
      if (nan) nan_row.store(r, std::memory_order_relaxed);
    }
  });
  if (nan_row >= 0) {
    fail("target_logprobs, draft_logprobs: expected numbers, got NaN in row ", nan_row.load());
  }
}

}  // namespace spec_rollout::cpu::SPEC_ROLLOUT_ISA
