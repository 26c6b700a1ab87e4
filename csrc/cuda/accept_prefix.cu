// One warp per row: 128 tokens are tested at once, four per lane because one Philox call serves
// four positions, and the row is left at the first ballot with a rejection, so the bytes read
// follow the accepted tokens. Rows are taken grid-stride, neighbours by neighbouring warps.
#include "launch.cuh"
#include "spec_rollout/ops.h"

namespace spec_rollout::cuda {
namespace {

constexpr int kWarpsPerBlock = 8;
constexpr int64_t kMaxLen = 0x7ffffe00;  // accepted lengths are int32, and a warp looks ahead

template <bool kReadsDraft>
__global__ void __launch_bounds__(kWarpsPerBlock * 32, 5)
    accept_prefix_kernel(const AcceptPrefixArgs args) {
  const int lane = threadIdx.x & 31;
  const int64_t num_warps = static_cast<int64_t>(gridDim.x) * kWarpsPerBlock;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + (threadIdx.x >> 5);
  for (int64_t row = first_row; row < args.batch; row += num_warps) {
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
    if (len > kMaxLen) {
      if (lane == 0) raise_status(args.status, kStatusBadOffsets);
      len = 0;
    }
    const NoiseKey key(args.keys[row]);
    const int64_t position = args.positions ? args.positions[row] : 0;
    const float* target = args.target_logprobs + target_begin;
    const float* draft = kReadsDraft ? args.draft_logprobs + draft_begin : nullptr;
    const int row_len = static_cast<int>(len);
    int accepted = row_len;
    // Lanes take quads of positions, so the first one may begin before the row does. The next quad
    // is on its way while one is decided: a long row is a chain of reads otherwise.
    const auto load = [&](int i, float (&p)[4], float (&q)[4]) {
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const bool has = i + w >= 0 && i + w < row_len;
        p[w] = has ? target[i + w] : 0.0f;
        q[w] = has && kReadsDraft ? draft[i + w] : 0.0f;
      }
    };
    const int first = -static_cast<int>(position & 3);
    float p[4], q[4], next_p[4], next_q[4];
    load(first + 4 * lane, p, q);
    load(first + 4 * lane + 128, next_p, next_q);
    for (int first_of_warp = first; first_of_warp < row_len; first_of_warp += 128) {
      const int i = first_of_warp + 4 * lane;
      float later_p[4], later_q[4];
      load(i + 256, later_p, later_q);
      float threshold[4];
      bool needs_bits = false;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        threshold[w] = INFINITY;
        if (i + w < 0 || i + w >= row_len) continue;
        if (p[w] != p[w] || q[w] != q[w]) raise_status(args.status, kStatusNanLogprob);
        threshold[w] = accept_threshold(args.rule, p[w], q[w]);
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
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        p[w] = next_p[w];
        q[w] = next_q[w];
        next_p[w] = later_p[w];
        next_q[w] = later_q[w];
      }
    }
    if (lane == 0) args.accepted_lens[row] = accepted;
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
