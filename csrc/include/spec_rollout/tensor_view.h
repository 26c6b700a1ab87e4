// A tensor as the kernels see it: where it is, what it holds, how it is laid out. No ownership, no
// framework.
#pragma once

#include <cstdint>

#include "spec_rollout/platform.h"

namespace spec_rollout {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16, kInt32, kInt64, kBool, kUInt8, kOther };

constexpr int kMaxDims = 5;

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kOther;
  int32_t item_size = 0;  // bytes
  int32_t ndim = 0;
  int64_t shape[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};  // in elements
  int32_t device = -1;             // -1: CPU; otherwise the CUDA device index

  int64_t numel() const {
    int64_t n = 1;
    for (int32_t d = 0; d < ndim; ++d) n *= shape[d];
    return n;
  }
};

// A contiguous vector of int32 or int64. Null when the argument was not given.
struct IntVec {
  const void* data = nullptr;
  bool is_int64 = false;

  SR_HD explicit operator bool() const { return data != nullptr; }
  SR_HD int64_t operator[](int64_t i) const {
    return is_int64 ? static_cast<const int64_t*>(data)[i]
                    : static_cast<int64_t>(static_cast<const int32_t*>(data)[i]);
  }
};

// A matrix of logits: rows of `vocab` contiguous elements, `row_stride` elements apart.
struct LogitsView {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t num_rows = 0;
  int64_t vocab = 0;
  int64_t row_stride = 0;
};

}  // namespace spec_rollout
