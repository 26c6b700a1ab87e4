// Chooses the instruction-set level once, when the library is loaded. SPEC_ROLLOUT_ISA
// (environment) forces a lower one.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace spec_rollout::cpu {

#define SPEC_ROLLOUT_DECLARE_LEVEL(level) \
  namespace level {                       \
  extern const Kernels kernels;           \
  }
SPEC_ROLLOUT_DECLARE_LEVEL(generic)
#if defined(SPEC_ROLLOUT_X86_LEVELS)
SPEC_ROLLOUT_DECLARE_LEVEL(avx2)
SPEC_ROLLOUT_DECLARE_LEVEL(avx512)
#endif

namespace {

struct Level {
  const char* name;
  const Kernels* kernels;
  bool supported;
};

Level choose() {
  const Level levels[] = {
#if defined(SPEC_ROLLOUT_X86_LEVELS)
      {"avx512", &avx512::kernels,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")},
      {"avx2", &avx2::kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {"generic", &generic::kernels, true},
  };
  const char* forced = std::getenv("SPEC_ROLLOUT_ISA");
  for (const Level& level : levels) {
    if (level.supported && (forced == nullptr || std::strcmp(forced, level.name) == 0))
      return level;
  }
  return levels[sizeof(levels) / sizeof(levels[0]) - 1];
}

const Level& level() {
  static const Level chosen = choose();
  return chosen;
}

}  // namespace

const char* isa_in_use() { return level().name; }

void accept_prefix(const AcceptPrefixArgs& args, int num_threads) {
  level().kernels->accept_prefix(args, num_threads);
}
void token_logprobs(const TokenLogprobsArgs& args, int num_threads) {
  level().kernels->token_logprobs(args, num_threads);
}
void sample_tokens(const SampleTokensArgs& args, int num_threads) {
  level().kernels->sample_tokens(args, num_threads);
}
void verify_prefix(const VerifyPrefixArgs& args, int num_threads) {
  level().kernels->verify_prefix(args, num_threads);
}
void causal_attention(const CausalAttentionArgs& args, int num_threads) {
  level().kernels->causal_attention(args, num_threads);
}
void rms_norm(const RmsNormArgs& args, int num_threads) {
  level().kernels->rms_norm(args, num_threads);
}
void silu_mul(const SiluMulArgs& args, int num_threads) {
  level().kernels->silu_mul(args, num_threads);
}
void rotate_halves(const RotateHalvesArgs& args, int num_threads) {
  level().kernels->rotate_halves(args, num_threads);
}
void gumbel_noise(const int64_t* keys, IntVec positions, int64_t batch, int64_t vocab, float* out,
                  int num_threads) {
  level().kernels->gumbel_noise(keys, positions, batch, vocab, out, num_threads);
}

}  // namespace spec_rollout::cpu
