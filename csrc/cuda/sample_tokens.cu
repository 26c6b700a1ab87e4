// One block per row. Without a filter the row is read once: its sum and the argmax under noise come
// from the same pass.
#include "logits_launch.cuh"
#include "target_row.cuh"

namespace spec_rollout::cuda {
namespace {

// In shared memory, where it takes no registers while the row is read.
struct SampleShared {
  RowShared row;
  RowSampling sampling;
};

template <class Logit, int kThreads>
__global__ void __launch_bounds__(kThreads, (kDrawBlocks<kThreads>))
    sample_tokens_kernel(const SampleTokensArgs args) {
  __shared__ __align__(16) unsigned char memory[sizeof(SampleShared)];
  SampleShared& shared = *reinterpret_cast<SampleShared*>(memory);
  if (threadIdx.x == 0) {
    shared.sampling = checked_sampling(args.sampling, blockIdx.x, args.logits.vocab, args.status);
  }
  __syncthreads();
  const DeviceRow<Logit> row(args.logits, blockIdx.x, shared.sampling.inv_temperature);
  const float threshold = block_threshold<kThreads>(row, shared.sampling, shared.row);
  const DrawSpec spec{NoiseKey(args.keys[blockIdx.x]), args.positions[blockIdx.x], -1, Best()};
  const RowDraw draw =
      shared.sampling.greedy
          ? block_sum_and_draw<Draw::kArgmax, kThreads>(row, threshold, spec, shared.row)
          : block_sum_and_draw<Draw::kNoise, kThreads>(row, threshold, spec, shared.row);
  if (threadIdx.x == 0) {
    const bool good = valid_sum(draw.total, row.inv_temperature) && draw.best.id >= 0;
    if (!good) raise_status(args.status, kStatusBadLogits);
    args.token_ids[blockIdx.x] = good ? draw.best.id : 0;
    args.logprobs[blockIdx.x] =
        good ? logprob_of(row.raw_at(draw.best.id), draw.total, row.slope()) : NAN;
  }
}

}  // namespace

void sample_tokens(const SampleTokensArgs& args, Stream stream) {
  if (args.logits.num_rows == 0) return;
  const dim3 grid(row_blocks(args.logits.num_rows));
  const int threads = logits_threads(args.logits.vocab, args.logits.num_rows, num_processors());
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  dispatch_dtype(args.logits.dtype, [&](auto logit) {
    using Logit = decltype(logit);
    if (threads > kLogitsThreads / 2) {
      sample_tokens_kernel<Logit, kLogitsThreads><<<grid, threads, 0, cuda_stream>>>(args);
    } else {
      sample_tokens_kernel<Logit, kLogitsThreads / 2><<<grid, threads, 0, cuda_stream>>>(args);
    }
  });
  check_launch("sample_tokens");
}

}  // namespace spec_rollout::cuda
