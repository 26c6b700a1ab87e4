// Chooses the instruction-set level, once per process. SPEC_ROLLOUT_ISA (environment) forces one of
// those that the processor has.
#include <cstdlib>
#include <string>
#include <vector>

#include "kernels.h"
#include "spec_rollout/check.h"

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
};

// Levels that the processor has, the best one first.
std::vector<Level> available_levels() {
  std::vector<Level> levels;
#if defined(SPEC_ROLLOUT_X86_LEVELS)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    levels.push_back({"avx512", &avx512::kernels});
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    levels.push_back({"avx2", &avx2::kernels});
#endif
  levels.push_back({"generic", &generic::kernels});
  return levels;
}

// An unset or empty variable forces nothing.
Level choose() {
  const std::vector<Level> levels = available_levels();
  const char* forced = std::getenv("SPEC_ROLLOUT_ISA");
  if (forced == nullptr || *forced == '\0') return levels.front();
  std::string names;
  for (const Level& level : levels) {
    if (level.name == std::string(forced)) return level;
    names += names.empty() ? level.name : std::string(", ") + level.name;
  }
  fail("SPEC_ROLLOUT_ISA: expected a level that this processor has (", names, "), got ", forced);
}

// A level that is not there raises at every call: a static that throws is not initialised.
const Level& level() {
  static const Level chosen = choose();
  return chosen;
}

}  // namespace

const char* isa_in_use() { return level().name; }

std::vector<std::string> isa_available() {
  std::vector<std::string> names;
  for (const Level& level : available_levels()) names.emplace_back(level.name);
  return names;
}

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
