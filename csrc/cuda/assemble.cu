// One thread per output column, neighbouring threads on neighbouring columns: every output element
// is written once, and tokens that were not accepted are not read.
#include "launch.cuh"
#include "spec_rollout/ops.h"

namespace spec_rollout::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kEnoughBlocks =
    8192;  // several waves on the largest GPU, so that uneven rows balance

// A part of a row: tokens [begin, begin + len) of a packed array.
struct Piece {
  int64_t begin = 0, len = 0;
};

// Row r of packed offsets, cut to the array whatever they hold; `ok` is cleared if something had to
// be cut.
__device__ Piece piece_of(const IntVec& cu_lens, int64_t r, int64_t total, bool& ok) {
  const int64_t begin = cu_lens[r], end = cu_lens[r + 1];
  if (begin < 0 || end < begin || end > total) {
    ok = false;
    return {};
  }
  return {begin, end - begin};
}

__global__ void __launch_bounds__(kThreads)
    assemble_kernel(const AssembleArgs args, const int64_t splits) {
  const int64_t num_items = args.batch * splits;
  for (int64_t item = blockIdx.x; item < num_items; item += gridDim.x) {
    const int64_t r = item / splits, part = item % splits;
    bool ok = true;
    Piece prompt = piece_of(args.cu_prompt_lens, r, args.num_prompt_tokens, ok);
    Piece prefix = piece_of(args.cu_prefix_lens, r, args.num_prefix_tokens, ok);
    Piece continuation;
    if (args.cu_continuation_lens) {
      continuation = piece_of(args.cu_continuation_lens, r, args.num_continuation_tokens, ok);
    }
    const int64_t accepted = args.accepted_lens[r];
    if (accepted < 0 || accepted > prefix.len) {
      ok = false;
      prefix.len = 0;
    } else {
      prefix.len = accepted;
    }
    int64_t out = r * args.width, width = args.width, first = 0;
    if (args.layout == Layout::kPacked) {
      const Piece row = piece_of(args.cu_lens, r, args.num_tokens, ok);
      out = row.begin;
      width = row.len;
      ok = ok && row.len == prompt.len + prefix.len + continuation.len;
    }
    // A row that does not fit becomes an empty one: padding, and a raised status.
    const int64_t total = prompt.len + prefix.len + continuation.len;
    ok = ok && total <= width;
    if (args.layout != Layout::kPacked && args.prompt_width >= 0) {
      ok = ok && prompt.len <= args.prompt_width &&
           total - prompt.len <= args.width - args.prompt_width;
    }
    if (!ok) {
      if (part == 0 && threadIdx.x == 0) raise_status(args.status, kStatusBadOffsets);
      prompt.len = prefix.len = continuation.len = 0;
    }
    const int64_t num_tokens = prompt.len + prefix.len + continuation.len;
    if (args.layout == Layout::kLeft) first = width - num_tokens;
    if (args.layout == Layout::kSplit) first = args.prompt_width - prompt.len;

    for (int64_t col = part * kThreads + threadIdx.x; col < width; col += splits * kThreads) {
      const int64_t i = col - first;  // place among the row's tokens
      const bool is_token = i >= 0 && i < num_tokens;
      const int64_t j = i - prompt.len;  // place in the response
      const bool is_response = is_token && j >= 0;
      int64_t id = args.pad_token_id;
      float logprob = 0.0f;
      if (is_response) {
        if (j < prefix.len) {
          id = args.prefix_ids[prefix.begin + j];
          if (args.prefix_logprobs != nullptr) logprob = args.prefix_logprobs[prefix.begin + j];
        } else {
          const int64_t k = continuation.begin + j - prefix.len;
          id = args.continuation_ids[k];
          if (args.continuation_logprobs != nullptr) logprob = args.continuation_logprobs[k];
        }
      } else if (is_token) {
        id = args.prompt_ids[prompt.begin + i];
      }
      args.input_ids[out + col] = id;
      if (args.position_ids != nullptr) args.position_ids[out + col] = is_token ? i : 0;
      if (args.attention_mask != nullptr) args.attention_mask[out + col] = is_token;
      if (args.response_mask != nullptr) args.response_mask[out + col] = is_response;
      if (args.logprobs != nullptr) args.logprobs[out + col] = logprob;
    }
  }
}

}  // namespace

void assemble(const AssembleArgs& args, Stream stream) {
  if (args.batch == 0) return;
  const int64_t width =
      args.layout == Layout::kPacked ? 1 + args.num_tokens / args.batch : args.width;
  const int64_t most = std::max<int64_t>(1, (width + kThreads - 1) / kThreads);
  const int64_t splits =
      std::clamp<int64_t>((kEnoughBlocks + args.batch - 1) / args.batch, 1, most);
  assemble_kernel<<<grid_size(args.batch * splits), kThreads, 0,
                    static_cast<cudaStream_t>(stream)>>>(args, splits);
  check_launch("assemble");
}

}  // namespace spec_rollout::cuda
