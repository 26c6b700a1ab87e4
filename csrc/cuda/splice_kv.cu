// One launch for all caches and ranges. A memory-bound copy: each thread keeps several of the
// widest accesses that the layout allows in flight, loads before stores. Between caches, every
// block copies the same number of tokens, whatever the lengths of the ranges; in place, a block has
// a range.
#include "launch.cuh"
#include "reduce.cuh"
#include "spec_rollout/ops.h"

namespace spec_rollout::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // 4 x 16 bytes in flight per thread: 16 KB per block
// Blocks that a processor must have room for: 64 registers a thread, and where that would
// spill, 80.
template <class Vec>
constexpr int kBlocks = sizeof(Vec) == 16 ? 4 : 3;
constexpr int64_t kBlocksPerProcessor = 8;
constexpr int64_t kMinTokensPerBlock = 16;
// Addresses are 64-bit; positions within a row and accesses within a chunk fit 32 bits, because a
// 64-bit division per access costs as much as the copy. 32-bit ones are by numbers that the
// launcher knows.
constexpr int64_t kMaxPositions = int64_t{1} << 31;
constexpr uint32_t kMaxChunk = 1u << 30;

// Division by multiplication (Granlund and Montgomery, PLDI 1994), for dividends below 2^31.
struct Divisor {
  uint32_t value, multiplier, shift;

  explicit Divisor(uint32_t d) : value(d), shift(0) {
    while ((uint64_t{1} << shift) < d) ++shift;
    multiplier = static_cast<uint32_t>((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d) / d + 1);
  }
  __device__ __forceinline__ uint32_t divide(uint32_t n) const {
    return (__umulhi(n, multiplier) + n) >> shift;
  }
};

// One side of the copy, as csrc/cpu/splice_kv.cpp has it.
struct Side {
  const CacheView* caches;
  IntVec rows, starts, table;
  int64_t table_rows, table_cols, outer, tokens;
  Divisor block_size;
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
  const uint32_t block_index = side.block_size.divide(position);
  const int64_t block = side.table[cursor.row * side.table_cols + block_index];
  if (block < 0 || block >= side.outer) return nullptr;
  return cursor.cache.data + block * cursor.cache.outer_stride +
         (position - block_index * side.block_size.value) * cursor.cache.token_stride;
}

struct Params {
  Side src, dst;
  IntVec lens;
  int64_t num_ranges, num_heads;
  Divisor vecs_per_head, vecs_per_token;
  uint32_t chunk_tokens;  // whose accesses fit 32 bits
  int32_t* status;
};

// Where byte `offset` of a head of a range's token is, on both sides; false, and reported, if its
// block id is out of range.
__device__ __forceinline__ bool find_access(const Params& params, const Cursor& src,
                                            const Cursor& dst, uint32_t token, uint32_t head,
                                            uint32_t offset, const char*& from, char*& to) {
  from = token_address(params.src, src, token);
  to = token_address(params.dst, dst, token);
  if (from == nullptr || to == nullptr) {
    raise_status(params.status, kStatusBadCacheSlot);
    return false;
  }
  from += head * src.cache.head_stride + offset;
  to += head * dst.cache.head_stride + offset;
  return true;
}

// Copies the accesses [0, total) of a piece of a range. find(linear, from, to) gives the addresses;
// false leaves one out.
template <class Vec, bool kInPlace, class Find>
__device__ __forceinline__ void copy_piece(uint32_t total, Find find) {
  for (uint32_t base = 0; base < total; base += kThreads * kUnroll) {
    Vec values[kUnroll];
    char* targets[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      targets[u] = nullptr;
      const uint32_t linear = base + u * kThreads + threadIdx.x;
      const char* from;
      char* to;
      if (linear >= total || !find(linear, from, to)) continue;
      values[u] = *reinterpret_cast<const Vec*>(from);
      targets[u] = to;
    }
    if (kInPlace) __syncthreads();
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (targets[u] != nullptr) *reinterpret_cast<Vec*>(targets[u]) = values[u];
    }
  }
}

