#include <atomic>

#include "kernels.h"
#include "offsets.h"
#include "parallel.h"

namespace spec_rollout::cpu::SPEC_ROLLOUT_ISA {
namespace {

constexpr int kLanes = 16;  // one AVX-512 register of floats; a row is left within this many tokens of its rejection

// Thresholds and random bits of kLanes tokens at once: the loops are free of branches so that compilers vectorise them.
// Returns the number of leading accepted tokens; sets `nan` if a log-prob among those read is NaN.
template <bool kReadsDraft>
int accept_lanes(const RuleParams& rule, const float* target, const float* draft, NoiseKey key,
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
  uint32_t bits[kLanes];
  const uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(position) >> 32);
  const uint32_t low = static_cast<uint32_t>(position);
  if (static_cast<uint64_t>(low) + kLanes <= 0xffffffffu) {
    for (int i = 0; i < kLanes; ++i) {
      bits[i] = philox4x32_10(low + static_cast<uint32_t>(i), 0u, high, kStreamAccept, key.k0, key.k1)
                    .x[0];
    }
  } else {
    for (int i = 0; i < kLanes; ++i) bits[i] = accept_bits(key, position + i);
  }
  int accepted[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    accepted[i] = (threshold[i] >= 0.0f) |
                  (exact_log(uniform_from_bits(bits[i])) <= threshold[i]);
  }
  int count = 0;
  while (count < kLanes && accepted[count]) ++count;
  return count;
}

template <bool kReadsDraft>
int64_t accept_row(const AcceptPrefixArgs& args, int64_t row, int64_t draft_begin,
                   int64_t target_begin, int64_t len, bool& nan) {
  const NoiseKey key(args.keys[row]);
  const int64_t position = args.positions ? args.positions[row] : 0;
  const float* target = args.target_logprobs + target_begin;
  const float* draft = kReadsDraft ? args.draft_logprobs + draft_begin : nullptr;
  int64_t i = 0;
  for (; i + kLanes <= len; i += kLanes) {
    const int count = accept_lanes<kReadsDraft>(args.rule, target + i,
                                                kReadsDraft ? draft + i : nullptr, key, position + i,
                                                nan);
    if (count < kLanes) return i + count;
  }
  for (; i < len; ++i) {
    const float q = kReadsDraft ? draft[i] : 0.0f;
    nan |= (target[i] != target[i]) | (q != q);
    const float threshold = accept_threshold(args.rule, target[i], q);
    if (!accept_test(threshold, accept_bits(key, position + i))) return i;
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
