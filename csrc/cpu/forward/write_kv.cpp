#include <algorithm>
#include <cstring>

#include "cpu/parallel.h"
#include "spec_rollout/check.h"
#include "spec_rollout/forward.h"

namespace spec_rollout::cpu {

void write_kv(const WriteKvArgs& args, int num_threads) {
  for (int64_t r = 0; r < args.num_rows; ++r) {
    const Span& span = args.spans[r];
    if (span.first < 0 || span.last < span.first || span.last >= args.dst_tokens ||
        span.last - span.first >= args.num_tokens) {
      fail("spans: expected 0 <= first <= last < ", args.dst_tokens, " and at most ",
           args.num_tokens, " tokens, got ", span.first, " and ", span.last, " in row ", r);
    }
    if (span.cache_row < 0 || span.cache_row >= args.dst_rows) {
      fail("spans: expected 0 <= cache row < ", args.dst_rows, ", got ", span.cache_row, " in row ",
           r);
    }
  }
  const int64_t row_bytes = args.num_heads * args.num_tokens * args.head_bytes;
  const int64_t grain = 1 + (int64_t{64} << 10) / std::max<int64_t>(1, row_bytes);
  parallel_for(args.num_rows, grain, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const Span& span = args.spans[r];
      const int64_t count = span.last - span.first + 1;
      for (int64_t h = 0; h < args.num_heads; ++h) {
        const char* from = args.src.data + r * args.src.outer_stride + h * args.src.head_stride;
        char* to = args.dst.data + span.cache_row * args.dst.outer_stride +
                   h * args.dst.head_stride + span.first * args.dst.token_stride;
        for (int64_t t = 0; t < count; ++t) {
          std::memcpy(to + t * args.dst.token_stride, from + t * args.src.token_stride,
                      args.head_bytes);
        }
      }
    }
  });
}

}  // namespace spec_rollout::cpu
