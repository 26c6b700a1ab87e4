// Checks of sampling parameters, before anything is written.
#pragma once

#include "spec_rollout/check.h"
#include "spec_rollout/logits.h"

namespace spec_rollout::cpu::SPEC_ROLLOUT_ISA {

inline void check_temperatures(const SamplingArgs& args, int64_t rows) {
  const int64_t count = args.temperatures != nullptr ? rows : 1;
  for (int64_t r = 0; r < count; ++r) {
    const float t = row_temperature(args, r);
    if (!valid_temperature(t))
      fail("temperature: expected 0 <= value < inf, got ", t, " at index ", r);
  }
}

inline void check_sampling(const SamplingArgs& args, int64_t rows, int64_t vocab) {
  check_temperatures(args, rows);
  bool top_p_used = false;
  for (int64_t r = 0; r < (args.top_ks ? rows : 1); ++r) {
    const int64_t k = row_top_k(args, r);
    if (!valid_top_k(k)) fail("top_k: expected 0 (off) or more, got ", k, " at index ", r);
  }
  for (int64_t r = 0; r < (args.top_ps != nullptr ? rows : 1); ++r) {
    const float p = row_top_p(args, r);
    if (!valid_top_p(p)) fail("top_p: expected 0 < value <= 1, got ", p, " at index ", r);
    top_p_used |= p < 1.0f;
  }
  if (top_p_used && vocab > kMaxFilterVocab) {
    fail("top_p: expected a vocabulary of at most ", kMaxFilterVocab, " tokens, got ", vocab);
  }
}

}  // namespace spec_rollout::cpu::SPEC_ROLLOUT_ISA
