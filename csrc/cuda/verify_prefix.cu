// Two kernels. The first tests draft tokens, each in a block of its own; of one draft, `splits`
// blocks take every splits-th token in order and stop once an earlier one was rejected, so few rows
// are read in vain. The second, a block per draft, finds the first rejection and draws the token
// that follows, unless the test has drawn it already (coupled and greedy rows: their test is the
// draw).
#include "logits_launch.cuh"
#include "target_row.cuh"

namespace spec_rollout::cuda {
namespace {

// Device memory between the two kernels.
struct Workspace {
  int32_t* first_rejection;  // [batch]
  int32_t* next_ids;         // [num logits rows]: what the test drew in place of the draft token
  float* next_logprobs;
};

constexpr int kNoRejectionByte = 0x7f;  // every byte of "none yet": larger than any draft

__host__ __device__ inline Workspace workspace_of(void* memory, int64_t num_rows, int64_t batch) {
  int32_t* words = static_cast<int32_t*>(memory);
  return {words, words + batch, reinterpret_cast<float*>(words + batch + num_rows)};
}

// One draft and its logits rows; empty, and reported, if the offsets are not usable.
struct Draft {
  int64_t draft_begin = 0, draft_len = 0, logits_begin = 0, num_logits = 0;

  __device__ Draft(const VerifyPrefixArgs& args, int64_t r) {
    const int64_t begin = args.cu_draft_lens[r];
    const int64_t len = args.cu_draft_lens[r + 1] - begin;
    const int64_t row = args.cu_logits_lens ? args.cu_logits_lens[r] : begin + r;
    const int64_t rows = args.cu_logits_lens ? args.cu_logits_lens[r + 1] - row : len + 1;
    const bool first = r == 0, last = r + 1 == args.batch;
    const bool good =
        begin >= 0 && len >= 0 && begin <= args.num_draft_tokens - len && row >= 0 &&
        (rows == len || rows == len + 1) && row <= args.logits.num_rows - rows &&
        (!first || (begin == 0 && row == 0)) &&
        (!last || (begin + len == args.num_draft_tokens && row + rows == args.logits.num_rows));
    if (good) {
      draft_begin = begin;
      draft_len = len;
      logits_begin = row;
      num_logits = rows;
    } else if (threadIdx.x == 0) {
      raise_status(args.status, kStatusBadOffsets);
    }
  }
};

// Whether the test of a token yields the token that replaces it.
__device__ inline bool test_draws(const RuleParams& rule, const RowSampling& sampling) {
  return sampling.greedy || rule.kind == RuleKind::kCoupled;
}

// For thread 0: the decision on a draft token of a coupled or greedy row, whose draw is `draw`.
__device__ inline bool drawn_is_accepted(const RuleParams& rule, bool greedy, int64_t token,
                                         const RowDraw& draw) {
  if (rule.kind != RuleKind::kOneHot && rule.log_lenience == INFINITY) return true;
  if (greedy && rule.kind != RuleKind::kOneHot && rule.log_lenience == -INFINITY) return false;
  return draw.best.id == token;
}

// Tests draft token i (i < draft_len) or draws from the bonus row (i == draft_len) of a coupled or
// greedy row; all threads return whether later tokens are still wanted.
template <class Logit>
__device__ bool test_one(const VerifyPrefixArgs& args, const Workspace& workspace, int64_t r,
                         const Draft& draft, const RowSampling& sampling, int64_t i,
                         RowShared& shared, bool& proceed) {
  const RuleParams& rule = args.rule;
  const int64_t row_index = draft.logits_begin + i;
  const DeviceRow<Logit> row(args.logits, row_index, sampling.inv_temperature);
  const bool has_draft = i < draft.draft_len;
  const int64_t token = has_draft ? args.draft_ids[draft.draft_begin + i] : -1;
  const bool known = token >= 0 && token < args.logits.vocab;
  const NoiseKey key(args.keys[r]);
  const int64_t position = (args.positions ? args.positions[r] : 0) + i;
  const float threshold = block_threshold(row, sampling, shared);
  const bool draws = test_draws(rule, sampling);

  RowDraw result;
  if (draws) {
    DrawSpec spec{key, position, sampling.greedy, -1, Best()};
    if (rule.kind == RuleKind::kCoupled && !sampling.greedy && known) {
      // The drafted token competes with its bonus instead of its plain score.
      spec.excluded = static_cast<int32_t>(token);
      const float x = row.at(token);
      if (x >= threshold) {
        spec.start.id = spec.excluded;
        spec.start.score = exact_add(exact_add(x, gumbel(key, position, token)), rule.log_lenience);
      }
    }
    result = block_sum_and_draw<true>(row, threshold, spec, shared);
  } else {
    const DrawSpec none{key, position, false, -1, Best()};
    result = block_sum_and_draw<false>(row, threshold, none, shared);
  }

  if (threadIdx.x == 0) {
    const bool good = valid_sum(result.total);
    if (!good) raise_status(args.status, kStatusBadLogits);
    if (has_draft && !known) raise_status(args.status, kStatusBadTokenId);
    bool accepted = false;
    float logprob = NAN;
    if (has_draft && known && good) {
      const float x = row.at(token);
      logprob = x >= threshold ? logprob_of(x, result.total) : -INFINITY;
      if (draws) {
        accepted = drawn_is_accepted(rule, sampling.greedy, token, result);
      } else {
        const float draft_logprob =
            args.draft_logprobs != nullptr ? args.draft_logprobs[draft.draft_begin + i] : 0.0f;
        if (draft_logprob != draft_logprob) raise_status(args.status, kStatusNanLogprob);
        accepted =
            accept_test(accept_threshold(rule, logprob, draft_logprob), accept_bits(key, position));
      }
    }
    if (accepted) {
      args.logprobs[row_index] = logprob;
    } else {
      if (draws) {
        const bool drawn = good && result.best.id >= 0;
        workspace.next_ids[row_index] = drawn ? result.best.id : 0;
        workspace.next_logprobs[row_index] =
            drawn ? logprob_of(row.at(result.best.id), result.total) : NAN;
      }
      if (has_draft) atomicMin(&workspace.first_rejection[r], static_cast<int32_t>(i));
    }
    proceed = accepted;
  }
  __syncthreads();
  const bool result_proceed = proceed;
  __syncthreads();
  return result_proceed;
}

template <class Logit>
__global__ void __launch_bounds__(kLogitsThreads, 1)
    test_drafts_kernel(const VerifyPrefixArgs args, const int64_t splits) {
  __shared__ RowShared shared;
  __shared__ bool proceed;
  const Workspace workspace = workspace_of(args.workspace, args.logits.num_rows, args.batch);
  const int64_t num_jobs = args.batch * splits;
  for (int64_t job = blockIdx.x; job < num_jobs; job += gridDim.x) {
    const int64_t r = job % args.batch;
    const Draft draft(args, r);
    const RowSampling sampling = checked_sampling(args.sampling, r, args.logits.vocab, args.status);
    // The bonus row is left to the second kernel, except where its draw is made here.
    const int64_t end = test_draws(args.rule, sampling) ? draft.num_logits : draft.draft_len;
    for (int64_t i = job / args.batch; i < end; i += splits) {
      if (threadIdx.x == 0) {
        const volatile int32_t* first = &workspace.first_rejection[r];
        proceed = i < static_cast<int64_t>(*first);
      }
      __syncthreads();
      const bool wanted = proceed;
      __syncthreads();
      if (!wanted) break;
      if (!test_one<Logit>(args, workspace, r, draft, sampling, i, shared, proceed)) break;
    }
  }
}

template <class Logit>
__global__ void __launch_bounds__(kLogitsThreads, 1)
    finish_drafts_kernel(const VerifyPrefixArgs args) {
  __shared__ RowShared shared;
  const Workspace workspace = workspace_of(args.workspace, args.logits.num_rows, args.batch);
  for (int64_t r = blockIdx.x; r < args.batch; r += gridDim.x) {
    const Draft draft(args, r);
    const RowSampling sampling = checked_sampling(args.sampling, r, args.logits.vocab, args.status);
    const int64_t rejection = workspace.first_rejection[r];
    const bool rejected = rejection < draft.draft_len;
    const int64_t accepted = rejected ? rejection : draft.draft_len;
    const bool draws = accepted < draft.num_logits;
    const int64_t row_index = draft.logits_begin + accepted;
    int32_t next = -1;
    float next_logprob = NAN;
    if (draws && test_draws(args.rule, sampling)) {
      next = workspace.next_ids[row_index];
      next_logprob = workspace.next_logprobs[row_index];
    } else if (draws) {
      const DeviceRow<Logit> row(args.logits, row_index, sampling.inv_temperature);
      const int64_t position = (args.positions ? args.positions[r] : 0) + accepted;
      DrawSpec spec{NoiseKey(args.keys[r]), position, false, -1, Best()};
      if (rejected && args.rule.kind == RuleKind::kOneHot) {
        const int64_t token = args.draft_ids[draft.draft_begin + accepted];
        if (token >= 0 && token < args.logits.vocab) spec.excluded = static_cast<int32_t>(token);
      }
      const float threshold = block_threshold(row, sampling, shared);
      const RowDraw draw = block_sum_and_draw<true>(row, threshold, spec, shared);
      const bool good = valid_sum(draw.total) && draw.best.id >= 0;
      if (!good && threadIdx.x == 0) raise_status(args.status, kStatusBadLogits);
      next = good ? draw.best.id : 0;
      next_logprob = good ? logprob_of(row.at(next), draw.total) : NAN;
    }
    if (threadIdx.x == 0) {
      args.accepted_lens[r] = static_cast<int32_t>(accepted);
      args.next_token_ids[r] = next;
      if (draws) args.logprobs[row_index] = next_logprob;
    }
    for (int64_t i = accepted + 1 + threadIdx.x; i < draft.num_logits; i += blockDim.x) {
      args.logprobs[draft.logits_begin + i] = NAN;
    }
  }
}

}  // namespace

int64_t verify_prefix_workspace_bytes(int64_t num_logits_rows, int64_t /*vocab*/, int64_t batch) {
  return 4 * (batch + 2 * num_logits_rows);
}

void verify_prefix(const VerifyPrefixArgs& args, Stream stream) {
  if (args.batch == 0) return;
  const int64_t needed =
      verify_prefix_workspace_bytes(args.logits.num_rows, args.logits.vocab, args.batch);
  if (args.workspace == nullptr || args.workspace_bytes < needed) {
    fail("workspace: expected at least ", needed, " bytes, got ",
         args.workspace == nullptr ? 0 : args.workspace_bytes);
  }
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const int64_t rows = args.logits.num_rows;
  const int processors = num_processors();
  const int threads = logits_threads(args.logits.vocab, rows, processors);
  // Blocks per draft: enough to fill the device where drafts are few; one where they are many, and
  // then no row is read in vain.
  const int64_t resident = static_cast<int64_t>(processors) * (kLogitsThreads / threads);
  const int64_t splits =
      std::clamp<int64_t>(resident / args.batch, 1, std::max<int64_t>(1, rows / args.batch));
  check_cuda(cudaMemsetAsync(args.workspace, kNoRejectionByte,
                             static_cast<size_t>(args.batch) * sizeof(int32_t), cuda_stream),
             "cudaMemsetAsync");
  dispatch_dtype(args.logits.dtype, [&](auto logit) {
    using Logit = decltype(logit);
    test_drafts_kernel<Logit>
        <<<grid_size(args.batch * splits), threads, 0, cuda_stream>>>(args, splits);
    check_launch("verify_prefix: test_drafts");
    const int finish_threads = logits_threads(args.logits.vocab, args.batch, processors);
    finish_drafts_kernel<Logit><<<grid_size(args.batch), finish_threads, 0, cuda_stream>>>(args);
    check_launch("verify_prefix: finish_drafts");
  });
}

}  // namespace spec_rollout::cuda
