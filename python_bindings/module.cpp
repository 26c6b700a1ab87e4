// The Python face of the core. Every function takes tensors (never loose pointers), writes into
// outputs the caller allocated, and ends with the number of CPU threads to use.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <vector>

#if defined(SPEC_ROLLOUT_WITH_CUDA)
#include <cuda_runtime.h>
#endif

#include "convert.h"
#include "spec_rollout/huge_pages.h"
#include "spec_rollout/ops.h"

namespace spec_rollout::python {
namespace {

RuleParams rule_params(int kind, double log_lenience, double scale, double min_target_prob) {
  RuleParams params;
  params.kind = static_cast<RuleKind>(kind);
  params.log_lenience = static_cast<float>(log_lenience);
  params.scale = static_cast<float>(scale);
  params.min_target_logprob = static_cast<float>(std::log(min_target_prob));
  return params;
}
RuleParams rule_params(const py::tuple& rule) {
  return rule_params(py::cast<int>(rule[0]), py::cast<double>(rule[1]), py::cast<double>(rule[2]),
                     py::cast<double>(rule[3]));
}

#if defined(SPEC_ROLLOUT_WITH_CUDA)
// Makes a GPU the current one; nothing where it is already.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check(cudaGetDevice(&previous_));
    if (device_ != previous_) check(cudaSetDevice(device_));
  }
  ~DeviceGuard() {
    if (device_ != previous_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  static void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
  }
  int device_, previous_ = 0;
};
#endif

// Runs the CPU or the CUDA implementation without the interpreter lock; on CUDA, on the tensors'
// device and torch's current stream there.
template <class Cpu, class Cuda>
void launch(const ArgReader& reader, Cpu cpu, [[maybe_unused]] Cuda cuda) {
  if (reader.on_cpu()) {
    py::gil_scoped_release release;
    return cpu();
  }
#if defined(SPEC_ROLLOUT_WITH_CUDA)
  void* stream = current_stream(reader.device());
  py::gil_scoped_release release;
  const DeviceGuard guard(reader.device());
  cuda(stream);
#else
  throw std::runtime_error(
      "spec_rollout was built without CUDA; install it on a machine with the CUDA toolkit (nvcc), "
      "or "
      "set SPEC_ROLLOUT_CUDA=ON to make the build fail where it is missing");
#endif
}

#if defined(SPEC_ROLLOUT_WITH_CUDA)
#define SPEC_ROLLOUT_CUDA_CALL(call) [&](void* stream) { cuda::call; }
#else
#define SPEC_ROLLOUT_CUDA_CALL(call) [] {}
#endif

int32_t* status_word(ArgReader& reader, py::handle status) {
  if (status.is_none()) return nullptr;
  Dim one{"1", 1};
  return static_cast<int32_t*>(reader.tensor(status, "status", {one}, {DType::kInt32}).data);
}

// Per-row tensor or one number for all rows.
struct Sampling {
  SamplingArgs args;
  Sampling(ArgReader& reader, Dim& batch, py::handle temperatures, double temperature,
           py::handle top_ks, int64_t top_k, py::handle top_ps, double top_p) {
    args.temperatures = reader.floats(temperatures, "temperature", batch, true);
    args.temperature = static_cast<float>(temperature);
    args.top_ks = reader.ints(top_ks, "top_k", batch, true);
    args.top_k = top_k;
    args.top_ps = reader.floats(top_ps, "top_p", batch, true);
    args.top_p = static_cast<float>(top_p);
  }
};

void accept_prefix(py::handle draft_logprobs, py::handle target_logprobs, py::handle lens,
                   py::handle cu_lens, py::handle keys, py::handle positions, const py::tuple& rule,
                   py::handle accepted_lens, py::handle status, int num_threads) {
  ArgReader reader;
  Dim batch{"batch"}, tokens{"num_draft_tokens"}, width{"max_draft_len"};
  AcceptPrefixArgs args;
  if (lens.is_none()) {
    const TensorView target =
        reader.tensor(target_logprobs, "target_logprobs", {tokens}, {DType::kFloat32});
    args.target_logprobs = static_cast<const float*>(target.data);
    args.draft_logprobs = reader.floats(draft_logprobs, "draft_logprobs", tokens, true);
    args.cu_lens = reader.ints(cu_lens, "cu_draft_lens", {batch, 1});
    args.max_len = tokens.value;
  } else {
    const TensorView target = reader.tensor(target_logprobs, "target_logprobs", {batch, width},
                                            {DType::kFloat32}, Contiguity::kLastDim);
    args.target_logprobs = static_cast<const float*>(target.data);
    args.target_row_stride = target.strides[0];
    if (!draft_logprobs.is_none()) {
      const TensorView draft = reader.tensor(draft_logprobs, "draft_logprobs", {batch, width},
                                             {DType::kFloat32}, Contiguity::kLastDim);
      args.draft_logprobs = static_cast<const float*>(draft.data);
      args.draft_row_stride = draft.strides[0];
    }
    args.lens = reader.ints(lens, "draft_lens", batch);
    args.max_len = width.value;
  }
  args.keys = reader.keys(keys, batch);
  args.positions = reader.ints(positions, "positions", batch, true);
  args.rule = rule_params(rule);
  args.accepted_lens =
      output<int32_t>(reader, accepted_lens, "accepted_lens", {batch}, DType::kInt32);
  args.batch = batch.value;
  args.status = status_word(reader, status);
  launch(
      reader, [&] { cpu::accept_prefix(args, num_threads); },
      SPEC_ROLLOUT_CUDA_CALL(accept_prefix(args, stream)));
}

TokenLogprobsArgs token_logprobs_inputs(ArgReader& reader, Dim& rows, py::handle logits,
                                        py::handle token_ids, py::handle temperatures,
                                        double temperature) {
  Dim vocab{"vocab"};
  TokenLogprobsArgs args;
  args.logits = reader.logits(logits, rows, vocab);
  args.token_ids = reader.ints(token_ids, "token_ids", rows);
  args.temperatures = reader.floats(temperatures, "temperature", rows, true);
  args.temperature = static_cast<float>(temperature);
  return args;
}

void token_logprobs(py::handle logits, py::handle token_ids, py::handle temperatures,
                    double temperature, py::handle logprobs, py::handle status, int num_threads) {
  ArgReader reader;
  Dim rows{"num_tokens"};
  TokenLogprobsArgs args =
      token_logprobs_inputs(reader, rows, logits, token_ids, temperatures, temperature);
  args.logprobs = output<float>(reader, logprobs, "logprobs", {rows}, DType::kFloat32);
  args.status = status_word(reader, status);
  launch(
      reader, [&] { cpu::token_logprobs(args, num_threads); },
      SPEC_ROLLOUT_CUDA_CALL(token_logprobs(args, stream)));
}

// The checks of token_logprobs alone, for implementations that are not in this extension.
void check_token_logprobs(py::handle logits, py::handle token_ids, py::handle temperatures,
                          double temperature) {
  ArgReader reader;
  Dim rows{"num_tokens"};
  token_logprobs_inputs(reader, rows, logits, token_ids, temperatures, temperature);
}

void sample_tokens(py::handle logits, py::handle keys, py::handle positions,
                   py::handle temperatures, double temperature, py::handle top_ks, int64_t top_k,
                   py::handle top_ps, double top_p, py::handle token_ids, py::handle logprobs,
                   py::handle status, int num_threads) {
  ArgReader reader;
  Dim batch{"batch"}, vocab{"vocab"};
  SampleTokensArgs args;
  args.logits = reader.logits(logits, batch, vocab);
  args.keys = reader.keys(keys, batch);
  args.positions = reader.ints(positions, "positions", batch);
  args.sampling =
      Sampling(reader, batch, temperatures, temperature, top_ks, top_k, top_ps, top_p).args;
  args.token_ids = output<int32_t>(reader, token_ids, "token_ids", {batch}, DType::kInt32);
  args.logprobs = output<float>(reader, logprobs, "logprobs", {batch}, DType::kFloat32);
  args.status = status_word(reader, status);
  launch(
      reader, [&] { cpu::sample_tokens(args, num_threads); },
      SPEC_ROLLOUT_CUDA_CALL(sample_tokens(args, stream)));
}

int64_t verify_prefix_workspace_bytes([[maybe_unused]] int64_t rows, [[maybe_unused]] int64_t vocab,
                                      [[maybe_unused]] int64_t batch) {
#if defined(SPEC_ROLLOUT_WITH_CUDA)
  return cuda::verify_prefix_workspace_bytes(rows, vocab, batch);
#else
  return 0;
#endif
}

VerifyPrefixArgs verify_prefix_inputs(ArgReader& reader, Dim& rows, Dim& batch, py::handle logits,
                                      py::handle draft_ids, py::handle cu_draft_lens,
                                      py::handle draft_logprobs, py::handle cu_logits_lens,
                                      py::handle keys, py::handle positions,
                                      py::handle temperatures, double temperature,
                                      py::handle top_ks, int64_t top_k, py::handle top_ps,
                                      double top_p, const RuleParams& rule) {
  Dim vocab{"vocab"}, tokens{"num_draft_tokens"};
  VerifyPrefixArgs args;
  args.logits = reader.logits(logits, rows, vocab);
  args.draft_ids = reader.ints(draft_ids, "draft_ids", tokens);
  args.num_draft_tokens = tokens.value;
  args.cu_draft_lens = reader.ints(cu_draft_lens, "cu_draft_lens", {batch, 1});
  args.cu_logits_lens = reader.ints(cu_logits_lens, "cu_logits_lens", {batch, 1}, true);
  args.draft_logprobs = reader.floats(draft_logprobs, "draft_logprobs", tokens, true);
  args.batch = batch.value;
  if (!args.cu_logits_lens && rows.value != tokens.value + batch.value) {
    fail("logits: expected num_draft_tokens + batch = ", tokens.value + batch.value, " rows, got ",
         rows.value, " (give cu_logits_lens if some rows have no bonus logits)");
  }
  args.keys = reader.keys(keys, batch);
  args.positions = reader.ints(positions, "positions", batch, true);
  args.sampling =
      Sampling(reader, batch, temperatures, temperature, top_ks, top_k, top_ps, top_p).args;
  args.rule = rule;
  return args;
}

void verify_prefix(py::handle logits, py::handle draft_ids, py::handle cu_draft_lens,
                   py::handle draft_logprobs, py::handle cu_logits_lens, py::handle keys,
                   py::handle positions, py::handle temperatures, double temperature,
                   py::handle top_ks, int64_t top_k, py::handle top_ps, double top_p,
                   const py::tuple& rule, py::handle accepted_lens, py::handle next_token_ids,
                   py::handle logprobs, py::handle workspace, py::handle status, int num_threads) {
  ArgReader reader;
  Dim rows{"num_logits_rows"}, batch{"batch"};
  VerifyPrefixArgs args = verify_prefix_inputs(
      reader, rows, batch, logits, draft_ids, cu_draft_lens, draft_logprobs, cu_logits_lens, keys,
      positions, temperatures, temperature, top_ks, top_k, top_ps, top_p, rule_params(rule));
  args.accepted_lens =
      output<int32_t>(reader, accepted_lens, "accepted_lens", {batch}, DType::kInt32);
  args.next_token_ids =
      output<int32_t>(reader, next_token_ids, "next_token_ids", {batch}, DType::kInt32);
  args.logprobs = output<float>(reader, logprobs, "logprobs", {rows}, DType::kFloat32);
  if (!workspace.is_none()) {
    Dim words{"workspace_words"};
    args.workspace = reader.tensor(workspace, "workspace", {words}, {DType::kInt32}).data;
    args.workspace_bytes = words.value * static_cast<int64_t>(sizeof(int32_t));
  }
  args.status = status_word(reader, status);
  launch(
      reader, [&] { cpu::verify_prefix(args, num_threads); },
      SPEC_ROLLOUT_CUDA_CALL(verify_prefix(args, stream)));
}

// verify_prefix with outputs of its own, parts of one allocation that is the workspace, too. All in
// one call: allocating on a GPU costs more than the rest, and the steps one by one from Python cost
// as much again. `like` is an int32 tensor on the device of the others.
py::tuple new_verify_prefix(py::handle logits, py::handle draft_ids, py::handle cu_draft_lens,
                            py::handle draft_logprobs, py::handle cu_logits_lens, py::handle keys,
                            py::handle positions, py::handle temperatures, double temperature,
                            py::handle top_ks, int64_t top_k, py::handle top_ps, double top_p,
                            int kind, double log_lenience, double scale, double min_target_prob,
                            py::handle like, py::handle status, int num_threads) {
  ArgReader reader;
  Dim rows{"num_logits_rows"}, batch{"batch"};
  VerifyPrefixArgs args = verify_prefix_inputs(
      reader, rows, batch, logits, draft_ids, cu_draft_lens, draft_logprobs, cu_logits_lens, keys,
      positions, temperatures, temperature, top_ks, top_k, top_ps, top_p,
      rule_params(kind, log_lenience, scale, min_target_prob));
  args.status = status_word(reader, status);
  args.workspace_bytes =
      reader.on_cpu() ? 0
                      : verify_prefix_workspace_bytes(rows.value, args.logits.vocab, batch.value);
  const int64_t sizes[] = {batch.value, batch.value, rows.value,
                           args.workspace_bytes / static_cast<int64_t>(sizeof(int32_t))};
  const WordParts parts = new_word_parts(like, sizes, 2);
  reader.same_device(parts.device, "like");
  args.accepted_lens = parts.data;
  args.next_token_ids = args.accepted_lens + sizes[0];
  args.logprobs = reinterpret_cast<float*>(args.next_token_ids + sizes[1]);
  args.workspace = args.logprobs + sizes[2];
  launch(
      reader, [&] { cpu::verify_prefix(args, num_threads); },
      SPEC_ROLLOUT_CUDA_CALL(verify_prefix(args, stream)));
  return parts.tensors;
}

// The checks of verify_prefix alone, for implementations that are not in this extension.
void check_verify_prefix(py::handle logits, py::handle draft_ids, py::handle cu_draft_lens,
                         py::handle draft_logprobs, py::handle cu_logits_lens, py::handle keys,
                         py::handle positions, py::handle temperatures, double temperature,
                         py::handle top_ks, int64_t top_k, py::handle top_ps, double top_p,
                         const py::tuple& rule) {
  ArgReader reader;
  Dim rows{"num_logits_rows"}, batch{"batch"};
  verify_prefix_inputs(reader, rows, batch, logits, draft_ids, cu_draft_lens, draft_logprobs,
                       cu_logits_lens, keys, positions, temperatures, temperature, top_ks, top_k,
                       top_ps, top_p, rule_params(rule));
}

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
    if (from.data != to.data) continue;
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

// -> (longest_prompt, longest_response, longest_row, num_tokens), and cu_lens [batch + 1] written;
// on CUDA, where the values are out of reach, None after the checks of shapes and dtypes.
py::object assemble_sizes(py::handle cu_prompt_lens, py::handle cu_prefix_lens,
                          py::handle accepted_lens, py::handle cu_continuation_lens,
                          int64_t num_prompt_tokens, int64_t num_prefix_tokens,
                          int64_t num_continuation_tokens, int64_t max_prompt_len,
                          int64_t max_response_len, py::handle cu_lens) {
  ArgReader reader;
  Dim batch{"batch"};
  AssembleArgs args;
  args.cu_prompt_lens = reader.ints(cu_prompt_lens, "cu_prompt_lens", {batch, 1});
  args.cu_prefix_lens = reader.ints(cu_prefix_lens, "cu_prefix_lens", {batch, 1});
  args.accepted_lens = reader.ints(accepted_lens, "accepted_lens", batch);
  args.cu_continuation_lens =
      reader.ints(cu_continuation_lens, "cu_continuation_lens", {batch, 1}, true);
  args.num_prompt_tokens = num_prompt_tokens;
  args.num_prefix_tokens = num_prefix_tokens;
  args.num_continuation_tokens = num_continuation_tokens;
  args.batch = batch.value;
  auto* out = output<int64_t>(reader, cu_lens, "cu_lens", {{batch, 1}}, DType::kInt64);
  if (!reader.on_cpu()) return py::none();
  const AssembleSizes sizes = cpu::assemble_sizes(args, max_prompt_len, max_response_len, out);
  return py::make_tuple(sizes.longest_prompt, sizes.longest_response, sizes.longest_row,
                        sizes.num_tokens);
}

void assemble(py::handle prompt_ids, py::handle cu_prompt_lens, py::handle prefix_ids,
              py::handle cu_prefix_lens, py::handle accepted_lens, py::handle continuation_ids,
              py::handle cu_continuation_lens, py::handle prefix_logprobs,
              py::handle continuation_logprobs, int layout, int64_t prompt_width,
              int64_t pad_token_id, py::handle cu_lens, py::handle input_ids,
              py::handle position_ids, py::handle attention_mask, py::handle response_mask,
              py::handle logprobs, py::handle status, int num_threads) {
  ArgReader reader;
  Dim batch{"batch"}, prompt_tokens{"num_prompt_tokens"}, prefix_tokens{"num_prefix_tokens"},
      continuation_tokens{"num_continuation_tokens"}, width{"width"}, tokens{"num_tokens"};
  AssembleArgs args;
  args.prompt_ids = reader.ints(prompt_ids, "prompt_ids", prompt_tokens);
  args.cu_prompt_lens = reader.ints(cu_prompt_lens, "cu_prompt_lens", {batch, 1});
  args.prefix_ids = reader.ints(prefix_ids, "prefix_ids", prefix_tokens);
  args.cu_prefix_lens = reader.ints(cu_prefix_lens, "cu_prefix_lens", {batch, 1});
  args.accepted_lens = reader.ints(accepted_lens, "accepted_lens", batch);
  args.continuation_ids =
      reader.ints(continuation_ids, "continuation_ids", continuation_tokens, true);
  args.cu_continuation_lens =
      reader.ints(cu_continuation_lens, "cu_continuation_lens", {batch, 1}, true);
  args.prefix_logprobs = reader.floats(prefix_logprobs, "prefix_logprobs", prefix_tokens, true);
  if (!continuation_logprobs.is_none() && !args.continuation_ids) {
    fail("continuation_logprobs: expected None without continuation_ids, got a tensor");
  }
  args.continuation_logprobs =
      reader.floats(continuation_logprobs, "continuation_logprobs", continuation_tokens, true);
  if (!logprobs.is_none() &&
      (prefix_logprobs.is_none() || (args.continuation_ids && continuation_logprobs.is_none()))) {
    fail(
        "prefix_logprobs, continuation_logprobs: expected log-probs of all response tokens or of "
        "none, got only some");
  }
  args.num_prompt_tokens = prompt_tokens.value;
  args.num_prefix_tokens = prefix_tokens.value;
  args.num_continuation_tokens = continuation_tokens.value < 0 ? 0 : continuation_tokens.value;
  args.batch = batch.value;
  args.layout = static_cast<Layout>(layout);
  args.prompt_width = prompt_width;
  if (args.layout == Layout::kSplit && prompt_width < 0) {
    fail("prompt_width: expected >= 0, got ", prompt_width);
  }
  args.pad_token_id = pad_token_id;
  const auto out = [&](py::handle value, const char* name, DType dtype) -> void* {
    if (value.is_none()) return nullptr;
    return args.layout == Layout::kPacked
               ? reader.tensor(value, name, {tokens}, {dtype}).data
               : reader.tensor(value, name, {batch, width}, {dtype}).data;
  };
  args.input_ids = static_cast<int64_t*>(out(input_ids, "input_ids", DType::kInt64));
  args.position_ids = static_cast<int64_t*>(out(position_ids, "position_ids", DType::kInt64));
  args.attention_mask = static_cast<uint8_t*>(out(attention_mask, "attention_mask", DType::kBool));
  args.response_mask = static_cast<uint8_t*>(out(response_mask, "response_mask", DType::kBool));
  args.logprobs = static_cast<float*>(out(logprobs, "logprobs", DType::kFloat32));
  if (args.layout == Layout::kPacked) {
    args.cu_lens = reader.ints(cu_lens, "cu_lens", {batch, 1});
    args.num_tokens = tokens.value;
  } else {
    args.width = width.value;
  }
  args.status = status_word(reader, status);
  launch(
      reader, [&] { cpu::assemble(args, num_threads); },
      SPEC_ROLLOUT_CUDA_CALL(assemble(args, stream)));
}

void gumbel_noise(py::handle keys, py::handle positions, py::handle out, int num_threads) {
  ArgReader reader;
  Dim batch{"batch"}, vocab{"vocab"};
  const int64_t* key_data = reader.keys(keys, batch);
  const IntVec position_data = reader.ints(positions, "positions", batch);
  float* out_data = output<float>(reader, out, "out", {batch, vocab}, DType::kFloat32);
  if (!reader.on_cpu()) fail("keys: expected CPU tensors, got CUDA ones");
  py::gil_scoped_release release;
  cpu::gumbel_noise(key_data, position_data, batch.value, vocab.value, out_data, num_threads);
}

py::dict build_info() {
  py::dict info;
  info["version"] = SPEC_ROLLOUT_VERSION;
  info["compiler"] = SPEC_ROLLOUT_COMPILER;
  info["isa_levels"] = py::str(SPEC_ROLLOUT_ISA_LEVELS).attr("split")(",");
  info["isa_in_use"] = cpu::isa_in_use();
#if defined(SPEC_ROLLOUT_WITH_CUDA)
  info["cuda"] = true;
  info["cuda_version"] = SPEC_ROLLOUT_CUDA_VERSION;
  info["cuda_archs"] = py::str(SPEC_ROLLOUT_CUDA_ARCHS).attr("split")(",");
#else
  info["cuda"] = false;
  info["cuda_version"] = py::none();
  info["cuda_archs"] = py::list();
#endif
  return info;
}

}  // namespace

