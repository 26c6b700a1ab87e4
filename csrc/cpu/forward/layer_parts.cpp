#include <algorithm>
#include <cmath>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/sixteen_bits.h"

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

template <class T>
void norm_rows(const RmsNormArgs& args, int num_threads) {
  const int64_t dim = args.dim, whole = dim / kVecLanes * kVecLanes;
  const T* weight = static_cast<const T*>(args.weight);
  parallel_for(args.num_rows, rows_per_piece(dim), num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* x = static_cast<const T*>(args.x) + r * args.row_stride;
      T* out = static_cast<T*>(args.out) + r * dim;
      VecF sums = {};
      for (int64_t d = 0; d < whole; d += kVecLanes) {
        const VecF v = load(x + d);
        sums = vec_fma(v, v, sums);
      }
      float sum = 0.0f;
      for (int lane = 0; lane < kVecLanes; ++lane) sum += sums[lane];
      for (int64_t d = whole; d < dim; ++d) sum += to_float(x[d]) * to_float(x[d]);
      const float factor = 1.0f / std::sqrt(sum / static_cast<float>(dim) + args.eps);
      for (int64_t d = 0; d < dim; ++d) {
        out[d] = narrow<T>(to_float(weight[d]) * rounded<T>(to_float(x[d]) * factor));
      }
    }
  });
}

template <class T>
void gated_silu(const SiluMulArgs& args, int num_threads) {
  const T* gate = static_cast<const T*>(args.gate);
  const T* up = static_cast<const T*>(args.up);
  T* out = static_cast<T*>(args.out);
  const int64_t pieces = (args.size + kGrainFloats - 1) / kGrainFloats;
  parallel_for(pieces, 1, num_threads, [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(args.size, end * kGrainFloats);
    int64_t i = begin * kGrainFloats;
    for (; i + kVecLanes <= last; i += kVecLanes) {
      store(out + i, rounded<T>(silu(load(gate + i))) * load(up + i));
    }
    if (i < last) {
      const VecF some = rounded<T>(silu(load_some(gate + i, last - i)));
      T products[kVecLanes];
      store(products, some * load_some(up + i, last - i));
      std::copy_n(products, last - i, out + i);
    }
  });
}

template <class T>
void rotate(const RotateHalvesArgs& args, int num_threads) {
  const int64_t dim = args.head_dim, half = dim / 2;
  const int64_t items = args.num_rows * args.num_tokens;
  const int64_t grain = rows_per_piece(args.num_heads * dim);
  parallel_for(items, grain, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / args.num_tokens, token = item % args.num_tokens;
      const T* cos = static_cast<const T*>(args.cos) + item * dim;
      const T* sin = static_cast<const T*>(args.sin) + item * dim;
      for (int64_t h = 0; h < args.num_heads; ++h) {
        const T* x = static_cast<const T*>(args.x) + row * args.strides[0] + h * args.strides[1] +
                     token * args.strides[2];
        T* out = static_cast<T*>(args.out) + (item * args.num_heads + h) * dim;
        const auto rotated = [&](int64_t d, float other) {
          return narrow<T>(rounded<T>(to_float(x[d]) * to_float(cos[d])) +
                           rounded<T>(other * to_float(sin[d])));
        };
        for (int64_t d = 0; d < half; ++d) out[d] = rotated(d, -to_float(x[d + half]));
        for (int64_t d = half; d < dim; ++d) out[d] = rotated(d, to_float(x[d - half]));
      }
    }
  });
}

}  // namespace

void rms_norm(const RmsNormArgs& args, int num_threads) {
  (args.dtype == DType::kBFloat16 ? norm_rows<BFloat16> : norm_rows<float>)(args, num_threads);
}
void silu_mul(const SiluMulArgs& args, int num_threads) {
  (args.dtype == DType::kBFloat16 ? gated_silu<BFloat16> : gated_silu<float>)(args, num_threads);
}
void rotate_halves(const RotateHalvesArgs& args, int num_threads) {
  (args.dtype == DType::kBFloat16 ? rotate<BFloat16> : rotate<float>)(args, num_threads);
}

}  // namespace spec_rollout::cpu::SPEC_ROLLOUT_ISA
