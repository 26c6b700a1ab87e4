#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/sixteen_bits.h"
#include "spec_rollout/check.h"

namespace spec_rollout::cpu::SPEC_ROLLOUT_ISA {
namespace {

// Every sum runs over dimensions or keys one after the other, so a query's result comes from the
// same sequence of operations whatever is computed with it. Which of the independent sums share a
// vector is free: of many queries (Tile) the lanes are queries; of few (FewQueries), keys and then
// dimensions.
constexpr int64_t kCacheLine = 64;  // bytes

struct Query {
  int64_t row, head, token;
  int32_t position;
};

// The keys that some of a set of queries sees, [begin, end), and those that all of them see.
struct KeyRange {
  int64_t begin, end, seen_begin, seen_end;
  int32_t window;

  KeyRange(int64_t first, int64_t last, int64_t limit) {
    const int64_t size = limit > 0 ? std::min(limit, last + 1) : last + 1;
    begin = std::max<int64_t>(0, first - size + 1);
    end = last + 1;
    seen_begin = std::max(begin, last - size + 1);
    seen_end = first + 1;
    window = static_cast<int32_t>(size);
  }
};

VecI visible(VecI distance, int32_t window) { return (distance >= 0) & (distance < window); }

// One step of a transposition: lane l of row i and lane l ^ Step of row i ^ Step change places
// where only one of l and i has the bit Step.
template <int Step>
struct Exchange {
  alignas(VecI) int32_t low[kVecLanes] = {}, high[kVecLanes] = {};
  constexpr Exchange() {
    for (int lane = 0; lane < kVecLanes; ++lane) {
      low[lane] = lane & Step ? lane - Step + kVecLanes : lane;
      high[lane] = lane & Step ? lane + kVecLanes : lane + Step;
    }
  }
};

// Transposes a square of kVecLanes x kVecLanes floats.
template <int Step = 1>
inline void transpose(VecF (&rows)[kVecLanes]) {
  static constexpr Exchange<Step> exchange;
  VecI low, high;
  std::memcpy(&low, exchange.low, sizeof low);
  std::memcpy(&high, exchange.high, sizeof high);
#pragma GCC unroll 16
  for (int i = 0; i < kVecLanes; ++i) {
    if (i & Step) continue;
    const VecF a = rows[i], b = rows[i + Step];
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + Step] = __builtin_shuffle(a, b, high);
  }
  if constexpr (2 * Step < kVecLanes) transpose<2 * Step>(rows);
}

// A few queries that share a key head, as in decoding: keys and values are read once, and that is
// what takes the time.
template <class T>
class FewQueries {
 public:
  static constexpr int kMost = 4;

  FewQueries(const CausalAttentionArgs& args, std::vector<float>& scratch)
      : args_(args), scratch_(scratch) {}

