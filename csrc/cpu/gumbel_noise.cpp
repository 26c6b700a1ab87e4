#include "kernels.h"
#include "parallel.h"

namespace spec_rollout::cpu::SPEC_ROLLOUT_ISA {

void gumbel_noise(const int64_t* keys, IntVec positions, int64_t batch, int64_t vocab, float* out,
                  int num_threads) {
  parallel_for(batch, 1, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const NoiseKey key(keys[r]);
      for (int64_t v = 0; v < vocab; v += 4) {
        const Philox4 bits = gumbel_bits4(key, positions[r], static_cast<uint32_t>(v >> 2));
        for (int64_t i = 0; i < 4 && v + i < vocab; ++i) {
          out[r * vocab + v + i] = gumbel_from_bits(bits.x[i]);
        }
      }
    }
  });
}

}  // namespace spec_rollout::cpu::SPEC_ROLLOUT_ISA
