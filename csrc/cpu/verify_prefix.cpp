#include <limits>

#include "kernels.h"
#include "offsets.h"
#include "parallel.h"
#include "sampling_checks.h"
#include "target_row.h"

namespace spec_rollout::cpu::SPEC_ROLLOUT_ISA {
namespace {

// What the test of one draft token says: kept, or replaced by `next` (-1: still to be drawn).
struct Decision {
  bool accepted;
  int32_t next = -1;
};

// The drafted token is in the argmax with its bonus, everyone else with the plain score.
Decision test_coupled(const TargetRow& target, float log_lenience, int64_t token, NoiseKey key,
                      int64_t position) {
  if (log_lenience == INFINITY) return {true};
  Best drafted;
  if (target.kept(token)) {
    drafted.id = static_cast<int32_t>(token);
    drafted.score = exact_add(target.score(token, key, position), log_lenience);
  }
  const Best best = target.draw(key, position, token, drafted);
  return {best.id == token, best.id};
}

Decision test_token(const VerifyPrefixArgs& args, const TargetRow& target,
                    const RowSampling& sampling, int64_t draft_index, NoiseKey key,
                    int64_t position) {
  const RuleParams& rule = args.rule;
  const int64_t token = args.draft_ids[draft_index];
  if (sampling.greedy) {
    const int32_t top = target.argmax();
    if (rule.kind != RuleKind::kOneHot && std::isinf(rule.log_lenience)) {
      return {rule.log_lenience > 0.0f, top};
    }
    return {top == token, top};
  }
  if (rule.kind == RuleKind::kCoupled) {
    return test_coupled(target, rule.log_lenience, token, key, position);
  }
  const float draft_logprob =
      args.draft_logprobs != nullptr ? args.draft_logprobs[draft_index] : 0.0f;
  if (draft_logprob != draft_logprob) {
    fail("draft_logprobs: expected numbers, got NaN at index ", draft_index);
  }
  const float threshold = accept_threshold(rule, target.logprob(token), draft_logprob);
  if (accept_test(threshold, accept_bits(key, position))) return {true};
  if (rule.kind != RuleKind::kOneHot) return {false};
  const int32_t next = target.draw(key, position, token).id;
  return {next < 0, next};  // no other token can be drawn: rounding kept its probability below 1
}

void verify_row(const VerifyPrefixArgs& args, int64_t r, TargetRow& target) {
  const int64_t draft_begin = args.cu_draft_lens[r];
  const int64_t draft_len = args.cu_draft_lens[r + 1] - draft_begin;
  const int64_t logits_begin = args.cu_logits_lens ? args.cu_logits_lens[r] : draft_begin + r;
  const int64_t num_logits =
      args.cu_logits_lens ? args.cu_logits_lens[r + 1] - logits_begin : draft_len + 1;
  const NoiseKey key(args.keys[r]);
  const int64_t position = args.positions ? args.positions[r] : 0;
  const RowSampling sampling = row_sampling(args.sampling, r, args.logits.vocab);
  float* logprobs = args.logprobs + logits_begin;

  int64_t accepted = 0;
  int32_t next = -1;
  for (; accepted < num_logits; ++accepted) {
    target.load(logits_begin + accepted, sampling);
    if (accepted < draft_len) {
      const int64_t token = draft_begin + accepted;
      const Decision decision = test_token(args, target, sampling, token, key, position + accepted);
      if (decision.accepted) {
        logprobs[accepted] = target.logprob(args.draft_ids[token]);
        continue;
      }
      next = decision.next;
    }
    if (next < 0) {
      next = sampling.greedy ? target.argmax() : target.draw(key, position + accepted).id;
    }
    logprobs[accepted] = target.logprob(next);
    break;
  }
  args.accepted_lens[r] = static_cast<int32_t>(accepted);
  args.next_token_ids[r] = next;
  for (int64_t i = accepted + (next >= 0 ? 1 : 0); i < num_logits; ++i) {
    logprobs[i] = std::numeric_limits<float>::quiet_NaN();
  }
}

void check(const VerifyPrefixArgs& args) {
  const LogitsView& logits = args.logits;
  check_cu_lens("cu_draft_lens", args.cu_draft_lens, args.batch, args.num_draft_tokens);
  if (args.cu_logits_lens) {
    check_cu_lens("cu_logits_lens", args.cu_logits_lens, args.batch, logits.num_rows);
    for (int64_t r = 0; r < args.batch; ++r) {
      const int64_t draft_len = args.cu_draft_lens[r + 1] - args.cu_draft_lens[r];
      const int64_t num_logits = args.cu_logits_lens[r + 1] - args.cu_logits_lens[r];
      if (num_logits != draft_len && num_logits != draft_len + 1) {
        fail("cu_logits_lens: expected ", draft_len, " or ", draft_len + 1, " logits rows for the ",
             draft_len, " draft tokens of row ", r, ", got ", num_logits);
      }
    }
  }
  check_range("draft_ids", args.draft_ids, args.num_draft_tokens, 0, logits.vocab);
  check_sampling(args.sampling, args.batch, logits.vocab);
  if (args.rule.kind == RuleKind::kLenient && std::isfinite(args.rule.log_lenience) &&
      args.draft_logprobs == nullptr && args.num_draft_tokens > 0) {
    fail("draft_logprobs: expected a tensor for this rule, got none");
  }
}

}  // namespace

void verify_prefix(const VerifyPrefixArgs& args, int num_threads) {
  check(args);
  const int64_t work =
      args.logits.vocab * (1 + args.logits.num_rows / std::max<int64_t>(1, args.batch));
  const int64_t grain = 1 + 32768 / (1 + work);
  parallel_for(args.batch, grain, num_threads, [&](int64_t begin, int64_t end) {
    TargetRow target(args.logits);
    for (int64_t r = begin; r < end; ++r) verify_row(args, r, target);
  });
}

}  // namespace spec_rollout::cpu::SPEC_ROLLOUT_ISA
