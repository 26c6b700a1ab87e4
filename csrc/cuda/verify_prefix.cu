// One kernel. Block b takes token b / batch of draft b % batch, and then every `splits`-th one
// after it: all drafts' first tokens come before their second ones, and a block leaves its draft as
// soon as an earlier token was rejected, so few rows are read in vain. The last block to leave a
// draft finds the first rejection and the token that follows: drawn by the test itself (coupled and
// greedy rows, bonus rows), or by this block. Which block that is depends on timing; what it finds
// does not.
#include <type_traits>

#include "logits_launch.cuh"
#include "target_row.cuh"

namespace spec_rollout::cuda {
namespace {

constexpr int kNoneByte = 0x7f;  // what the first 2 * batch words of workspace are filled with
constexpr int32_t kNone = 0x7f7f7f7f;    // so this: a rejection after any draft's end
constexpr int64_t kMaxSplits = 1 << 16;  // far below what is left to count from kNone

// Device memory that the blocks of a draft share, found anew at each use: pointers would take
// registers while a row is read.
struct Workspace {
  int32_t* words;
  int64_t batch, num_rows;

  __device__ explicit Workspace(const VerifyPrefixArgs& args)
      : words(static_cast<int32_t*>(args.workspace)),
        batch(args.batch),
        num_rows(args.logits.num_rows) {}
  __device__ int32_t* first_rejection(int64_t r) const { return words + r; }
  // Blocks that are done with the draft, counted from kNone.
  __device__ int32_t* departures(int64_t r) const { return words + batch + r; }
  // What the test drew in place of the draft token of a logits row.
  __device__ int32_t* next_id(int64_t row) const { return words + 2 * batch + row; }
  __device__ float* next_logprob(int64_t row) const {
    return reinterpret_cast<float*>(words + 2 * batch + num_rows + row);
  }
};

// One draft and its logits rows; empty if the offsets are not usable.
struct Draft {
  int64_t draft_begin = 0, logits_begin = 0;
  int32_t draft_len = 0, num_logits = 0;
};

__device__ inline Draft draft_of(const VerifyPrefixArgs& args, int64_t r) {
  const int64_t begin = args.cu_draft_lens[r];
  const int64_t len = args.cu_draft_lens[r + 1] - begin;
  const int64_t row = args.cu_logits_lens ? args.cu_logits_lens[r] : begin + r;
  const int64_t rows = args.cu_logits_lens ? args.cu_logits_lens[r + 1] - row : len + 1;
  const bool first = r == 0, last = r + 1 == args.batch;
  const bool good =
      begin >= 0 && len >= 0 && len < kNone && begin <= args.num_draft_tokens - len && row >= 0 &&
      (rows == len || rows == len + 1) && row <= args.logits.num_rows - rows &&
      (!first || (begin == 0 && row == 0)) &&
      (!last || (begin + len == args.num_draft_tokens && row + rows == args.logits.num_rows));
  if (good) return {begin, row, static_cast<int32_t>(len), static_cast<int32_t>(rows)};
  raise_status(args.status, kStatusBadOffsets);
  return {};
}

// How a row is read: for its sum, with its argmax, or with its argmax under noise.
enum class Read : int32_t { kNone, kSum, kArgmax, kNoise };

// What a block works on. In shared memory, where it takes no registers while a row is read; written
// by thread 0.
struct VerifyShared {
  RowShared row;
  Draft draft;
  RowSampling sampling;
  int64_t index;          // of the draft
  int64_t key, position;  // of its first token
  int32_t turn;           // how many rows of the draft come before this block's next one
  int32_t step;           // place in the draft of the row that is read
  int32_t token;          // the draft token there; -1: none, or not in the vocabulary
  int32_t excluded;       // as in DrawSpec
  bool leaves;            // no later token is wanted from this block
  bool finishes;          // it is the last one, and `step` the accepted length
};

template <class Logit>
__device__ DeviceRow<Logit> row_of(const VerifyPrefixArgs& args, const VerifyShared& shared) {
  return {args.logits, shared.draft.logits_begin + shared.step, shared.sampling.inv_temperature};
}

__device__ inline int32_t draft_token(const VerifyPrefixArgs& args, const VerifyShared& shared) {
  const int64_t token = args.draft_ids[shared.draft.draft_begin + shared.step];
  return token >= 0 && token < args.logits.vocab ? static_cast<int32_t>(token) : -1;
}

// For thread 0: whether this block is the last of `splits` to leave the draft; it sees what the
// others wrote then.
__device__ inline bool is_last(const VerifyPrefixArgs& args, const VerifyShared& shared,
                               int32_t splits) {
  if (splits == 1) return true;
  __threadfence();
  int32_t* departures = Workspace(args).departures(shared.index);
  const bool last = atomicAdd(departures, 1) == kNone + splits - 1;
  __threadfence();
  return last;
}

__device__ inline void write_result(const VerifyPrefixArgs& args, const VerifyShared& shared,
                                    int32_t next_id, float next_logprob) {
  args.accepted_lens[shared.index] = shared.step;
  args.next_token_ids[shared.index] = next_id;
  if (next_id >= 0) args.logprobs[shared.draft.logits_begin + shared.step] = next_logprob;
}

// The row whose turn it is. A bonus row is drawn from, which takes longer than the sum that a
// token's test may need; last of all, it would keep a few blocks busy when all others are done. So
// it comes when half of the draft has been tested: in vain if the other half is not accepted.
template <bool kCoupled>
__device__ inline int32_t step_of(const Draft& draft, int32_t turn) {
  if (kCoupled || draft.num_logits == draft.draft_len) return turn;
  const int32_t bonus_turn = (draft.draft_len + 1) / 2;
  if (turn < bonus_turn) return turn;
  return turn == bonus_turn ? draft.draft_len : turn - 1;
}

// For thread 0: finds the row to read next, and how, or leaves the draft.
template <bool kCoupled>
__device__ Read next_read(const VerifyPrefixArgs& args, VerifyShared& shared, int32_t splits) {
  if (shared.finishes) return Read::kNone;
  const Workspace workspace(args);
  const bool greedy = shared.sampling.greedy;
  const int32_t rejection_so_far =
      *static_cast<const volatile int32_t*>(workspace.first_rejection(shared.index));
  for (; !shared.leaves && shared.turn < shared.draft.num_logits; shared.turn += splits) {
    shared.step = step_of<kCoupled>(shared.draft, shared.turn);
    const bool bonus = shared.step == shared.draft.draft_len;
    if (shared.step >= rejection_so_far) {
      if (bonus) continue;  // tokens before the rejection may follow
      break;
    }
    shared.token = bonus ? -1 : draft_token(args, shared);
    if (!bonus && shared.token < 0) raise_status(args.status, kStatusBadTokenId);
    shared.excluded = kCoupled ? shared.token : -1;
    return greedy ? Read::kArgmax : kCoupled || bonus ? Read::kNoise : Read::kSum;
  }
  if (!is_last(args, shared, splits)) return Read::kNone;
  shared.finishes = true;
  const int32_t rejection = __ldcg(workspace.first_rejection(shared.index));
  const bool rejected = rejection < shared.draft.draft_len;
  shared.step = rejected ? rejection : shared.draft.draft_len;
  if (rejected && !kCoupled && !greedy) {
    shared.token = -1;
    shared.excluded = args.rule.kind == RuleKind::kOneHot ? draft_token(args, shared) : int32_t{-1};
    return Read::kNoise;
  }
  const int64_t row = shared.draft.logits_begin + shared.step;
  const bool drawn = shared.step < shared.draft.num_logits;
  write_result(args, shared, drawn ? __ldcg(workspace.next_id(row)) : -1,
               drawn ? __ldcg(workspace.next_logprob(row)) : NAN);
  return Read::kNone;
}

// The decision on a draft token of a coupled or greedy row, whose draw is `drawn`.
__device__ inline bool drawn_is_accepted(const RuleParams& rule, bool greedy, int32_t token,
                                         int32_t drawn) {
  if (rule.kind != RuleKind::kOneHot && rule.log_lenience == INFINITY) return true;
  if (greedy && rule.kind != RuleKind::kOneHot && rule.log_lenience == -INFINITY) return false;
  return drawn == token;
}

// For thread 0, after a row was read: decides on its draft token and keeps what was drawn.
template <bool kCoupled, class Logit>
__device__ void judge(const VerifyPrefixArgs& args, VerifyShared& shared, int32_t splits, Read read,
                      const RowDraw& result) {
  const DeviceRow<Logit> row = row_of<Logit>(args, shared);
  const int64_t row_index = shared.draft.logits_begin + shared.step;
  const int32_t token = shared.token;
  const bool draws = kCoupled || shared.sampling.greedy;
  const bool good = valid_sum(result.total, row.inv_temperature);
  const bool drawn = good && result.best.id >= 0;
  if (!good || (read != Read::kSum && !drawn)) raise_status(args.status, kStatusBadLogits);
  if (token >= 0 && good) {
    const float x = row.at(token);
    const float logprob = x >= shared.row.search.threshold
                              ? logprob_of(row.raw_at(token), result.total, row.slope())
                              : -INFINITY;
    bool accepted;
    if (draws) {
      accepted = drawn_is_accepted(args.rule, shared.sampling.greedy, token, result.best.id);
    } else {
      const float draft_logprob = args.draft_logprobs != nullptr
                                      ? args.draft_logprobs[shared.draft.draft_begin + shared.step]
                                      : 0.0f;
      if (draft_logprob != draft_logprob) raise_status(args.status, kStatusNanLogprob);
      const uint32_t bits = accept_bits(NoiseKey(shared.key), shared.position + shared.step);
      accepted = accept_test(accept_threshold(args.rule, logprob, draft_logprob), bits);
    }
    if (accepted) {
      args.logprobs[row_index] = logprob;
      shared.turn += splits;
      return;
    }
  }
  // Drawn in place of the draft token, or after all of them, or at the end.
  if (read != Read::kSum) {
    const int32_t next_id = drawn ? result.best.id : 0;
    const float next_logprob =
        drawn ? logprob_of(row.raw_at(next_id), result.total, row.slope()) : NAN;
    if (shared.finishes) return write_result(args, shared, next_id, next_logprob);
    *Workspace(args).next_id(row_index) = next_id;
    *Workspace(args).next_logprob(row_index) = next_logprob;
  }
  if (shared.step == shared.draft.draft_len) {  // the bonus row
    shared.turn += splits;
    return;
  }
  atomicMin(Workspace(args).first_rejection(shared.index), shared.step);
  shared.leaves = true;
}

template <class Logit, bool kCoupled, int kThreads>
__global__ void __launch_bounds__(kThreads, (kDrawBlocks<kThreads>))
    verify_prefix_kernel(const VerifyPrefixArgs args, const int32_t splits) {
  // Bytes, because a shared variable cannot have the initial values of its members.
  __shared__ __align__(16) unsigned char memory[sizeof(VerifyShared)];
  VerifyShared& shared = *reinterpret_cast<VerifyShared*>(memory);
  __shared__ Read next;
  if (threadIdx.x == 0) {
    const int64_t r = blockIdx.x % args.batch;
    shared.draft = draft_of(args, r);
    shared.sampling = checked_sampling(args.sampling, r, args.logits.vocab, args.status);
    shared.index = r;
    shared.key = args.keys[r];
    shared.position = args.positions ? args.positions[r] : 0;
    shared.turn = static_cast<int32_t>(blockIdx.x / args.batch);
    shared.leaves = shared.finishes = false;
  }
  while (true) {
    if (threadIdx.x == 0) next = next_read<kCoupled>(args, shared, splits);
    __syncthreads();
    if (next == Read::kNone) break;
    const DeviceRow<Logit> row = row_of<Logit>(args, shared);
    const float threshold = block_threshold<kThreads>(row, shared.sampling, shared.row);
    const Read read = next;
    RowDraw result;
    if (read == Read::kSum) {
      result = block_sum_and_draw<Draw::kNone, kThreads>(row, threshold, DrawSpec(), shared.row);
    } else if (read == Read::kArgmax) {
      result = block_sum_and_draw<Draw::kArgmax, kThreads>(row, threshold, DrawSpec(), shared.row);
    } else {
      DrawSpec spec{NoiseKey(shared.key), shared.position + shared.step, shared.excluded, Best()};
      if (kCoupled && shared.token >= 0) {
        // The drafted token competes with its bonus instead of its plain score.
        const float x = row.at(shared.token);
        if (x >= threshold) {
          const float noise = gumbel(spec.key, spec.position, shared.token);
          spec.start = {exact_add(exact_add(x, noise), args.rule.log_lenience), shared.token};
        }
      }
      result = block_sum_and_draw<Draw::kNoise, kThreads>(row, threshold, spec, shared.row);
    }
    if (threadIdx.x == 0) judge<kCoupled, Logit>(args, shared, splits, next, result);
  }
  if (!shared.finishes) return;
  for (int32_t i = shared.step + 1 + static_cast<int32_t>(threadIdx.x); i < shared.draft.num_logits;
       i += static_cast<int32_t>(blockDim.x)) {
    args.logprobs[shared.draft.logits_begin + i] = NAN;
  }
}

}  // namespace

int64_t verify_prefix_workspace_bytes(int64_t num_logits_rows, int64_t /*vocab*/, int64_t batch) {
  return 4 * (2 * batch + 2 * num_logits_rows);
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
  check_cuda(cudaMemsetAsync(args.workspace, kNoneByte,
                             2 * static_cast<size_t>(args.batch) * sizeof(int32_t), cuda_stream),
             "cudaMemsetAsync");
  const auto launch = [&](auto logit, auto coupled, auto max_threads) {
    using Logit = decltype(logit);
    constexpr bool kCoupled = decltype(coupled)::value;
    constexpr int kThreads = decltype(max_threads)::value;
    // Rows per block: one where rows are few; where they are many, several, so that blocks that
    // find nothing to do are few, too.
    const int64_t resident = int64_t{processors} * kDrawBlocks<kThreads> * kThreads / threads;
    const int64_t per_block = std::max<int64_t>(1, rows / (8 * resident));
    const int64_t per_draft = (rows + args.batch - 1) / args.batch;
    const auto splits = static_cast<int32_t>(
        std::clamp<int64_t>((per_draft + per_block - 1) / per_block, 1, kMaxSplits));
    const int64_t blocks = args.batch * splits;
    if (blocks > 0x7fffffff) fail("keys: expected less than 2^31 drafts, got ", args.batch);
    verify_prefix_kernel<Logit, kCoupled, kThreads>
        <<<static_cast<unsigned>(blocks), threads, 0, cuda_stream>>>(args, splits);
  };
  dispatch_dtype(args.logits.dtype, [&](auto logit) {
    const auto by_rule = [&](auto max_threads) {
      if (args.rule.kind == RuleKind::kCoupled) {
        launch(logit, std::true_type{}, max_threads);
      } else {
        launch(logit, std::false_type{}, max_threads);
      }
    };
    if (threads > kLogitsThreads / 2) {
      by_rule(std::integral_constant<int, kLogitsThreads>{});
    } else {
      by_rule(std::integral_constant<int, kLogitsThreads / 2>{});
    }
  });
  check_launch("verify_prefix");
}

}  // namespace spec_rollout::cuda
