// assemble: training rows from prompts, prefixes and continuations.
#include <pybind11/pybind11.h>

#include "launch.h"
#include "spec_rollout/ops.h"

namespace spec_rollout::python {
namespace {

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

}  // namespace

void bind_assemble(py::module_& module) {
  module.def("assemble_sizes", &assemble_sizes);
  module.def("assemble", &assemble);
}

}  // namespace spec_rollout::python
