// Contracts of the operations: what a launcher receives, on either back end. Sizes and layouts have
// been checked by the caller (python_bindings); values (offsets, ids, NaN) are checked by the CPU
// back end at each call and, on CUDA, reported through the status word, with every access in bounds
// whatever the values.
#pragma once

#include <string>
#include <vector>

#include "spec_rollout/acceptance.h"
#include "spec_rollout/tensor_view.h"

namespace spec_rollout {

// Bits of the CUDA status word (spec_rollout/ops/_status.py names them).
enum StatusBit : int32_t {
  kStatusBadOffsets = 1,     // negative length, decreasing or out-of-range offsets
  kStatusBadTokenId = 2,     // token id outside the vocabulary
  kStatusBadLogits = 4,      // NaN or +inf logit, or a row without any finite logit
  kStatusNanLogprob = 8,     // NaN among the given log-probabilities
  kStatusBadCacheSlot = 16,  // row, position or block outside a KV cache
  kStatusBadSampling = 32    // temperature, top_k or top_p outside its range
};

// Lengths of the accepted prefixes from log-probabilities. Row r has lens[r] tokens from r *
// row_stride (padded), or tokens cu[r]..cu[r + 1] (packed).
struct AcceptPrefixArgs {
  const float* draft_logprobs = nullptr;  // null for rules that do not read them
  const float* target_logprobs = nullptr;
  int64_t draft_row_stride = 0;  // padded only
  int64_t target_row_stride = 0;
  int64_t max_len = 0;  // padded: columns; packed: total number of tokens
  IntVec lens;          // padded: [batch]
  IntVec cu_lens;       // packed: [batch + 1]
  int64_t batch = 0;
  const int64_t* keys = nullptr;
  IntVec positions;  // [batch] or null (0): response position of each row's first token
  RuleParams rule;
  int32_t* accepted_lens = nullptr;  // out [batch]
  int32_t* status = nullptr;         // CUDA only
};

// Log-probability of one token per row of logits.
struct TokenLogprobsArgs {
  LogitsView logits;
  IntVec token_ids;                     // [num_rows]
  const float* temperatures = nullptr;  // [num_rows] or null
  float temperature = 1.0f;             // when temperatures is null
  float* logprobs = nullptr;            // out [num_rows]
  int32_t* status = nullptr;
};

// How tokens are drawn: temperature, then top-k, then top-p; per row or one value for all.
struct SamplingArgs {
  const float* temperatures = nullptr;  // [batch] or null
  float temperature = 1.0f;             // 0: greedy
  IntVec top_ks;                        // [batch] or null
  int64_t top_k = 0;                    // 0: off
  const float* top_ps = nullptr;        // [batch] or null
  float top_p = 1.0f;                   // 1: off
};

// Draws one token per row with the Gumbel noise of (keys[r], positions[r]).
struct SampleTokensArgs {
  LogitsView logits;  // num_rows = batch
  const int64_t* keys = nullptr;
  IntVec positions;
  SamplingArgs sampling;
  int32_t* token_ids = nullptr;  // out [batch]
  float* logprobs = nullptr;     // out [batch]
  int32_t* status = nullptr;
};

// Tests the drafts of a batch against logits and draws the token after each accepted prefix. Row r
// owns draft tokens cu_draft_lens[r]..[r + 1] (n_r of them) and logits rows cu_logits_lens[r]..[r +
// 1], n_r or n_r + 1 of them; logits row i predicts draft token i, the last of n_r + 1 the token
// after the draft.
struct VerifyPrefixArgs {
  LogitsView logits;
  IntVec draft_ids;
  int64_t num_draft_tokens = 0;
  const float* draft_logprobs = nullptr;  // [num_draft_tokens] or null
  IntVec cu_draft_lens;                   // [batch + 1]
  IntVec cu_logits_lens;                  // [batch + 1] or null: cu_draft_lens[r] + r
  int64_t batch = 0;
  const int64_t* keys = nullptr;
  IntVec positions;  // [batch] or null (0)
  SamplingArgs sampling;
  RuleParams rule;
  int32_t* accepted_lens = nullptr;   // out [batch]
  int32_t* next_token_ids = nullptr;  // out [batch]; -1: no token drawn
  float* logprobs = nullptr;          // out [num logits rows]
  void* workspace = nullptr;          // CUDA only; verify_prefix_workspace_bytes
  int64_t workspace_bytes = 0;
  int32_t* status = nullptr;
};

// One layer's K or V cache. Contiguous: [rows, heads, positions, head_dim]; paged: [blocks,
// block_size, heads, head_dim]. Strides in bytes; the last dimension is contiguous.
struct CacheView {
  char* data = nullptr;
  int64_t outer_stride = 0;  // row or block
  int64_t head_stride = 0;
  int64_t token_stride = 0;  // position, or offset in a block
};

struct SpliceKvArgs {
  const CacheView* src = nullptr;  // [num_caches]; in device memory for CUDA
  const CacheView* dst = nullptr;
  int64_t num_caches = 0;
  int64_t num_heads = 0;
  int64_t head_bytes = 0;  // head_dim * item size
  bool in_place = false;   // some src is its dst
  // Extents, for the bounds checks: rows or blocks, positions or block size.
  int64_t src_outer = 0, src_tokens = 0, dst_outer = 0, dst_tokens = 0;
  IntVec src_rows, src_starts, dst_rows, dst_starts, lens;  // [num_ranges]
  int64_t num_ranges = 0;
  int64_t max_range_len = 0;  // CUDA grid size; >= every len
  int32_t access_bytes =
      1;  // CUDA: largest of 1, 2, 4, 8, 16 that divides all pointers, strides and head_bytes
  IntVec src_block_table;  // [src_table_rows, src_table_cols] or null (contiguous)
  int64_t src_table_rows = 0, src_table_cols = 0;
  IntVec dst_block_table;
  int64_t dst_table_rows = 0, dst_table_cols = 0;
  int32_t* status = nullptr;
};

enum class Layout : int32_t { kPacked = 0, kRight = 1, kLeft = 2, kSplit = 3 };

// Prompts, accepted prefixes and continuations to one sequence per row, in the layout a consumer
// wants. The prefix arrays are whole drafts; accepted_lens says how much of each is used.
struct AssembleArgs {
  IntVec prompt_ids, cu_prompt_lens;
  IntVec prefix_ids, cu_prefix_lens, accepted_lens;
  IntVec continuation_ids, cu_continuation_lens;  // null: no continuations
  const float* prefix_logprobs = nullptr;
  const float* continuation_logprobs = nullptr;
  int64_t num_prompt_tokens = 0, num_prefix_tokens = 0, num_continuation_tokens = 0;
  int64_t batch = 0;
  Layout layout = Layout::kPacked;
  int64_t prompt_width =
      -1;                  // columns for prompts: kSplit's P; kRight, kLeft: a limit, < 0 for none
  int64_t width = 0;       // columns of the padded layouts (kSplit: P + R)
  IntVec cu_lens;          // kPacked: [batch + 1] offsets of the output
  int64_t num_tokens = 0;  // kPacked: output length
  int64_t pad_token_id = 0;
  int64_t* input_ids = nullptr;       // out
  int64_t* position_ids = nullptr;    // out or null
  uint8_t* attention_mask = nullptr;  // out or null (bool)
  uint8_t* response_mask = nullptr;   // out or null (bool)
  float* logprobs = nullptr;          // out or null; 0 outside the response
  int32_t* status = nullptr;
};

// Sizes of an assembled batch, in tokens.
struct AssembleSizes {
  int64_t longest_prompt = 0, longest_response = 0, longest_row = 0, num_tokens = 0;
};

namespace cpu {
// num_threads: most threads to use, the caller's included.
void accept_prefix(const AcceptPrefixArgs& args, int num_threads);
void token_logprobs(const TokenLogprobsArgs& args, int num_threads);
void sample_tokens(const SampleTokensArgs& args, int num_threads);
void verify_prefix(const VerifyPrefixArgs& args, int num_threads);
void splice_kv(const SpliceKvArgs& args, int num_threads);
void assemble(const AssembleArgs& args, int num_threads);
// Checks the inputs of assemble (its layout and outputs are not read) and, where >= 0, the limits;
// writes the packed offsets of the output to cu_lens [batch + 1].
AssembleSizes assemble_sizes(const AssembleArgs& args, int64_t max_prompt_len,
                             int64_t max_response_len, int64_t* cu_lens);
// out [batch, vocab]: the noise that sample_tokens and verify_prefix add to the logits.
void gumbel_noise(const int64_t* keys, IntVec positions, int64_t batch, int64_t vocab, float* out,
                  int num_threads);
// Instruction-set levels of the kernels: those that the processor has, the best one first, and the
// one in use. The second throws InvalidArgument, as every kernel does, where SPEC_ROLLOUT_ISA
// (environment) names none of the first.
std::vector<std::string> isa_available();
const char* isa_in_use();
}  // namespace cpu

#if defined(SPEC_ROLLOUT_WITH_CUDA)
namespace cuda {
using Stream = void*;  // cudaStream_t
void accept_prefix(const AcceptPrefixArgs& args, Stream stream);
void token_logprobs(const TokenLogprobsArgs& args, Stream stream);
void sample_tokens(const SampleTokensArgs& args, Stream stream);
void verify_prefix(const VerifyPrefixArgs& args, Stream stream);
void splice_kv(const SpliceKvArgs& args, Stream stream);
void assemble(const AssembleArgs& args, Stream stream);
int64_t verify_prefix_workspace_bytes(int64_t num_logits_rows, int64_t vocab, int64_t batch);
}  // namespace cuda
#endif

}  // namespace spec_rollout