  void run(const Span& span, int64_t kv_head, const Query* queries, int count) {
    const int64_t dims = args_.head_dim;
    int64_t first = queries[0].position, last = first;
    for (int q = 1; q < count; ++q) {
      first = std::min<int64_t>(first, queries[q].position);
      last = std::max<int64_t>(last, queries[q].position);
    }
    const KeyRange range(first, last, span.window);
    const int64_t stride = (range.end - range.begin + kVecLanes - 1) / kVecLanes * kVecLanes;
    const int64_t padded_dims = (dims + kVecLanes - 1) / kVecLanes * kVecLanes;
    scratch_.resize(count * (dims + stride) + padded_dims * kVecLanes);
    float* scaled = scratch_.data();            // [count][head_dim]
    float* weights = scaled + count * dims;     // [count][stride]
    float* columns = weights + count * stride;  // [padded_dims][kVecLanes]
    VecF top[kMost];
    for (int q = 0; q < count; ++q) {
      const float* query = args_.query + queries[q].row * args_.query_strides[0] +
                           queries[q].head * args_.query_strides[1] +
                           queries[q].token * args_.query_strides[2];
      for (int64_t d = 0; d < dims; ++d) scaled[q * dims + d] = query[d] * args_.scale;
      top[q] = splat(-INFINITY);
    }
    VecI lanes;
    for (int lane = 0; lane < kVecLanes; ++lane) lanes[lane] = lane;

    const int64_t key_stride = args_.key_strides[2];
    const T* key = static_cast<const T*>(args_.key) + span.cache_row * args_.key_strides[0] +
                   kv_head * args_.key_strides[1] + range.begin * key_stride;
    const T* value = static_cast<const T*>(args_.value) + span.cache_row * args_.value_strides[0] +
                     kv_head * args_.value_strides[1] + range.begin * args_.value_strides[2];
    for (int64_t j = range.begin; j < range.end; j += kVecLanes, key += kVecLanes * key_stride) {
      // The values will be needed soon; fetching them now fills the time that the scores take.
      for (int i = 0; i < kVecLanes && j + i < range.end; ++i) {
        const T* soon = value + (j + i - range.begin) * args_.value_strides[2];
        const T* next = key + (i + 2 * kVecLanes) * key_stride;
        for (int64_t d = 0; d < dims; d += kCacheLine / static_cast<int64_t>(sizeof(T))) {
          __builtin_prefetch(soon + d);
          __builtin_prefetch(next + d);
        }
      }
      const int rows = static_cast<int>(std::min<int64_t>(kVecLanes, range.end - j));
      for (int64_t d = 0; d < dims; d += kVecLanes) {
        VecF square[kVecLanes];
        if (rows == kVecLanes && d + kVecLanes <= dims) {
#pragma GCC unroll 16
          for (int i = 0; i < kVecLanes; ++i) square[i] = load(key + i * key_stride + d);
        } else {
          for (int i = 0; i < kVecLanes; ++i) {
            square[i] = i < rows ? load_some(key + i * key_stride + d,
                                             std::min<int64_t>(kVecLanes, dims - d))
                                 : VecF{};
          }
        }
        transpose(square);
        for (int i = 0; i < kVecLanes; ++i) {
          std::memcpy(columns + (d + i) * kVecLanes, &square[i], sizeof square[i]);
        }
      }
      for (int q = 0; q < count; ++q) {
        VecF sum = {};
        for (int64_t d = 0; d < dims; ++d) {
          sum = vec_fma(splat(scaled[q * dims + d]), load(columns + d * kVecLanes), sum);
        }
        const VecI distance = queries[q].position - static_cast<int32_t>(j) - lanes;
        sum = visible(distance, range.window) ? sum : splat(-INFINITY);
        top[q] = vec_max(top[q], sum);
        std::memcpy(weights + q * stride + j - range.begin, &sum, sizeof sum);
      }
    }
    for (int q = 0; q < count; ++q) {
      const VecF best = splat(reduce_max(top[q]));
      for (int64_t j = range.begin; j < range.end; j += kVecLanes) {
        float* w = weights + q * stride + j - range.begin;
        const VecI distance = queries[q].position - static_cast<int32_t>(j) - lanes;
        const VecF weight = visible(distance, range.window) ? vec_exp(load(w) - best) : splat(0.0f);
        std::memcpy(w, &weight, sizeof weight);
      }
    }
    for (int q = 0; q < count; ++q) {
      const float* w = weights + q * stride;
      float* out =
          args_.out + ((queries[q].row * args_.num_tokens + queries[q].token) * args_.num_heads +
                       queries[q].head) *
                          dims;
      int64_t d = 0;
      for (; d + 2 * kVecLanes <= dims; d += 2 * kVecLanes) {
        weighted_sum<2>(value + d, w, range.end - range.begin, 2 * kVecLanes, out + d);
      }
      for (; d + kVecLanes <= dims; d += kVecLanes) {
        weighted_sum<1>(value + d, w, range.end - range.begin, kVecLanes, out + d);
      }
      if (d < dims) {
        weighted_sum<1, false>(value + d, w, range.end - range.begin, dims - d, out + d);
      }
    }
  }

 private:
  template <int Vecs, bool Whole = true>
  void weighted_sum(const T* value, const float* w, int64_t num_keys, int64_t dims,
                    float* out) const {
    VecF sums[Vecs] = {}, total = {};
    for (int64_t j = 0; j < num_keys; ++j, value += args_.value_strides[2]) {
      const VecF weight = splat(w[j]);
      total += weight;
      for (int v = 0; v < Vecs; ++v) {
        const VecF x = Whole ? load(value + v * kVecLanes) : load_some(value, dims);
        sums[v] = vec_fma(weight, x, sums[v]);
      }
    }
    for (int v = 0; v < Vecs; ++v) {
      const VecF mean = sums[v] / total;
      std::memcpy(out + v * kVecLanes, &mean,
                  std::min<int64_t>(kVecLanes, dims - v * kVecLanes) * sizeof(float));
    }
  }

  const CausalAttentionArgs& args_;
  std::vector<float>& scratch_;
};

// Up to Vecs * kVecLanes queries that share a key head. Keys and values are broadcast.
template <class T, int Vecs>
class Tile {
  static constexpr int kLanes = Vecs * kVecLanes;
  static constexpr int kKeys = 8 / Vecs;   // keys per pass over the dimensions
  static constexpr int kDims = 16 / Vecs;  // dimensions per pass over the keys

