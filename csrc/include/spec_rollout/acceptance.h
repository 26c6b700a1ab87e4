// The accept test on log-probabilities, used by every back end. A decision is a function of the
// rule, the two log-probabilities, the noise key and the position alone.
#pragma once

#include "spec_rollout/philox.h"
#include "spec_rollout/platform.h"

namespace spec_rollout {

// Numbers shared with spec_rollout/acceptance.py.
enum class RuleKind : int32_t { kLenient = 0, kCoupled = 1, kOneHot = 2 };

struct RuleParams {
  RuleKind kind = RuleKind::kLenient;
  float log_lenience = 0.0f;
  float scale = 1.0f;
  float min_target_logprob =
      -INFINITY;  // a token must be more probable than this; -inf: any possible token
};

inline namespace SPEC_ROLLOUT_ISA {

// The right-hand side of the test ln u <= threshold. +inf always accepts, -inf (and NaN, which only
// non-numbers in the input can cause) never does. A token the target cannot produce (p = 0) is
// rejected even if the draft could not have produced it either; one the draft could not have
// produced (q = 0) but the target can is accepted. An infinite log_lenience keeps drafts unseen, so
// no bound on p goes with it (`Lenient` refuses one).
SR_HD float accept_threshold(const RuleParams& rule, float target_logprob, float draft_logprob) {
  if (rule.kind == RuleKind::kOneHot) return target_logprob;
  if (rule.log_lenience == INFINITY) return INFINITY;
  if (!(target_logprob > rule.min_target_logprob)) return -INFINITY;
  return exact_mul(rule.scale,
                   exact_add(exact_sub(target_logprob, draft_logprob), rule.log_lenience));
}

// ln u <= threshold with u uniform in (0, 1].
SR_HD bool accept_test(float threshold, uint32_t bits) {
  if (threshold >= 0.0f) return true;
  const float uniform = uniform_from_bits(bits);
#if defined(__CUDA_ARCH__)
  // Away from the threshold the same answer without a logarithm, which is ten times as long.
  float limit;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(limit) : "f"(threshold * 1.44269504f));
  const float margin = fmaf(-threshold, 1e-5f, 1e-5f);
  if (uniform < fmaf(-limit, margin, limit)) return true;
  if (uniform > fmaf(limit, margin, limit)) return false;
#endif
  return exact_log(uniform) <= threshold;
}

}  // namespace SPEC_ROLLOUT_ISA
}  // namespace spec_rollout
