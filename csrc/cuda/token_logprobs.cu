// One block per row, one read of the row.
#include "launch.cuh"
#include "logits_launch.cuh"
#include "logits_row.cuh"

namespace spec_rollout::cuda {
namespace {

template <class Logit>
__global__ void __launch_bounds__(kLogitsThreads)
    token_logprobs_kernel(const TokenLogprobsArgs args) {
  __shared__ __align__(8) unsigned char memory[kMaxWarps * sizeof(OnlineSum)];
  OnlineSum* sums = reinterpret_cast<OnlineSum*>(memory);
  for (int64_t r = blockIdx.x; r < args.logits.num_rows; r += gridDim.x) {
    const float temperature =
        args.temperatures != nullptr ? args.temperatures[r] : args.temperature;
    const DeviceRow<Logit> row(args.logits, r, inverse_temperature(temperature));
    const float slope = row.slope();
    OnlineSum total;
    visit_row<4>(row, [&](int, const auto& raw) {
      constexpr int kCount = sizeof(raw) / sizeof(raw[0]);
      float y[kCount], term[kCount];
      Logit::to_floats(raw, y);
      add_to_sum(total, y, slope, term);
    });
    total = block_reduce(total, sums, [slope](const OnlineSum& a, const OnlineSum& b) {
      return merge_sums(a, b, slope);
    });
    if (threadIdx.x == 0) {
      const int64_t token = args.token_ids[r];
      const bool known = token >= 0 && token < args.logits.vocab;
      if (!known) raise_status(args.status, kStatusBadTokenId);
      const bool good = valid_sum(total, row.inv_temperature);
      if (!good) raise_status(args.status, kStatusBadLogits);
      if (!valid_temperature(temperature)) raise_status(args.status, kStatusBadSampling);
      args.logprobs[r] = known && good ? logprob_of(row.raw_at(token), total, slope) : NAN;
    }
  }
}

}  // namespace

void token_logprobs(const TokenLogprobsArgs& args, Stream stream) {
  if (args.logits.num_rows == 0) return;
  const dim3 grid(grid_size(args.logits.num_rows));
  const dim3 block(logits_threads(args.logits.vocab, args.logits.num_rows, num_processors()));
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  dispatch_dtype(args.logits.dtype, [&](auto logit) {
    using Logit = decltype(logit);
    token_logprobs_kernel<Logit><<<grid, block, 0, cuda_stream>>>(args);
  });
  check_launch("token_logprobs");
}

}  // namespace spec_rollout::cuda