// Tokens [begin, begin + num_tokens) of a range.
template <class Vec, bool kPaged>
__device__ __forceinline__ void copy_tokens(const Params& params, const Cursor& src,
                                            const Cursor& dst, uint32_t begin,
                                            uint32_t num_tokens) {
  if constexpr (kPaged) {
    // Token by token, as a block of a paged cache has them.
    copy_piece<Vec, false>(
        num_tokens * params.vecs_per_token.value,
        [&](uint32_t linear, const char*& from, char*& to) {
          const uint32_t token = params.vecs_per_token.divide(linear);
          const uint32_t rest = linear - token * params.vecs_per_token.value;
          const uint32_t head = params.vecs_per_head.divide(rest);
          const uint32_t offset = (rest - head * params.vecs_per_head.value) * sizeof(Vec);
          return find_access(params, src, dst, begin + token, head, offset, from, to);
        });
  } else {
    // Head by head: one head's tokens are neighbours.
    const char* from_head = token_address(params.src, src, begin);
    char* to_head = token_address(params.dst, dst, begin);
    for (int64_t head = 0; head < params.num_heads; ++head) {
      copy_piece<Vec, false>(num_tokens * params.vecs_per_head.value,
                             [&](uint32_t linear, const char*& from, char*& to) {
                               const uint32_t token = params.vecs_per_head.divide(linear);
                               const uint32_t offset =
                                   (linear - token * params.vecs_per_head.value) * sizeof(Vec);
                               from = from_head + token * src.cache.token_stride + offset;
                               to = to_head + token * dst.cache.token_stride + offset;
                               return true;
                             });
      from_head += src.cache.head_stride;
      to_head += dst.cache.head_stride;
    }
  }
}

// Tokens of a range that are to be copied: none where it is not within the caches, which is
// reported.
__device__ int64_t checked_len(const Params& params, int64_t cache, int64_t range, bool report) {
  const int64_t len = params.lens[range];
  if (len == 0) return 0;
  Cursor src, dst;
  const bool ok = len > 0 && begin_range(params.src, cache, range, len, src) &&
                  begin_range(params.dst, cache, range, len, dst);
  if (!ok && report) raise_status(params.status, kStatusBadCacheSlot);
  return ok ? len : 0;
}

// Block (x, y): the x-th part of all tokens of cache y, counted through all ranges.
template <class Vec, bool kPaged>
__global__ void __launch_bounds__(kThreads, kBlocks<Vec>) splice_kv_kernel(const Params params) {
  __shared__ int64_t warp_sums[kThreads / 32];
  __shared__ int64_t first_range, first_offset;
  const int64_t cache = blockIdx.y;
  const int thread = static_cast<int>(threadIdx.x), lane = thread & 31, warp = thread >> 5;

  // Where this block's part begins: tokens before each thread's share of the ranges.
  const int64_t range_begin = thread * params.num_ranges / kThreads;
  const int64_t range_end = (thread + 1) * params.num_ranges / kThreads;
  int64_t sum = 0;
  for (int64_t r = range_begin; r < range_end; ++r) {
    sum += checked_len(params, cache, r, blockIdx.x == 0);
  }
  int64_t before = sum;
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const int64_t other = __shfl_up_sync(kFullMask, before, delta);
    if (lane >= delta) before += other;
  }
  if (lane == 31) warp_sums[warp] = before;
  __syncthreads();
  before -= sum;
  int64_t total = 0;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w < warp) before += warp_sums[w];
    total += warp_sums[w];
  }
  const int64_t begin = total * blockIdx.x / gridDim.x, end = total * (blockIdx.x + 1) / gridDim.x;
  if (begin >= end) return;
  if (before <= begin && begin < before + sum) {
    int64_t offset = begin - before, r = range_begin;
    for (int64_t len; offset >= (len = checked_len(params, cache, r, false)); ++r) offset -= len;
    first_range = r;
    first_offset = offset;
  }
  __syncthreads();

  int64_t left = end - begin, offset = first_offset;
  for (int64_t r = first_range; left > 0; ++r, offset = 0) {
    int64_t count = checked_len(params, cache, r, false) - offset;
    if (count <= 0) continue;
    count = count < left ? count : left;
    left -= count;
    Cursor src, dst;
    begin_range(params.src, cache, r, 0, src);
    begin_range(params.dst, cache, r, 0, dst);
    while (count > 0) {
      const auto piece =
          count < params.chunk_tokens ? static_cast<uint32_t>(count) : params.chunk_tokens;
      copy_tokens<Vec, kPaged>(params, src, dst, static_cast<uint32_t>(offset), piece);
      offset += piece;
      count -= piece;
    }
  }
}

