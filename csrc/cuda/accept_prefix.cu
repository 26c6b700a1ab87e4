// One warp per row: 32 tokens are tested at once, and the row is left at the first ballot with a rejection, so the
// bytes read follow the accepted tokens. Rows are taken grid-stride, neighbours by neighbouring warps.
#include "launch.cuh"
#include "spec_rollout/ops.h"

namespace spec_rollout::cuda {
namespace {

constexpr int kWarpsPerBlock = 8;

template <bool kReadsDraft>
__global__ void __launch_bounds__(kWarpsPerBlock * 32)
    accept_prefix_kernel(const AcceptPrefixArgs args) {
  const int lane = threadIdx.x & 31;
  const int64_t num_warps = static_cast<int64_t>(gridDim.x) * kWarpsPerBlock;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + (threadIdx.x >> 5);
  for (int64_t row = first; row < args.batch; row += num_warps) {
    int64_t draft_begin, target_begin, len;
    if (args.cu_lens) {
      draft_begin = target_begin = args.cu_lens[row];
      len = args.cu_lens[row + 1] - draft_begin;
      if (draft_begin < 0 || len < 0 || draft_begin + len > args.max_len) {
        if (lane == 0) raise_status(args.status, kStatusBadOffsets);
        draft_begin = target_begin = len = 0;
      }
    } else {
      draft_begin = row * args.draft_row_stride;
      target_begin = row * args.target_row_stride;
      len = args.lens[row];
      if (len < 0 || len > args.max_len) {
        if (lane == 0) raise_status(args.status, kStatusBadOffsets);
        len = 0;
      }
    }
    const NoiseKey key(args.keys[row]);
    const int64_t position = args.positions ? args.positions[row] : 0;
    int64_t accepted = len;
    for (int64_t i = 0; i < len; i += 32) {
      bool rejected = false;
      if (i + lane < len) {
        const float p = args.target_logprobs[target_begin + i + lane];
        const float q = kReadsDraft ? args.draft_logprobs[draft_begin + i + lane] : 0.0f;
        if (p != p || q != q) raise_status(args.status, kStatusNanLogprob);
        const float threshold = accept_threshold(args.rule, p, q);
        // Half the tokens of a slowly moving policy have a threshold above 0 and need no uniform.
        rejected = !(threshold >= 0.0f) &&
                   !accept_test(threshold, accept_bits(key, position + i + lane));
      }
      const unsigned rejections = __ballot_sync(0xffffffffu, rejected);
      if (rejections != 0) {
        accepted = i + __ffs(static_cast<int>(rejections)) - 1;
        break;
      }
    }
    if (lane == 0) args.accepted_lens[row] = static_cast<int32_t>(accepted);
  }
}

}  // namespace

void accept_prefix(const AcceptPrefixArgs& args, Stream stream) {
  if (args.batch == 0) return;
  const unsigned blocks = grid_size((args.batch + kWarpsPerBlock - 1) / kWarpsPerBlock);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (args.draft_logprobs != nullptr) {
    accept_prefix_kernel<true><<<blocks, kWarpsPerBlock * 32, 0, cuda_stream>>>(args);
  } else {
    accept_prefix_kernel<false><<<blocks, kWarpsPerBlock * 32, 0, cuda_stream>>>(args);
  }
  check_launch("accept_prefix");
}

}  // namespace spec_rollout::cuda