void bind_suffix_index(py::module_& module);  // suffix_index.cpp
void bind_forward(py::module_& module);       // forward.cpp
void bind_arithmetic(py::module_& module);    // arithmetic.cpp

}  // namespace spec_rollout::python

PYBIND11_MODULE(_C, module) {
  using namespace spec_rollout::python;
  module.doc() =
      "Kernels of spec_rollout. Use spec_rollout.ops, which documents and registers them.";
  module.def("accept_prefix", &accept_prefix);
  module.def("token_logprobs", &token_logprobs);
  module.def("check_token_logprobs", &check_token_logprobs);
  module.def("sample_tokens", &sample_tokens);
  module.def("verify_prefix", &verify_prefix);
  module.def("new_verify_prefix", &new_verify_prefix);
  module.def("check_verify_prefix", &check_verify_prefix);
  module.def("verify_prefix_workspace_bytes", &verify_prefix_workspace_bytes);
  module.def("cache_view_words", &cache_view_words);
  module.def("splice_kv", &splice_kv);
  module.def("assemble_sizes", &assemble_sizes);
  module.def("assemble", &assemble);
  module.def("prefer_huge_pages", &prefer_huge_pages);
  module.def("gumbel_noise", &gumbel_noise);
  module.def("all_plain", &all_plain);
  module.def("build_info", &build_info);
  bind_suffix_index(module);
  bind_forward(module);
  bind_arithmetic(module);
}
