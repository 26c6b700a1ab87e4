// Prompts, accepted prefixes and continuations to the tensors a trainer or an engine takes. Every
// output element is written once, tokens that were not accepted are not read, and nothing is
// allocated per token.
#include <algorithm>
#include <cstring>

#include "offsets.h"
#include "parallel.h"
#include "spec_rollout/huge_pages.h"
#include "spec_rollout/ops.h"

namespace spec_rollout::cpu {
namespace {

constexpr int64_t kPieceTokens =
    32 * 1024;  // output tokens handed to a thread at once: about 700 kB

struct RowLens {
  int64_t prompt, accepted, continuation;
  int64_t response() const { return accepted + continuation; }
  int64_t total() const { return prompt + response(); }
};

RowLens row_lens(const AssembleArgs& args, int64_t r) {
  return {args.cu_prompt_lens[r + 1] - args.cu_prompt_lens[r], args.accepted_lens[r],
          args.cu_continuation_lens
              ? args.cu_continuation_lens[r + 1] - args.cu_continuation_lens[r]
              : 0};
}

// Limits below 0 are none.
void check_limits(const RowLens& lens, int64_t r, int64_t max_prompt_len,
                  int64_t max_response_len) {
  if (max_prompt_len >= 0 && lens.prompt > max_prompt_len) {
    fail("max_prompt_len: expected prompts of at most ", max_prompt_len, " tokens, got ",
         lens.prompt, " in row ", r);
  }
  if (max_response_len >= 0 && lens.response() > max_response_len) {
    fail("max_response_len: expected responses of at most ", max_response_len,
         " tokens, got accepted ", lens.accepted, " + continuation ", lens.continuation, " in row ",
         r);
  }
}

void check_inputs(const AssembleArgs& args) {
  check_cu_lens("cu_prompt_lens", args.cu_prompt_lens, args.batch, args.num_prompt_tokens);
  check_cu_lens("cu_prefix_lens", args.cu_prefix_lens, args.batch, args.num_prefix_tokens);
  if (args.cu_continuation_lens) {
    check_cu_lens("cu_continuation_lens", args.cu_continuation_lens, args.batch,
                  args.num_continuation_tokens);
  }
  for (int64_t r = 0; r < args.batch; ++r) {
    const int64_t draft_len = args.cu_prefix_lens[r + 1] - args.cu_prefix_lens[r];
    const int64_t accepted = args.accepted_lens[r];
    if (accepted < 0 || accepted > draft_len) {
      fail("accepted_lens: expected 0 <= accepted_len <= ", draft_len,
           " (the length of the draft), got ", accepted, " in row ", r);
    }
  }
}

void check_fits(const AssembleArgs& args) {
  if (args.layout == Layout::kPacked) {
    check_cu_lens("cu_lens", args.cu_lens, args.batch, args.num_tokens);
  }
  for (int64_t r = 0; r < args.batch; ++r) {
    const RowLens lens = row_lens(args, r);
    if (args.layout == Layout::kPacked) {
      if (args.cu_lens[r + 1] - args.cu_lens[r] != lens.total()) {
        fail("cu_lens: expected ", lens.total(), " tokens in row ", r, ", got ",
             args.cu_lens[r + 1] - args.cu_lens[r]);
      }
    } else if (args.prompt_width >= 0) {
      check_limits(lens, r, args.prompt_width, args.width - args.prompt_width);
    } else if (lens.total() > args.width) {
      fail("width: expected rows of at most ", args.width, " tokens, got prompt ", lens.prompt,
           " + response ", lens.response(), " in row ", r);
    }
  }
}

void copy_ids(int64_t* out, const IntVec& ids, int64_t begin, int64_t count) {
  if (ids.is_int64) {
    std::memcpy(out, static_cast<const int64_t*>(ids.data) + begin,
                static_cast<size_t>(count) * sizeof(int64_t));
    return;
  }
  const int32_t* in = static_cast<const int32_t*>(ids.data) + begin;
  for (int64_t i = 0; i < count; ++i) out[i] = in[i];
}

void copy_floats(float* out, const float* in, int64_t count) {
  if (count > 0) std::memcpy(out, in, static_cast<size_t>(count) * sizeof(float));
}

void write_row(const AssembleArgs& args, int64_t r) {
  const RowLens lens = row_lens(args, r);
  // Columns: [first, first + total) hold tokens, the rest of [0, width) padding.
  int64_t out = r * args.width, width = args.width, first = 0;
  switch (args.layout) {
    case Layout::kPacked:
      out = args.cu_lens[r];
      width = lens.total();
      break;
    case Layout::kRight:
      break;
    case Layout::kLeft:
      first = width - lens.total();
      break;
    case Layout::kSplit:
      first = args.prompt_width - lens.prompt;
      break;
  }
  const int64_t end = first + lens.total(), response = first + lens.prompt;
  const auto bytes = [](int64_t count) { return static_cast<size_t>(count); };

  int64_t* ids = args.input_ids + out;
  std::fill(ids, ids + first, args.pad_token_id);
  copy_ids(ids + first, args.prompt_ids, args.cu_prompt_lens[r], lens.prompt);
  copy_ids(ids + response, args.prefix_ids, args.cu_prefix_lens[r], lens.accepted);
  if (args.continuation_ids) {
    copy_ids(ids + response + lens.accepted, args.continuation_ids, args.cu_continuation_lens[r],
             lens.continuation);
  }
  std::fill(ids + end, ids + width, args.pad_token_id);

  if (args.position_ids != nullptr) {
    int64_t* positions = args.position_ids + out;
    std::fill(positions, positions + first, 0);
    for (int64_t i = 0; i < lens.total(); ++i) positions[first + i] = i;
    std::fill(positions + end, positions + width, 0);
  }
  if (args.attention_mask != nullptr) {
    uint8_t* mask = args.attention_mask + out;
    std::memset(mask, 0, bytes(first));
    std::memset(mask + first, 1, bytes(end - first));
    std::memset(mask + end, 0, bytes(width - end));
  }
  if (args.response_mask != nullptr) {
    uint8_t* mask = args.response_mask + out;
    std::memset(mask, 0, bytes(response));
    std::memset(mask + response, 1, bytes(end - response));
    std::memset(mask + end, 0, bytes(width - end));
  }
  if (args.logprobs != nullptr) {
    float* logprobs = args.logprobs + out;
    std::fill(logprobs, logprobs + response, 0.0f);
    copy_floats(logprobs + response, args.prefix_logprobs + args.cu_prefix_lens[r], lens.accepted);
    if (args.continuation_logprobs != nullptr) {
      copy_floats(logprobs + response + lens.accepted,
                  args.continuation_logprobs + args.cu_continuation_lens[r], lens.continuation);
    }
    std::fill(logprobs + end, logprobs + width, 0.0f);
  }
}

}  // namespace

AssembleSizes assemble_sizes(const AssembleArgs& args, int64_t max_prompt_len,
                             int64_t max_response_len, int64_t* cu_lens) {
  check_inputs(args);
  AssembleSizes sizes;
  cu_lens[0] = 0;
  for (int64_t r = 0; r < args.batch; ++r) {
    const RowLens lens = row_lens(args, r);
    check_limits(lens, r, max_prompt_len, max_response_len);
    sizes.longest_prompt = std::max(sizes.longest_prompt, lens.prompt);
    sizes.longest_response = std::max(sizes.longest_response, lens.response());
    sizes.longest_row = std::max(sizes.longest_row, lens.total());
    cu_lens[r + 1] = cu_lens[r] + lens.total();
  }
  sizes.num_tokens = cu_lens[args.batch];
  return sizes;
}

void assemble(const AssembleArgs& args, int num_threads) {
  check_inputs(args);
  check_fits(args);
  if (args.batch == 0) return;
  const int64_t num_tokens =
      args.layout == Layout::kPacked ? args.num_tokens : args.batch * args.width;
  prefer_huge_pages(args.input_ids, num_tokens * 8);
  prefer_huge_pages(args.position_ids, num_tokens * 8);
  prefer_huge_pages(args.attention_mask, num_tokens);
  prefer_huge_pages(args.response_mask, num_tokens);
  prefer_huge_pages(args.logprobs, num_tokens * 4);
  parallel_for(args.batch, 1 + kPieceTokens / (1 + num_tokens / args.batch), num_threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t r = begin; r < end; ++r) write_row(args, r);
               });
}

}  // namespace spec_rollout::cpu
