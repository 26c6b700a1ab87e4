// One declaration of every CPU kernel per instruction-set level (SPEC_ROLLOUT_ISA), and the level's
// table.
#pragma once

#include "spec_rollout/forward.h"

namespace spec_rollout::cpu {

struct Kernels {
  void (*accept_prefix)(const AcceptPrefixArgs&, int);
  void (*token_logprobs)(const TokenLogprobsArgs&, int);
  void (*sample_tokens)(const SampleTokensArgs&, int);
  void (*verify_prefix)(const VerifyPrefixArgs&, int);
  void (*causal_attention)(const CausalAttentionArgs&, int);
  void (*rms_norm)(const RmsNormArgs&, int);
  void (*silu_mul)(const SiluMulArgs&, int);
  void (*rotate_halves)(const RotateHalvesArgs&, int);
  void (*gumbel_noise)(const int64_t*, IntVec, int64_t, int64_t, float*, int);
};

namespace SPEC_ROLLOUT_ISA {
void accept_prefix(const AcceptPrefixArgs& args, int num_threads);
void token_logprobs(const TokenLogprobsArgs& args, int num_threads);
void sample_tokens(const SampleTokensArgs& args, int num_threads);
void verify_prefix(const VerifyPrefixArgs& args, int num_threads);
void causal_attention(const CausalAttentionArgs& args, int num_threads);
void rms_norm(const RmsNormArgs& args, int num_threads);
void silu_mul(const SiluMulArgs& args, int num_threads);
void rotate_halves(const RotateHalvesArgs& args, int num_threads);
void gumbel_noise(const int64_t* keys, IntVec positions, int64_t batch, int64_t vocab, float* out,
                  int num_threads);
extern const Kernels kernels;
}  // namespace SPEC_ROLLOUT_ISA

}  // namespace spec_rollout::cpu
