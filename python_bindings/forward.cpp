// What the embedded engine's forward needs besides the ops, on the CPU: attention over a slot
// cache, writes to it, and the parts of a layer between its matrix products.
#include <pybind11/pybind11.h>

#include <algorithm>

#include "convert.h"
#include "spec_rollout/forward.h"

namespace spec_rollout::python {
namespace {

// [rows, 4] of int64 as what it means.
const Span* spans_of(ArgReader& reader, py::handle spans, Dim& rows) {
  Dim four{"4", 4};
  static_assert(sizeof(Span) == 4 * sizeof(int64_t));
  return static_cast<const Span*>(
      reader.tensor(spans, "spans", {rows, four}, {DType::kInt64}).data);
}

void write_kv(py::handle states, py::handle storage, py::handle spans, int num_threads) {
  ArgReader reader;
  Dim rows{"rows"}, heads{"heads"}, tokens{"tokens"}, head_dim{"head_dim"};
  Dim dst_rows{"num_rows"}, dst_tokens{"capacity"};
  const TensorView src =
      reader.tensor(states, "states", {rows, heads, tokens, head_dim}, {}, Contiguity::kLastDim);
  const TensorView dst = reader.tensor(storage, "storage", {dst_rows, heads, dst_tokens, head_dim},
                                       {}, Contiguity::kLastDim);
  if (src.dtype != dst.dtype || src.item_size != dst.item_size) {
    fail("storage: expected ", dtype_name(src.dtype), " (", src.item_size, " bytes), got ",
         dtype_name(dst.dtype), " (", dst.item_size, " bytes)");
  }
  WriteKvArgs args;
  args.src = cache_view(src, false);
  args.dst = cache_view(dst, false);
  if (!reader.on_cpu()) fail("states: expected a tensor on CPU, got one on a GPU");
  args.spans = spans_of(reader, spans, rows);
  args.num_rows = rows.value;
  args.num_heads = heads.value;
  args.num_tokens = tokens.value;
  args.dst_rows = dst_rows.value;
  args.dst_tokens = dst_tokens.value;
  args.head_bytes = head_dim.value * src.item_size;
  py::gil_scoped_release release;
  cpu::write_kv(args, num_threads);
}

void causal_attention(py::handle query, py::handle key, py::handle value, py::handle spans,
                      double scale, py::handle out, int num_threads) {
  ArgReader reader;
  Dim rows{"rows"}, heads{"heads"}, tokens{"tokens"}, head_dim{"head_dim"}, kv_heads{"kv_heads"},
      cache_rows{"cache_rows"}, width{"width"};
  const TensorView q = reader.tensor(query, "query", {rows, heads, tokens, head_dim},
                                     {DType::kFloat32}, Contiguity::kLastDim);
  const TensorView k = reader.tensor(key, "key", {cache_rows, kv_heads, width, head_dim},
                                     {DType::kFloat32, DType::kBFloat16}, Contiguity::kLastDim);
  const TensorView v = reader.tensor(value, "value", {cache_rows, kv_heads, width, head_dim},
                                     {k.dtype}, Contiguity::kLastDim);
  if (!reader.on_cpu()) fail("query: expected a tensor on CPU, got one on a GPU");
  if (kv_heads.value == 0 || heads.value % kv_heads.value != 0) {
    fail("query: expected a multiple of key's ", kv_heads.value, " heads, got ", heads.value);
  }
  CausalAttentionArgs args;
  args.query = static_cast<const float*>(q.data);
  args.key = k.data;
  args.value = v.data;
  std::copy_n(q.strides, 3, args.query_strides);
  std::copy_n(k.strides, 3, args.key_strides);
  std::copy_n(v.strides, 3, args.value_strides);
  args.spans = spans_of(reader, spans, rows);
  args.out = output<float>(reader, out, "out", {rows, tokens, heads, head_dim}, DType::kFloat32);
  args.num_rows = rows.value;
  args.num_heads = heads.value;
  args.num_kv_heads = kv_heads.value;
  args.num_tokens = tokens.value;
  args.num_cache_rows = cache_rows.value;
  args.width = width.value;
  args.head_dim = head_dim.value;
  args.dtype = k.dtype;
  args.scale = static_cast<float>(scale);
  py::gil_scoped_release release;
  cpu::causal_attention(args, num_threads);
}

void rms_norm(py::handle x, py::handle weight, double eps, py::handle out, int num_threads) {
  ArgReader reader;
  Dim rows{"rows"}, dim{"dim"};
  const TensorView view =
      reader.tensor(x, "x", {rows, dim}, {DType::kFloat32, DType::kBFloat16}, Contiguity::kLastDim);
  RmsNormArgs args;
  args.x = view.data;
  args.dtype = view.dtype;
  args.row_stride = view.strides[0];
  args.weight = reader.tensor(weight, "weight", {dim}, {view.dtype}).data;
  args.out = reader.tensor(out, "out", {rows, dim}, {view.dtype}).data;
  if (!reader.on_cpu()) fail("x: expected a tensor on CPU, got one on a GPU");
  args.num_rows = rows.value;
  args.dim = dim.value;
  args.eps = static_cast<float>(eps);
  py::gil_scoped_release release;
  cpu::rms_norm(args, num_threads);
}

void silu_mul(py::handle gate, py::handle up, py::handle out, int num_threads) {
  ArgReader reader;
  Dim rows{"rows"}, dim{"dim"};
  const TensorView view =
      reader.tensor(gate, "gate", {rows, dim}, {DType::kFloat32, DType::kBFloat16});
  SiluMulArgs args;
  args.gate = view.data;
  args.dtype = view.dtype;
  args.up = reader.tensor(up, "up", {rows, dim}, {view.dtype}).data;
  args.out = reader.tensor(out, "out", {rows, dim}, {view.dtype}).data;
  if (!reader.on_cpu()) fail("gate: expected a tensor on CPU, got one on a GPU");
  args.size = rows.value * dim.value;
  py::gil_scoped_release release;
  cpu::silu_mul(args, num_threads);
}

void rotate_halves(py::handle x, py::handle cos, py::handle sin, py::handle out, int num_threads) {
  ArgReader reader;
  Dim rows{"rows"}, heads{"heads"}, tokens{"tokens"}, head_dim{"head_dim"};
  const TensorView view = reader.tensor(x, "x", {rows, heads, tokens, head_dim},
                                        {DType::kFloat32, DType::kBFloat16}, Contiguity::kLastDim);
  if (head_dim.value % 2 != 0) fail("x: expected an even head_dim, got ", head_dim.value);
  RotateHalvesArgs args;
  args.x = view.data;
  args.dtype = view.dtype;
  std::copy_n(view.strides, 3, args.strides);
  args.cos = reader.tensor(cos, "cos", {rows, tokens, head_dim}, {view.dtype}).data;
  args.sin = reader.tensor(sin, "sin", {rows, tokens, head_dim}, {view.dtype}).data;
  args.out = reader.tensor(out, "out", {rows, tokens, heads, head_dim}, {view.dtype}).data;
  if (!reader.on_cpu()) fail("x: expected a tensor on CPU, got one on a GPU");
  args.num_rows = rows.value;
  args.num_heads = heads.value;
  args.num_tokens = tokens.value;
  args.head_dim = head_dim.value;
  py::gil_scoped_release release;
  cpu::rotate_halves(args, num_threads);
}

}  // namespace

void bind_forward(py::module_& module) {
  module.def("write_kv", &write_kv);
  module.def("causal_attention", &causal_attention);
  module.def("rms_norm", &rms_norm);
  module.def("silu_mul", &silu_mul);
  module.def("rotate_halves", &rotate_halves);
}

}  // namespace spec_rollout::python
