// What the embedded engine's forward pass needs beside the operations: attention over its own KV
// cache and the parts of a decoder layer between matrix products. CPU only; nobody else calls it.
#pragma once

#include "spec_rollout/ops.h"

namespace spec_rollout {

// Where each row of new tokens lies in a contiguous cache: its first and last position, how many
// positions a token attends to (0: all), and the cache's row. Rows of a batch may share a cache
// row.
struct Span {
  int64_t first, last, window, cache_row;
};

// New tokens' keys or values into a contiguous cache, each row at its own position.
struct WriteKvArgs {
  CacheView src;                // [num_rows, num_heads, num_tokens, head_dim]
  CacheView dst;                // [dst_rows, num_heads, dst_tokens, head_dim]
  const Span* spans = nullptr;  // [num_rows]
  int64_t num_rows = 0, num_heads = 0, num_tokens = 0, dst_rows = 0, dst_tokens = 0;
  int64_t head_bytes = 0;
};

// Softmax attention of new tokens over a contiguous KV cache, each row at its own length: a token
// at position p attends to positions max(0, p - window + 1)..p of its cache row.
struct CausalAttentionArgs {
  const float* query = nullptr;   // [num_rows, num_heads, num_tokens, head_dim]
  const void* key = nullptr;      // [num_cache_rows, num_kv_heads, width, head_dim]
  const void* value = nullptr;    // the same shape
  DType dtype = DType::kFloat32;  // of keys and values; all arithmetic is in float32
  int64_t query_strides[3] = {};  // in elements, of row, head and token; head_dim is contiguous
  int64_t key_strides[3] = {};    // of row, head and position
  int64_t value_strides[3] = {};
  const Span* spans = nullptr;  // [num_rows]
  float* out = nullptr;         // [num_rows, num_tokens, num_heads, head_dim]; padding is 0
  int64_t num_rows = 0, num_heads = 0, num_kv_heads = 0, num_tokens = 0;
  int64_t num_cache_rows = 0, width = 0, head_dim = 0;
  float scale = 1.0f;  // of the scores
};

// The parts of a decoder layer between its matrix products. Inputs and outputs are of one dtype,
// float32 or bfloat16; arithmetic is in float32, rounded to the dtype where transformers' modules
// round.
//
// out = weight * x / sqrt(mean(x^2) + eps), row by row.
struct RmsNormArgs {
  const void* x = nullptr;       // [num_rows, dim], rows row_stride elements apart
  const void* weight = nullptr;  // [dim]
  void* out = nullptr;           // [num_rows, dim]
  DType dtype = DType::kFloat32;
  int64_t num_rows = 0, dim = 0, row_stride = 0;
  float eps = 0.0f;
};

// out = gate / (1 + e^-gate) * up.
struct SiluMulArgs {
  const void* gate = nullptr;  // [size]
  const void* up = nullptr;    // [size]
  void* out = nullptr;         // [size]
  DType dtype = DType::kFloat32;
  int64_t size = 0;
};

// Rotary embedding: out = x * cos + (-second half of x, first half of x) * sin, head by head.
struct RotateHalvesArgs {
  const void* x = nullptr;    // [num_rows, num_heads, num_tokens, head_dim]
  int64_t strides[3] = {};    // in elements, of row, head and token; head_dim is contiguous
  const void* cos = nullptr;  // [num_rows, num_tokens, head_dim]
  const void* sin = nullptr;  // the same shape
  void* out = nullptr;        // [num_rows, num_tokens, num_heads, head_dim]
  DType dtype = DType::kFloat32;
  int64_t num_rows = 0, num_heads = 0, num_tokens = 0, head_dim = 0;
};

namespace cpu {
void write_kv(const WriteKvArgs& args, int num_threads);
void causal_attention(const CausalAttentionArgs& args, int num_threads);
void rms_norm(const RmsNormArgs& args, int num_threads);
void silu_mul(const SiluMulArgs& args, int num_threads);
void rotate_halves(const RotateHalvesArgs& args, int num_threads);
}  // namespace cpu

}  // namespace spec_rollout
