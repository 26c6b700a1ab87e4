#include "kernels.h"
#include "logits_row.h"
#include "offsets.h"
#include "parallel.h"
#include "sampling_checks.h"

namespace spec_rollout::cpu::SPEC_ROLLOUT_ISA {

void token_logprobs(const TokenLogprobsArgs& args, int num_threads) {
  const LogitsView& logits = args.logits;
  check_range("token_ids", args.token_ids, logits.num_rows, 0, logits.vocab);
  SamplingArgs sampling;
  sampling.temperatures = args.temperatures;
  sampling.temperature = args.temperature;
  check_temperatures(sampling, logits.num_rows);
  const int64_t grain = 1 + 65536 / (1 + logits.vocab);  // about 20 us of work a piece
  parallel_for(logits.num_rows, grain, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const LogitsRow row(logits, r, inverse_temperature(row_temperature(sampling, r)));
      const LogSum total = log_sum(row, nullptr);
      if (!total.valid()) fail_bad_row(logits, r);
      args.logprobs[r] = total.logprob(row.at(args.token_ids[r]));
    }
  });
}

}  // namespace spec_rollout::cpu::SPEC_ROLLOUT_ISA
