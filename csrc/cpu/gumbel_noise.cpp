#include <algorithm>

#include "kernels.h"
#include "parallel.h"

namespace spec_rollout::cpu::SPEC_ROLLOUT_ISA {

void gumbel_noise(const int64_t* keys, IntVec positions, int64_t batch, int64_t vocab, float* out,
                  int num_threads) {
  parallel_for(batch, 1, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const NoiseKey key(keys[r]);
      const int64_t position = positions[r];
      float* row = out + r * vocab;
      for (int64_t v = 0; v < vocab; v += 4 * kNoiseGroup) {
        const Philox4 groups =
            group_bits4(key, position, static_cast<uint32_t>(v / (4 * kNoiseGroup)));
        const int64_t end = std::min<int64_t>(v + 4 * kNoiseGroup, vocab);
        for (int64_t quad = v; quad < end; quad += 4) {
          const Philox4 bits = gumbel_bits4(key, position, static_cast<uint32_t>(quad >> 2));
          for (int64_t t = quad; t < std::min(quad + 4, end); ++t) {
            row[t] = gumbel_from_bits(groups.x[(t - v) / kNoiseGroup], bits.x[t - quad],
                                      static_cast<int>(t % kNoiseGroup));
          }
        }
      }
    }
  });
}

}  // namespace spec_rollout::cpu::SPEC_ROLLOUT_ISA
