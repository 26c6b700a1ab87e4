// One warp per row: 128 tokens are tested at once, four per lane because one Philox call serves
// four positions, and the row is left at the first ballot with a rejection, so the bytes read
// follow the accepted tokens. Rows are taken grid-stride, neighbours by neighbouring warps.
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
    // Lanes take quads of positions, so the first one may begin before the row does.
    for (int64_t first_of_warp = -(position & 3); first_of_warp < len; first_of_warp += 128) {
      const int64_t i = first_of_warp + 4 * lane;
      float threshold[4];
      bool needs_bits = false;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        threshold[w] = INFINITY;
        if (i + w < 0 || i + w >= len) continue;
        const float p = args.target_logprobs[target_begin + i + w];
        const float q = kReadsDraft ? args.draft_logprobs[draft_begin + i + w] : 0.0f;
        if (p != p || q != q) raise_status(args.status, kStatusNanLogprob);
        threshold[w] = accept_threshold(args.rule, p, q);
        needs_bits |= !(threshold[w] >= 0.0f);
      }
      int rejected_at = 4;
      if (needs_bits) {
        const Philox4 bits = accept_bits4(key, static_cast<uint64_t>(position + i) >> 2);
#pragma unroll
        for (int w = 3; w >= 0; --w) {
          if (!(threshold[w] >= 0.0f) && !accept_test(threshold[w], bits.x[w])) rejected_at = w;
        }
      }
      const unsigned rejections = __ballot_sync(0xffffffffu, rejected_at < 4);
      if (rejections != 0) {
        const int lane_of_first = __ffs(static_cast<int>(rejections)) - 1;
        accepted = first_of_warp + 4 * lane_of_first +
                   __shfl_sync(0xffffffffu, rejected_at, lane_of_first);
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
