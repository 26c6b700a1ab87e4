#include <algorithm>
#include <cmath>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace spec_rollout::cpu::SPEC_ROLLOUT_ISA {
namespace {

// Floats that one thread should have to work on, at least.
constexpr int64_t kGrainFloats = 16 << 10;

int64_t rows_per_piece(int64_t floats_per_row) {
  return 1 + kGrainFloats / std::max<int64_t>(1, floats_per_row);
}

// x / (1 + e^-x), without overflow on either side; NaN stays NaN.
VecF silu(VecF x) {
  const VecF e = vec_exp(x > 0.0f ? -x : x);
  return x * (x > 0.0f ? splat(1.0f) : e) / (e + 1.0f);
}

}  // namespace

void rms_norm(const RmsNormArgs& args, int num_threads) {
  const int64_t dim = args.dim, whole = dim / kVecLanes * kVecLanes;
  parallel_for(args.num_rows, rows_per_piece(dim), num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float* x = args.x + r * args.row_stride;
      float* out = args.out + r * dim;
      VecF sums = {};
      for (int64_t d = 0; d < whole; d += kVecLanes) {
        const VecF v = load(x + d);
        sums = vec_fma(v, v, sums);
      }
      float sum = 0.0f;
      for (int lane = 0; lane < kVecLanes; ++lane) sum += sums[lane];
      for (int64_t d = whole; d < dim; ++d) sum += x[d] * x[d];
      const float factor = 1.0f / std::sqrt(sum / static_cast<float>(dim) + args.eps);
      for (int64_t d = 0; d < dim; ++d) out[d] = args.weight[d] * (x[d] * factor);
    }
  });
}

void silu_mul(const SiluMulArgs& args, int num_threads) {
  const int64_t pieces = (args.size + kGrainFloats - 1) / kGrainFloats;
  parallel_for(pieces, 1, num_threads, [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(args.size, end * kGrainFloats);
    int64_t i = begin * kGrainFloats;
    for (; i + kVecLanes <= last; i += kVecLanes) {
      const VecF product = silu(load(args.gate + i)) * load(args.up + i);
      std::memcpy(args.out + i, &product, sizeof product);
    }
    if (i < last) {
      VecF gate = {}, up = {};
      std::memcpy(&gate, args.gate + i, (last - i) * sizeof(float));
      std::memcpy(&up, args.up + i, (last - i) * sizeof(float));
      const VecF product = silu(gate) * up;
      std::memcpy(args.out + i, &product, (last - i) * sizeof(float));
    }
  });
}

void rotate_halves(const RotateHalvesArgs& args, int num_threads) {
  const int64_t dim = args.head_dim, half = dim / 2;
  const int64_t items = args.num_rows * args.num_tokens;
  const int64_t grain = rows_per_piece(args.num_heads * dim);
  parallel_for(items, grain, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / args.num_tokens, token = item % args.num_tokens;
      const float* cos = args.cos + item * dim;
      const float* sin = args.sin + item * dim;
      for (int64_t h = 0; h < args.num_heads; ++h) {
        const float* x =
            args.x + row * args.strides[0] + h * args.strides[1] + token * args.strides[2];
        float* out = args.out + (item * args.num_heads + h) * dim;
        for (int64_t d = 0; d < half; ++d) out[d] = x[d] * cos[d] + -x[d + half] * sin[d];
        for (int64_t d = half; d < dim; ++d) out[d] = x[d] * cos[d] + x[d - half] * sin[d];
      }
    }
  });
}

}  // namespace spec_rollout::cpu::SPEC_ROLLOUT_ISA