 public:
  Tile(const CausalAttentionArgs& args, std::vector<float>& scratch)
      : args_(args), scratch_(scratch) {}

  void run(const Span& span, int64_t kv_head, const Query* queries, int count) {
    const int64_t dims = args_.head_dim;
    int32_t positions[kLanes];
    int64_t first = std::numeric_limits<int32_t>::max(), last = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      positions[lane] = queries[std::min(lane, count - 1)].position;
      first = std::min<int64_t>(first, positions[lane]);
      last = std::max<int64_t>(last, positions[lane]);
    }
    range_ = KeyRange(first, last, span.window);
    std::memcpy(positions_, positions, sizeof positions_);

    scratch_.resize((dims + range_.end - range_.begin) * kLanes);
    q_ = scratch_.data();
    weights_ = q_ + dims * kLanes;
    for (int lane = 0; lane < kLanes; ++lane) {
      const Query& query = queries[std::min(lane, count - 1)];
      const float* q = args_.query + query.row * args_.query_strides[0] +
                       query.head * args_.query_strides[1] + query.token * args_.query_strides[2];
      for (int64_t d = 0; d < dims; ++d) q_[d * kLanes + lane] = q[d] * args_.scale;
    }
    scores(static_cast<const T*>(args_.key) + span.cache_row * args_.key_strides[0] +
           kv_head * args_.key_strides[1]);
    softmax();
    weighted_sum(static_cast<const T*>(args_.value) + span.cache_row * args_.value_strides[0] +
                     kv_head * args_.value_strides[1],
                 queries, count);
  }

 private:
  void scores(const T* keys) {
    for (int v = 0; v < Vecs; ++v) top_[v] = splat(-INFINITY);
    int64_t j = range_.begin;
    for (; j + kKeys <= range_.end; j += kKeys) scores_of<kKeys>(keys, j);
    for (; j < range_.end; ++j) scores_of<1>(keys, j);
  }

  template <int Keys>
  void scores_of(const T* keys, int64_t j) {
    const int64_t stride = args_.key_strides[2];
    const T* k = keys + j * stride;
    VecF sums[Keys][Vecs] = {};
    for (int64_t d = 0; d < args_.head_dim; ++d) {
      VecF q[Vecs];
      for (int v = 0; v < Vecs; ++v) q[v] = load(q_ + d * kLanes + v * kVecLanes);
      for (int i = 0; i < Keys; ++i) {
        const VecF x = splat(to_float(k[i * stride + d]));
        for (int v = 0; v < Vecs; ++v) sums[i][v] = vec_fma(q[v], x, sums[i][v]);
      }
    }
    const bool seen = j >= range_.seen_begin && j + Keys <= range_.seen_end;
    for (int i = 0; i < Keys; ++i) {
      for (int v = 0; v < Vecs; ++v) {
        if (!seen) sums[i][v] = visible(j + i, v) ? sums[i][v] : splat(-INFINITY);
        top_[v] = vec_max(top_[v], sums[i][v]);
        std::memcpy(weights_ + (j + i - range_.begin) * kLanes + v * kVecLanes, &sums[i][v],
                    sizeof(VecF));
      }
    }
  }

  VecI visible(int64_t key, int v) const {
    return cpu::SPEC_ROLLOUT_ISA::visible(positions_[v] - static_cast<int32_t>(key), range_.window);
  }

  void softmax() {
    for (int v = 0; v < Vecs; ++v) sum_[v] = splat(0.0f);
    for (int64_t j = range_.begin; j < range_.end; ++j) {
      const bool seen = j >= range_.seen_begin && j < range_.seen_end;
      for (int v = 0; v < Vecs; ++v) {
        float* w = weights_ + (j - range_.begin) * kLanes + v * kVecLanes;
        VecF weight = vec_exp(load(w) - top_[v]);
        // vec_exp(-inf) is tiny, not 0; a NaN score must stay one.
        if (!seen) weight = visible(j, v) ? weight : splat(0.0f);
        sum_[v] += weight;
        std::memcpy(w, &weight, sizeof weight);
      }
    }
  }

  void weighted_sum(const T* values, const Query* queries, int count) {
    const int64_t dims = args_.head_dim;
    int64_t d = 0;
    for (; d + kDims <= dims; d += kDims) weighted_sum_of<kDims>(values, d, queries, count);
    for (; d < dims; ++d) weighted_sum_of<1>(values, d, queries, count);
  }

