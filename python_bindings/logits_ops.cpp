// The ops that accept, verify, score and draw tokens.
#include <pybind11/pybind11.h>

#include <cmath>

#include "launch.h"
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

}  // namespace

void bind_logits_ops(py::module_& module) {
  module.def("accept_prefix", &accept_prefix);
  module.def("token_logprobs", &token_logprobs);
  module.def("check_token_logprobs", &check_token_logprobs);
  module.def("sample_tokens", &sample_tokens);
  module.def("verify_prefix", &verify_prefix);
  module.def("new_verify_prefix", &new_verify_prefix);
  module.def("check_verify_prefix", &check_verify_prefix);
  module.def("verify_prefix_workspace_bytes", &verify_prefix_workspace_bytes);
  module.def("gumbel_noise", &gumbel_noise);
}

}  // namespace spec_rollout::python
