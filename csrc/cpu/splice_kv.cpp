// Moves ranges of tokens between KV caches. Plain copies: memmove is already as fast as the
// machine, so this file is not compiled per instruction-set level.
#include <algorithm>
#include <cstring>
#include <vector>

#include "offsets.h"
#include "parallel.h"
#include "spec_rollout/ops.h"

namespace spec_rollout::cpu {
namespace {

constexpr int64_t kPieceBytes =
    256 * 1024;  // work handed to a thread at once: tens of microseconds

struct Range {
  int64_t src_row, src_start, dst_row, dst_start, len, index;
};

// One side of the copy: where a row's positions lie.
struct Side {
  const char* rows_name;
  const char* starts_name;
  const char* table_name;
  IntVec table;  // null: contiguous
  int64_t table_rows, table_cols, outer, tokens;

  int64_t num_rows() const { return table ? table_rows : outer; }
  int64_t positions() const { return table ? table_cols * tokens : tokens; }
  int64_t outer_of(int64_t row, int64_t position) const {
    return table ? table[row * table_cols + position / tokens] : row;
  }
  int64_t inner_of(int64_t position) const { return table ? position % tokens : position; }
};

// Consecutive positions of one row (contiguous) or one block (paged). `base` is the position at
// which the row or block begins, seen from the range.
struct Segment {
  int64_t outer, begin, end, base, range;
};

bool before(const Segment& a, const Segment& b) {
  return a.outer != b.outer ? a.outer < b.outer : a.begin < b.begin;
}

void check_side(const Side& side, int64_t row, int64_t start, int64_t len, int64_t i) {
  if (row < 0 || row >= side.num_rows()) {
    fail(side.rows_name, ": expected 0 <= row < ", side.num_rows(), ", got ", row, " at index ", i);
  }
  if (start < 0 || start > side.positions() || len > side.positions() - start) {
    fail(side.starts_name, ", lens: expected 0 <= start and start + len <= ", side.positions(),
         ", got start ", start, " and len ", len, " at index ", i);
  }
  if (!side.table || len == 0) return;
  for (int64_t b = start / side.tokens; b <= (start + len - 1) / side.tokens; ++b) {
    const int64_t block = side.table[row * side.table_cols + b];
    if (block < 0 || block >= side.outer) {
      fail(side.table_name, ": expected 0 <= block id < ", side.outer, ", got ", block, " at [",
           row, ", ", b, "], needed by range ", i);
    }
  }
}

void append_segments(const Side& side, int64_t row, int64_t start, int64_t len, int64_t range,
                     std::vector<Segment>& out) {
  for (int64_t position = start; position < start + len;) {
    const int64_t inner = side.inner_of(position);
    const int64_t count = std::min(side.tokens - inner, start + len - position);
    out.push_back({side.outer_of(row, position), inner, inner + count, position - inner, range});
    position += count;
  }
}

// No token may be written twice and, in place, none may be written by one range and read by
// another: the result would depend on the order. A range may overlap itself as long as each token
// keeps to one position, because then copying in the right direction is a memmove.
void check_conflicts(const SpliceKvArgs& args, const Side& src, const Side& dst,
                     const std::vector<Range>& ranges) {
  std::vector<Segment> written;
  written.reserve(ranges.size());
  for (const Range& r : ranges) {
    append_segments(dst, r.dst_row, r.dst_start, r.len, r.index, written);
  }
  if (!std::is_sorted(written.begin(), written.end(), before)) {
    std::sort(written.begin(), written.end(), before);
  }
  for (size_t i = 1; i < written.size(); ++i) {
    const Segment &a = written[i - 1], &b = written[i];
    if (a.outer == b.outer && b.begin < a.end) {
      fail("dst_rows, dst_starts, lens: expected ranges that do not overlap, got ranges ",
           std::min(a.range, b.range), " and ", std::max(a.range, b.range), " both writing to ",
           dst.table ? "block " : "row ", a.outer);
    }
  }
  if (!args.in_place) return;
  std::vector<Segment> read;
  for (const Range& r : ranges) {
    read.clear();
    append_segments(src, r.src_row, r.src_start, r.len, r.index, read);
    for (const Segment& s : read) {
      // The written segments are disjoint, so their ends are sorted like their begins.
      auto w = std::partition_point(written.begin(), written.end(), [&](const Segment& other) {
        return other.outer != s.outer ? other.outer < s.outer : other.end <= s.begin;
      });
      for (; w != written.end() && w->outer == s.outer && w->begin < s.end; ++w) {
        if (w->range == s.range && w->base == s.base) continue;
        fail(
            "src_rows, src_starts, dst_rows, dst_starts: expected, in place, ranges that do not "
            "conflict, got range ",
            s.range, " reading what range ", w->range, " writes in ", src.table ? "block " : "row ",
            s.outer);
      }
    }
  }
}

// `count` items of `bytes` bytes at fixed strides; backward if `reverse`.
void copy_strided(char* dst, const char* src, int64_t count, int64_t dst_stride, int64_t src_stride,
                  int64_t bytes, bool reverse) {
  if (dst_stride == bytes && src_stride == bytes) {
    std::memmove(dst, src, static_cast<size_t>(count * bytes));
    return;
  }
  for (int64_t k = 0; k < count; ++k) {
    const int64_t i = reverse ? count - 1 - k : k;
    std::memmove(dst + i * dst_stride, src + i * src_stride, static_cast<size_t>(bytes));
  }
}

// Tokens of one range for one run of heads (`bytes` contiguous bytes per token) in one cache.
void copy_range(const SpliceKvArgs& args, const Side& src, const Side& dst, const Range& r,
                const CacheView& src_cache, const CacheView& dst_cache, int64_t head,
                int64_t bytes) {
  const bool reverse = args.in_place && r.dst_start > r.src_start;
  const char* src_data = src_cache.data + head * src_cache.head_stride;
  char* dst_data = dst_cache.data + head * dst_cache.head_stride;
  int64_t done = 0;
  while (done < r.len) {
    // The longest run that crosses no block border on either side, from the front or from the back.
    const int64_t left = r.len - done;
    int64_t src_position = r.src_start + done, dst_position = r.dst_start + done, count = left;
    if (reverse) {
      const int64_t src_last = src.inner_of(r.src_start + left - 1);
      const int64_t dst_last = dst.inner_of(r.dst_start + left - 1);
      count = std::min({left, src_last + 1, dst_last + 1});
      src_position = r.src_start + left - count;
      dst_position = r.dst_start + left - count;
    } else {
      count = std::min(
          {left, src.tokens - src.inner_of(src_position), dst.tokens - dst.inner_of(dst_position)});
    }
    const char* from = src_data + src.outer_of(r.src_row, src_position) * src_cache.outer_stride +
                       src.inner_of(src_position) * src_cache.token_stride;
    char* to = dst_data + dst.outer_of(r.dst_row, dst_position) * dst_cache.outer_stride +
               dst.inner_of(dst_position) * dst_cache.token_stride;
    if (from != to) {
      copy_strided(to, from, count, dst_cache.token_stride, src_cache.token_stride, bytes, reverse);
    }
    done += count;
  }
}

}  // namespace

void splice_kv(const SpliceKvArgs& args, int num_threads) {
  const Side src{"src_rows",          "src_starts",        "src_block_table", args.src_block_table,
                 args.src_table_rows, args.src_table_cols, args.src_outer,    args.src_tokens};
  const Side dst{"dst_rows",          "dst_starts",        "dst_block_table", args.dst_block_table,
                 args.dst_table_rows, args.dst_table_cols, args.dst_outer,    args.dst_tokens};
  if (args.in_place && static_cast<bool>(src.table) != static_cast<bool>(dst.table)) {
    fail("src, dst: expected one layout when a cache is copied onto itself, got src ",
         src.table ? "paged" : "contiguous", " and dst ", dst.table ? "paged" : "contiguous");
  }
  std::vector<Range> ranges;
  ranges.reserve(static_cast<size_t>(args.num_ranges));
  int64_t num_tokens = 0;
  for (int64_t i = 0; i < args.num_ranges; ++i) {
    const Range r{args.src_rows[i],   args.src_starts[i], args.dst_rows[i],
                  args.dst_starts[i], args.lens[i],       i};
    if (r.len < 0) fail("lens: expected >= 0, got ", r.len, " at index ", i);
    if (r.len == 0) continue;
    check_side(src, r.src_row, r.src_start, r.len, i);
    check_side(dst, r.dst_row, r.dst_start, r.len, i);
    ranges.push_back(r);
    num_tokens += r.len;
  }
  if (ranges.empty() || args.num_caches == 0) return;
  check_conflicts(args, src, dst, ranges);

  // Heads that lie side by side in every cache (the paged layout) are copied as one.
  bool merge_heads = true;
  for (int64_t c = 0; c < args.num_caches; ++c) {
    merge_heads = merge_heads && args.src[c].head_stride == args.head_bytes &&
                  args.dst[c].head_stride == args.head_bytes;
  }
  const int64_t heads = merge_heads ? 1 : args.num_heads;
  const int64_t bytes = merge_heads ? args.num_heads * args.head_bytes : args.head_bytes;
  const int64_t num_ranges = static_cast<int64_t>(ranges.size());
  const int64_t item_bytes = 1 + num_tokens / num_ranges * bytes;
  parallel_for(args.num_caches * num_ranges * heads, 1 + kPieceBytes / item_bytes, num_threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t item = begin; item < end; ++item) {
                   const int64_t head = item % heads, rest = item / heads;
                   const int64_t c = rest / num_ranges;
                   copy_range(args, src, dst, ranges[static_cast<size_t>(rest % num_ranges)],
                              args.src[c], args.dst[c], head, bytes);
                 }
               });
}

}  // namespace spec_rollout::cpu
