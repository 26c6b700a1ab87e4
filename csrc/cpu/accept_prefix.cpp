#include <atomic>

#include "kernels.h"
#include "offsets.h"
#include "parallel.h"
#include "philox_block.h"
#include "simd.h"

namespace spec_rollout::cpu::SPEC_ROLLOUT_ISA {
namespace {

constexpr int kLanes =
    16;  // one AVX-512 register of floats; a row is left within this many tokens of its rejection
constexpr uint32_t kAllBits = (1u << kVecLanes) - 1;
constexpr int kBlock = kPhiloxWords;  // positions whose random bits are made together

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
  void fill(uint64_t block) {
    block_ = block;
    const uint64_t first = block * (kBlock / 4);  // no carry: a multiple of kPhiloxCalls
    philox_block(static_cast<uint32_t>(first), 0u, static_cast<uint32_t>(first >> 32),
                 kStreamAccept, key_.k0, key_.k1, bits_);
  }

  NoiseKey key_;
  uint64_t block_ = ~uint64_t{0};
  alignas(64) uint32_t bits_[kBlock];
};

// One bit per lane of a comparison.
inline uint32_t lane_bits(VecI mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask));
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(mask)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kVecLanes; ++i) bits |= (mask[i] != 0 ? 1u : 0u) << i;
  return bits;
#endif
}

// Number of leading accepted tokens among kLanes, whose positions lie in one block. Sets `nan` if a
// log-prob is NaN.
//
// ln u <= u - 1, so a token is surely accepted where u - 1 is below its threshold by more than the
// rounding of either side. That takes no logarithm, and is unsure about as seldom as a token is
// rejected: P(unsure) <= 1.6 P(rejected).
template <bool kReadsDraft>
int accept_lanes(const RuleParams& rule, const float* target, const float* draft, BlockBits& noise,
                 int64_t position, bool& nan) {
  const VecF zero = splat(0.0f);
  alignas(64) float threshold[kLanes];
  uint32_t any_nan = 0, any_negative = 0;
  for (int i = 0; i < kLanes; i += kVecLanes) {
    const VecF p = load(target + i), q = kReadsDraft ? load(draft + i) : zero;
    VecF t = p;  // accept_threshold, operation for operation
    if (rule.kind != RuleKind::kOneHot) {
      t = splat(rule.scale) * ((p - q) + splat(rule.log_lenience));
      t = p > splat(rule.min_target_logprob) ? t : splat(-INFINITY);
    }
    any_nan |= lane_bits((p != p) | (q != q));
    any_negative |= ~lane_bits(t >= zero) & kAllBits;
    std::memcpy(threshold + i, &t, sizeof t);
  }
  nan |= any_nan != 0;
  if (!any_negative) return kLanes;  // no token needs its uniform
  const uint32_t* bits = noise.at(position);
  uint32_t unsure = 0;
  for (int i = 0; i < kLanes; i += kVecLanes) {
    VecI high;
    std::memcpy(&high, bits + i, sizeof high);
    high = (high >> 8) & 0x00ffffff;
    const VecF t = load(threshold + i);
    // At least u - 1 before rounding.
    const VecF excess = __builtin_convertvector(high, VecF) * splat(0x1p-24f) + splat(0x1p-24f - 1);
    const VecI sure = (t >= zero) | (excess <= t * splat(1.0001f) - splat(1e-6f));
    unsure |= (~lane_bits(sure) & kAllBits) << i;
  }
  for (; unsure != 0; unsure &= unsure - 1) {
    const int i = __builtin_ctz(unsure);
    if (!accept_test(threshold[i], bits[i])) return i;
  }
  return kLanes;
}

// Full reuse reads the log-probs only to refuse NaN.
template <bool kReadsDraft>
int64_t accept_all(const float* target, const float* draft, int64_t len, bool& nan) {
  int any_nan = 0;
  for (int64_t i = 0; i < len; ++i) {
    any_nan |= target[i] != target[i];
    if (kReadsDraft) any_nan |= draft[i] != draft[i];
  }
  nan = any_nan != 0;
  return len;
}

template <bool kReadsDraft>
int64_t accept_row(const AcceptPrefixArgs& args, int64_t row, int64_t draft_begin,
                   int64_t target_begin, int64_t len, bool& nan) {
  const int64_t start = args.positions ? args.positions[row] : 0;
  const float* target = args.target_logprobs + target_begin;
  const float* draft = kReadsDraft ? args.draft_logprobs + draft_begin : nullptr;
  if (args.rule.kind != RuleKind::kOneHot && args.rule.log_lenience == INFINITY) {
    return accept_all<kReadsDraft>(target, draft, len, nan);
  }
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
