// One launch for all caches and ranges. A memory-bound copy: each thread keeps several of the
// widest accesses that the layout allows in flight, loads before stores.
#include "launch.cuh"
#include "spec_rollout/ops.h"

namespace spec_rollout::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // 4 x 16 bytes in flight per thread: 16 KB per block
constexpr int64_t kEnoughBlocks =
    8192;  // several waves on the largest GPU, so that uneven ranges balance
constexpr int64_t kMinTokensPerBlock = 16;
// Addresses are 64-bit; positions within a row and accesses within a chunk fit 32 bits, because a
// 64-bit division per access costs as much as the copy.
constexpr int64_t kMaxPositions = int64_t{1} << 31;
constexpr uint32_t kMaxChunk = 1u << 30;

// One side of the copy, as csrc/cpu/splice_kv.cpp has it.
struct Side {
  const CacheView* caches;
  IntVec rows, starts, table;
  int64_t table_rows, table_cols, outer, tokens;
};

// Start of a range of one side in one cache.
struct Cursor {
  CacheView cache;
  int64_t row;
  uint32_t start;  // the launcher bounds the positions of a row: see kMaxPositions
};

__device__ bool begin_range(const Side& side, int64_t cache, int64_t range, int64_t len,
                            Cursor& cursor) {
  cursor.row = side.rows[range];
  const int64_t start = side.starts[range];
  cursor.start = static_cast<uint32_t>(start);
  cursor.cache = side.caches[cache];
  const int64_t num_rows = side.table ? side.table_rows : side.outer;
  const int64_t positions = side.table ? side.table_cols * side.tokens : side.tokens;
  return cursor.row >= 0 && cursor.row < num_rows && start >= 0 && start <= positions &&
         len <= positions - start;
}

// Address of the token `i` places into the range; null if its block id is out of range.
__device__ __forceinline__ char* token_address(const Side& side, const Cursor& cursor, uint32_t i) {
  const uint32_t position = cursor.start + i;
  if (!side.table) {
    return cursor.cache.data + cursor.row * cursor.cache.outer_stride +
           position * cursor.cache.token_stride;
  }
  const uint32_t block_size = static_cast<uint32_t>(side.tokens);
  const uint32_t block_index = position / block_size;
  const int64_t block = side.table[cursor.row * side.table_cols + block_index];
  if (block < 0 || block >= side.outer) return nullptr;
  return cursor.cache.data + block * cursor.cache.outer_stride +
         (position - block_index * block_size) * cursor.cache.token_stride;
}

// What a block works on: tokens [begin, end) of a range in one cache, and, in place, one head of
// it.
struct Params {
  Side src, dst;
  IntVec lens;
  int64_t num_ranges, num_items, splits;
  uint32_t vecs_per_head, vecs_per_token;  // of the heads that a block copies
  uint32_t chunk_tokens;
  int32_t* status;
};

// In place, a block owns all of its range (for one head) and walks it in the direction of a
// memmove: it holds a tile in registers, waits until all threads have read theirs, and writes.
// Writes of a tile cannot reach the tiles still to be read, so one barrier per tile is enough.
template <class Vec, bool kInPlace>
__global__ void __launch_bounds__(kThreads) splice_kv_kernel(const Params params) {
  for (int64_t item = blockIdx.x; item < params.num_items; item += gridDim.x) {
    const int64_t part = item % params.splits;
    const int64_t range = item / params.splits % params.num_ranges;
    const int64_t cache = item / params.splits / params.num_ranges;
    const int64_t len = params.lens[range];
    if (len == 0) continue;
    Cursor src, dst;
    const bool ok = len > 0 && begin_range(params.src, cache, range, len, src) &&
                    begin_range(params.dst, cache, range, len, dst);
    if (!ok) {
      if (threadIdx.x == 0) raise_status(params.status, kStatusBadCacheSlot);
      continue;
    }
    // Splits are heads (in place) or runs of tokens.
    const int64_t first_head = kInPlace ? part : 0;
    const int64_t per_part = kInPlace ? len : (len + params.splits - 1) / params.splits;
    const int64_t part_begin = kInPlace ? 0 : part * per_part;
    const int64_t part_end = part_begin + per_part < len ? part_begin + per_part : len;
    const bool reverse = kInPlace && dst.start > src.start;
    for (int64_t done = 0; done < part_end - part_begin; done += params.chunk_tokens) {
      const int64_t left = part_end - part_begin - done;
      const uint32_t num_tokens =
          left < params.chunk_tokens ? static_cast<uint32_t>(left) : params.chunk_tokens;
      const uint32_t begin =
          static_cast<uint32_t>(reverse ? part_end - done - num_tokens : part_begin + done);
      const uint32_t total = num_tokens * params.vecs_per_token;
      for (uint32_t base = 0; base < total; base += kThreads * kUnroll) {
        Vec values[kUnroll];
        char* targets[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          targets[u] = nullptr;
          uint32_t linear = base + u * kThreads + threadIdx.x;
          if (linear >= total) continue;
          if (reverse) linear = total - 1 - linear;
          const uint32_t token = linear / params.vecs_per_token;
          const uint32_t rest = linear - token * params.vecs_per_token;
          const uint32_t head = rest / params.vecs_per_head;
          const uint32_t offset = (rest - head * params.vecs_per_head) * sizeof(Vec);
          const char* from = token_address(params.src, src, begin + token);
          char* to = token_address(params.dst, dst, begin + token);
          if (from == nullptr || to == nullptr) {
            raise_status(params.status, kStatusBadCacheSlot);
            continue;
          }
          from += (first_head + head) * src.cache.head_stride + offset;
          values[u] = *reinterpret_cast<const Vec*>(from);
          targets[u] = to + (first_head + head) * dst.cache.head_stride + offset;
        }
        if (kInPlace) __syncthreads();
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          if (targets[u] != nullptr) *reinterpret_cast<Vec*>(targets[u]) = values[u];
        }
      }
    }
  }
}