  template <int Dims>
  void weighted_sum_of(const T* values, int64_t d, const Query* queries, int count) {
    VecF sums[Dims][Vecs] = {};
    const T* x = values + range_.begin * args_.value_strides[2] + d;
    const float* w = weights_;
    for (int64_t j = range_.begin; j < range_.end; ++j, x += args_.value_strides[2], w += kLanes) {
      VecF weight[Vecs];
      for (int v = 0; v < Vecs; ++v) weight[v] = load(w + v * kVecLanes);
      for (int i = 0; i < Dims; ++i) {
        const VecF value = splat(to_float(x[i]));
        for (int v = 0; v < Vecs; ++v) sums[i][v] = vec_fma(weight[v], value, sums[i][v]);
      }
    }
    float out[Dims][kLanes];
    for (int i = 0; i < Dims; ++i) {
      for (int v = 0; v < Vecs; ++v) {
        const VecF mean = sums[i][v] / sum_[v];
        std::memcpy(&out[i][v * kVecLanes], &mean, sizeof mean);
      }
    }
    for (int lane = 0; lane < count; ++lane) {
      const Query& query = queries[lane];
      float* dst = args_.out +
                   ((query.row * args_.num_tokens + query.token) * args_.num_heads + query.head) *
                       args_.head_dim +
                   d;
      for (int i = 0; i < Dims; ++i) dst[i] = out[i][lane];
    }
  }

  const CausalAttentionArgs& args_;
  std::vector<float>& scratch_;
  float* q_ = nullptr;        // [head_dim][lanes]
  float* weights_ = nullptr;  // [keys][lanes]: scores, then e^(score - max)
  KeyRange range_{0, 0, 0};
  VecI positions_[Vecs];
  VecF top_[Vecs], sum_[Vecs];
};

template <class T>
void attend(const CausalAttentionArgs& args, int num_threads) {
  // Neighbouring rows of one cache row are computed together, so that its keys are read once.
  std::vector<int64_t> segments;
  for (int64_t r = 0; r < args.num_rows; ++r) {
    const Span& span = args.spans[r];
    if (span.first < 0 || span.last < span.first || span.last >= args.width) {
      fail("spans: expected 0 <= first <= last < ", args.width, ", got ", span.first, " and ",
           span.last, " in row ", r);
    }
    if (span.last - span.first >= args.num_tokens) {
      fail("spans: expected at most ", args.num_tokens, " tokens, got ", span.last - span.first + 1,
           " in row ", r);
    }
    if (span.cache_row < 0 || span.cache_row >= args.num_cache_rows) {
      fail("spans: expected 0 <= cache row < ", args.num_cache_rows, ", got ", span.cache_row,
           " in row ", r);
    }
    if (r == 0 || args.spans[r - 1].cache_row != span.cache_row ||
        args.spans[r - 1].window != span.window) {
      segments.push_back(r);
    }
  }
  const auto num_segments = static_cast<int64_t>(segments.size());
  segments.push_back(args.num_rows);
  const int64_t group = args.num_heads / args.num_kv_heads;
  parallel_for(num_segments * args.num_kv_heads, 4, num_threads, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch;
    std::vector<Query> queries;
    FewQueries<T> few(args, scratch);
    Tile<T, 1> narrow(args, scratch);
    Tile<T, 2> wide(args, scratch);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t segment = item / args.num_kv_heads, kv_head = item % args.num_kv_heads;
      queries.clear();
      for (int64_t r = segments[segment]; r < segments[segment + 1]; ++r) {
        const Span& span = args.spans[r];
        const int64_t count = span.last - span.first + 1;
        for (int64_t t = 0; t < count; ++t) {
          for (int64_t g = 0; g < group; ++g) {
            queries.push_back({r, kv_head * group + g, t, static_cast<int32_t>(span.first + t)});
          }
        }
        for (int64_t t = count; t < args.num_tokens; ++t) {
          float* out = args.out + ((r * args.num_tokens + t) * args.num_heads + kv_head * group) *
                                      args.head_dim;
          std::fill(out, out + group * args.head_dim, 0.0f);
        }
      }
      const Span& span = args.spans[segments[segment]];
      const auto total = static_cast<int64_t>(queries.size());
      for (int64_t i = 0; i < total;) {
        const int left = static_cast<int>(std::min<int64_t>(total - i, 2 * kVecLanes));
        if (left <= FewQueries<T>::kMost) {
          few.run(span, kv_head, &queries[i], left);
        } else if (left > kVecLanes) {
          wide.run(span, kv_head, &queries[i], left);
        } else {
          narrow.run(span, kv_head, &queries[i], left);
        }
        i += left;
      }
    }
  });
}

}  // namespace

void causal_attention(const CausalAttentionArgs& args, int num_threads) {
  (args.dtype == DType::kBFloat16 ? attend<BFloat16> : attend<float>)(args, num_threads);
}

}  // namespace spec_rollout::cpu::SPEC_ROLLOUT_ISA
