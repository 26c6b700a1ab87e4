// Compiled once per instruction-set level, like the kernels it lists.
#include "kernels.h"

namespace spec_rollout::cpu::SPEC_ROLLOUT_ISA {

extern const Kernels kernels = {accept_prefix, token_logprobs,   sample_tokens,
                                verify_prefix, causal_attention, rms_norm,
                                silu_mul,      rotate_halves,    gumbel_noise};

}  // namespace spec_rollout::cpu::SPEC_ROLLOUT_ISA
