// Launch shapes and dtype dispatch of the kernels over logits.
#pragma once

#include "launch.cuh"
#include "logits_row.cuh"

namespace spec_rollout::cuda {

constexpr int kLogitsThreads = 32 * kMaxWarps;  // most threads of a block
// Blocks that a processor must have room for: 64 registers per thread are enough to draw without
// spilling, and some blocks read while others reduce or wait for what to read next.
template <int kThreads>
constexpr int kDrawBlocks = kThreads == kLogitsThreads ? 1 : 4;

// A block per row.
inline unsigned row_blocks(int64_t rows) {
  if (rows > 0x7fffffff) fail("logits: expected less than 2^31 rows, got ", rows);
  return static_cast<unsigned>(rows);
}

// Threads for `rows` blocks that each read a row. A small vocabulary does not fill a large block.
// Two blocks of half the size share a processor better (one reads while the other reduces), where
// there are that many rows.
inline int logits_threads(int64_t vocab, int64_t rows, int processors) {
  if (vocab <= 8192) return 128;
  return rows >= 2 * static_cast<int64_t>(processors) ? kLogitsThreads / 2 : kLogitsThreads;
}

template <class Launch>
void dispatch_dtype(DType dtype, Launch launch) {
  switch (dtype) {
    case DType::kBFloat16:
      return launch(BFloat16Logit{});
    case DType::kFloat16:
      return launch(Float16Logit{});
    case DType::kFloat32:
      return launch(Float32Logit{});
    default:
      fail("logits: expected float32, float16 or bfloat16, got another dtype");
  }
}

}  // namespace spec_rollout::cuda
