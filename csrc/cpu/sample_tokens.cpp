#include "kernels.h"
#include "offsets.h"
#include "parallel.h"
#include "sampling_checks.h"
#include "target_row.h"

namespace spec_rollout::cpu::SPEC_ROLLOUT_ISA {

void sample_tokens(const SampleTokensArgs& args, int num_threads) {
  const LogitsView& logits = args.logits;
  const int64_t batch = logits.num_rows;
  check_sampling(args.sampling, batch, logits.vocab);
  const int64_t grain = 1 + 32768 / (1 + logits.vocab);
  parallel_for(batch, grain, num_threads, [&](int64_t begin, int64_t end) {
    TargetRow target(logits);
    for (int64_t r = begin; r < end; ++r) {
      const RowSampling sampling = row_sampling(args.sampling, r, logits.vocab);
      target.load(r, sampling);
      const int32_t token = sampling.greedy
                                ? target.argmax()
                                : target.draw(NoiseKey(args.keys[r]), args.positions[r]).id;
      args.token_ids[r] = token;
      args.logprobs[r] = target.logprob(token);
    }
  });
}

}  // namespace spec_rollout::cpu::SPEC_ROLLOUT_ISA