void check_positions(const char* name, const IntVec& table, int64_t table_cols, int64_t tokens) {
  const int64_t positions = table ? table_cols * tokens : tokens;
  if (positions > kMaxPositions) {
    fail(name, ": expected at most ", kMaxPositions, " positions per row, got ", positions);
  }
}

template <class Vec>
void launch(const SpliceKvArgs& args, Stream stream) {
  Params params;
  params.src = {args.src,
                args.src_rows,
                args.src_starts,
                args.src_block_table,
                args.src_table_rows,
                args.src_table_cols,
                args.src_outer,
                args.src_tokens};
  params.dst = {args.dst,
                args.dst_rows,
                args.dst_starts,
                args.dst_block_table,
                args.dst_table_rows,
                args.dst_table_cols,
                args.dst_outer,
                args.dst_tokens};
  params.lens = args.lens;
  params.num_ranges = args.num_ranges;
  params.vecs_per_head = static_cast<uint32_t>(args.head_bytes / static_cast<int64_t>(sizeof(Vec)));
  params.vecs_per_token =
      params.vecs_per_head * static_cast<uint32_t>(args.in_place ? 1 : args.num_heads);
  params.chunk_tokens = kMaxChunk / params.vecs_per_token;
  params.status = args.status;
  const int64_t pairs = args.num_caches * args.num_ranges;
  if (args.in_place) {
    params.splits = args.num_heads;
  } else {
    const int64_t wanted = (kEnoughBlocks + pairs - 1) / pairs;
    const int64_t most = (args.max_range_len + kMinTokensPerBlock - 1) / kMinTokensPerBlock;
    params.splits = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(most, 1));
  }
  params.num_items = pairs * params.splits;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (args.in_place) {
    splice_kv_kernel<Vec, true><<<grid_size(params.num_items), kThreads, 0, cuda_stream>>>(params);
  } else {
    splice_kv_kernel<Vec, false><<<grid_size(params.num_items), kThreads, 0, cuda_stream>>>(params);
  }
}

}  // namespace

void splice_kv(const SpliceKvArgs& args, Stream stream) {
  if (args.num_caches == 0 || args.num_ranges == 0 || args.num_heads == 0 || args.head_bytes == 0) {
    return;
  }
  if (args.in_place &&
      static_cast<bool>(args.src_block_table) != static_cast<bool>(args.dst_block_table)) {
    fail(
        "src, dst: expected one layout when a cache is copied onto itself, got a paged and a "
        "contiguous one");
  }
  if (args.num_heads * args.head_bytes > static_cast<int64_t>(kMaxChunk)) {
    fail("src: expected at most ", kMaxChunk, " bytes per token, got ",
         args.num_heads * args.head_bytes);
  }
  check_positions("src", args.src_block_table, args.src_table_cols, args.src_tokens);
  check_positions("dst", args.dst_block_table, args.dst_table_cols, args.dst_tokens);
  switch (args.access_bytes) {
    case 16:
      launch<uint4>(args, stream);
      break;
    case 8:
      launch<uint2>(args, stream);
      break;
    case 4:
      launch<uint32_t>(args, stream);
      break;
    case 2:
      launch<uint16_t>(args, stream);
      break;
    default:
      launch<uint8_t>(args, stream);
      break;
  }
  check_launch("splice_kv");
}

}  // namespace spec_rollout::cuda