// In place. A block owns one head of a range and walks it in the direction of a memmove: it holds a
// tile in registers, waits until all threads have read theirs, and writes. Writes of a tile cannot
// reach the tiles still to be read, so one barrier per tile is enough.
template <class Vec>
__global__ void __launch_bounds__(kThreads, 3)
    splice_kv_in_place_kernel(const Params params, const int64_t num_items) {
  for (int64_t item = blockIdx.x; item < num_items; item += gridDim.x) {
    const int64_t head = item % params.num_heads;
    const int64_t range = item / params.num_heads % params.num_ranges;
    const int64_t cache = item / params.num_heads / params.num_ranges;
    const int64_t len = checked_len(params, cache, range, threadIdx.x == 0);
    if (len == 0) continue;
    Cursor src, dst;
    begin_range(params.src, cache, range, len, src);
    begin_range(params.dst, cache, range, len, dst);
    const bool reverse = dst.start > src.start;
    for (int64_t done = 0; done < len; done += params.chunk_tokens) {
      const int64_t left = len - done;
      const auto num_tokens =
          left < params.chunk_tokens ? static_cast<uint32_t>(left) : params.chunk_tokens;
      const auto begin = static_cast<uint32_t>(reverse ? left - num_tokens : done);
      const uint32_t total = num_tokens * params.vecs_per_head.value;
      copy_piece<Vec, true>(total, [&](uint32_t linear, const char*& from, char*& to) {
        if (reverse) linear = total - 1 - linear;
        const uint32_t token = params.vecs_per_head.divide(linear);
        const uint32_t offset = (linear - token * params.vecs_per_head.value) * sizeof(Vec);
        return find_access(params, src, dst, begin + token, head, offset, from, to);
      });
    }
  }
}

void check_positions(const char* name, const IntVec& table, int64_t table_cols, int64_t tokens) {
  const int64_t positions = table ? table_cols * tokens : tokens;
  if (positions > kMaxPositions) {
    fail(name, ": expected at most ", kMaxPositions, " positions per row, got ", positions);
  }
}

uint32_t as_divisor(int64_t value) { return static_cast<uint32_t>(std::max<int64_t>(value, 1)); }

template <class Vec>
void launch(const SpliceKvArgs& args, Stream stream) {
  const int64_t vecs_per_head = args.head_bytes / static_cast<int64_t>(sizeof(Vec));
  const int64_t vecs_per_token = vecs_per_head * (args.in_place ? 1 : args.num_heads);
  const Params params{
      {args.src, args.src_rows, args.src_starts, args.src_block_table, args.src_table_rows,
       args.src_table_cols, args.src_outer, args.src_tokens, Divisor(as_divisor(args.src_tokens))},
      {args.dst, args.dst_rows, args.dst_starts, args.dst_block_table, args.dst_table_rows,
       args.dst_table_cols, args.dst_outer, args.dst_tokens, Divisor(as_divisor(args.dst_tokens))},
      args.lens,
      args.num_ranges,
      args.num_heads,
      Divisor(as_divisor(vecs_per_head)),
      Divisor(as_divisor(vecs_per_token)),
      kMaxChunk / as_divisor(vecs_per_token),
      args.status};
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (args.in_place) {
    const int64_t items = args.num_caches * args.num_ranges * args.num_heads;
    splice_kv_in_place_kernel<Vec><<<grid_size(items), kThreads, 0, cuda_stream>>>(params, items);
    return;
  }
  // Lengths are not known here: no more blocks than ranges of the largest length would keep busy.
  const int64_t wanted =
      (kBlocksPerProcessor * num_processors() + args.num_caches - 1) / args.num_caches;
  const int64_t most =
      args.num_ranges * ((args.max_range_len + kMinTokensPerBlock - 1) / kMinTokensPerBlock);
  const dim3 grid(static_cast<unsigned>(std::clamp<int64_t>(wanted, 1, std::max<int64_t>(most, 1))),
                  static_cast<unsigned>(args.num_caches));
  if (args.src_block_table || args.dst_block_table) {
    splice_kv_kernel<Vec, true><<<grid, kThreads, 0, cuda_stream>>>(params);
  } else {
    splice_kv_kernel<Vec, false><<<grid, kThreads, 0, cuda_stream>>>(params);
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
  if (args.num_caches > 65535) fail("src: expected at most 65535 caches, got ", args.num_caches);
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
