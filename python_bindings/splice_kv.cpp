// splice_kv and the caches it copies between.
#include <pybind11/pybind11.h>

#include <vector>

#include "launch.h"
#include "spec_rollout/huge_pages.h"
#include "spec_rollout/ops.h"

namespace spec_rollout::python {
namespace {

// A list of equally shaped 4-D caches as views. `paged` says which dimension is which.
std::vector<CacheView> cache_views(ArgReader& reader, const py::sequence& caches, const char* name,
                                   bool paged, Dim& heads, Dim& head_dim, Dim& outer, Dim& tokens,
                                   DType& dtype, int32_t& item_size) {
  std::vector<CacheView> views;
  views.reserve(caches.size());
  for (const py::handle cache : caches) {
    const TensorView view = paged ? reader.tensor(cache, name, {outer, tokens, heads, head_dim}, {},
                                                  Contiguity::kLastDim)
                                  : reader.tensor(cache, name, {outer, heads, tokens, head_dim}, {},
                                                  Contiguity::kLastDim);
    if (item_size == 0) {
      dtype = view.dtype;
      item_size = view.item_size;
    }
    if (view.dtype != dtype || view.item_size != item_size) {
      fail(name, ": expected all caches to be ", dtype_name(dtype), " (", item_size,
           " bytes), got ", dtype_name(view.dtype), " (", view.item_size, " bytes)");
    }
    views.push_back(cache_view(view, paged));
  }
  return views;
}

// The same views as rows of four int64, for a CUDA launch to find in device memory.
std::vector<int64_t> cache_view_words(const py::sequence& caches, bool paged) {
  ArgReader reader;
  Dim heads{"heads"}, head_dim{"head_dim"}, outer{"rows"}, tokens{"positions"};
  DType dtype = DType::kOther;
  int32_t item_size = 0;
  std::vector<int64_t> words;
  for (const CacheView& view : cache_views(reader, caches, "caches", paged, heads, head_dim, outer,
                                           tokens, dtype, item_size)) {
    words.insert(words.end(), {reinterpret_cast<int64_t>(view.data), view.outer_stride,
                               view.head_stride, view.token_stride});
  }
  return words;
}

// Widest access that is aligned everywhere: every address is a sum of these numbers.
int32_t access_bytes(int64_t head_bytes, const std::vector<CacheView>& src,
                     const std::vector<CacheView>& dst) {
  int64_t bits = 16 | head_bytes;
  for (const auto* caches : {&src, &dst}) {
    for (const CacheView& view : *caches) {
      bits |= reinterpret_cast<int64_t>(view.data) | view.outer_stride | view.head_stride |
              view.token_stride;
    }
  }
  return static_cast<int32_t>(bits & -bits);
}

void splice_kv(const py::sequence& src, const py::sequence& dst, py::handle src_rows,
               py::handle src_starts, py::handle dst_rows, py::handle dst_starts, py::handle lens,
               py::handle src_block_table, py::handle dst_block_table, int64_t max_range_len,
               py::handle src_views, py::handle dst_views, py::handle status, int num_threads) {
  if (src.size() != dst.size()) {
    fail("dst: expected as many caches as src (", src.size(), "), got ", dst.size());
  }
  ArgReader reader;
  Dim heads{"heads"}, head_dim{"head_dim"}, ranges{"num_ranges"};
  Dim src_outer{"src_rows"}, src_tokens{"src_positions"}, dst_outer{"dst_rows"},
      dst_tokens{"dst_positions"};
  const bool src_paged = !src_block_table.is_none(), dst_paged = !dst_block_table.is_none();
  DType dtype = DType::kOther;
  int32_t item_size = 0;
  const std::vector<CacheView> src_caches = cache_views(
      reader, src, "src", src_paged, heads, head_dim, src_outer, src_tokens, dtype, item_size);
  const std::vector<CacheView> dst_caches = cache_views(
      reader, dst, "dst", dst_paged, heads, head_dim, dst_outer, dst_tokens, dtype, item_size);
  SpliceKvArgs args;
  args.num_caches = static_cast<int64_t>(src_caches.size());
  for (size_t i = 0; i < src_caches.size(); ++i) {
    const CacheView &from = src_caches[i], &to = dst_caches[i];
    // Empty caches have no address, and so share none.
    if (from.data != to.data || from.data == nullptr) continue;
    args.in_place = true;
    if (from.outer_stride != to.outer_stride || from.head_stride != to.head_stride ||
        from.token_stride != to.token_stride) {
      fail(
          "src, dst: expected equal strides where they share memory, got different views at index ",
          i);
    }
  }
  args.src_rows = reader.ints(src_rows, "src_rows", ranges);
  args.src_starts = reader.ints(src_starts, "src_starts", ranges);
  args.dst_rows = reader.ints(dst_rows, "dst_rows", ranges);
  args.dst_starts = reader.ints(dst_starts, "dst_starts", ranges);
  args.lens = reader.ints(lens, "lens", ranges);
  args.num_ranges = ranges.value;
  if (src_paged) {
    Dim rows{"src_table_rows"}, cols{"src_max_blocks"};
    args.src_block_table = reader.int_matrix(src_block_table, "src_block_table", rows, cols);
    args.src_table_rows = rows.value;
    args.src_table_cols = cols.value;
  }
  if (dst_paged) {
    Dim rows{"dst_table_rows"}, cols{"dst_max_blocks"};
    args.dst_block_table = reader.int_matrix(dst_block_table, "dst_block_table", rows, cols);
    args.dst_table_rows = rows.value;
    args.dst_table_cols = cols.value;
  }
  if (args.num_caches == 0) return;
  args.num_heads = heads.value;
  args.head_bytes = head_dim.value * item_size;
  args.src_outer = src_outer.value;
  args.src_tokens = src_tokens.value;
  args.dst_outer = dst_outer.value;
  args.dst_tokens = dst_tokens.value;
  for (const CacheView& view : dst_caches) {
    if ((args.dst_outer > 1 && view.outer_stride == 0) ||
        (args.dst_tokens > 1 && view.token_stride == 0) ||
        (args.num_heads > 1 && view.head_stride == 0)) {
      fail("dst: expected tensors whose elements do not share memory, got an expanded view");
    }
  }
  args.max_range_len = max_range_len;
  args.access_bytes = access_bytes(args.head_bytes, src_caches, dst_caches);
  args.status = status_word(reader, status);
  if (reader.on_cpu()) {
    args.src = src_caches.data();
    args.dst = dst_caches.data();
  } else {
    Dim caches{"num_caches", args.num_caches}, words{"4", 4};
    args.src = static_cast<const CacheView*>(
        reader.tensor(src_views, "src_views", {caches, words}, {DType::kInt64}).data);
    args.dst = static_cast<const CacheView*>(
        reader.tensor(dst_views, "dst_views", {caches, words}, {DType::kInt64}).data);
  }
  launch(
      reader, [&] { cpu::splice_kv(args, num_threads); },
      SPEC_ROLLOUT_CUDA_CALL(splice_kv(args, stream)));
}

void prefer_huge_pages(py::handle tensor) {
  const TensorView view = describe(tensor, "tensor");
  if (view.device < 0) cpu::prefer_huge_pages(view.data, view.numel() * view.item_size);
}

}  // namespace

void bind_splice_kv(py::module_& module) {
  module.def("cache_view_words", &cache_view_words);
  module.def("splice_kv", &splice_kv);
  module.def("prefer_huge_pages", &prefer_huge_pages);
}

}  // namespace spec_rollout::python
