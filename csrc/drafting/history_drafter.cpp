#include "drafting/history_drafter.h"

#include <algorithm>
#include <cmath>
#include <unordered_map>
#include <utility>

#include "cpu/parallel.h"
#include "drafting/token_guess.h"
#include "spec_rollout/check.h"
#include "spec_rollout/philox.h"

namespace spec_rollout {
namespace {

// What is believed before anything was tested, worth as many tests as this: longer matches are
// better ones, and the chance is not to be trusted all the way.
constexpr double kPriorTests = 4.0;
double prior(int source, double chance) {
  if (source == MatchShares::kOwnDraft) return 0.5 + 0.5 * chance;
  return (1.0 - 0.6 / (3.0 + source)) * (0.1 + 0.9 * chance);
}

constexpr int kMaxFollowers = 16;

// A draft's token as likely as this is proposed without looking for another.
constexpr double kSure = 0.9;

// Old tests count for less: the policy moves, and a rollout enters and leaves known text.
constexpr double kMatchMemory = 4096.0;  // tests
constexpr double kRequestMemory = 24.0;  // tests
constexpr double kRequestWeight =
    8.0;  // tests of its own after which a request's share counts half

void add_test(Share& share, bool passed, double weight, double memory) {
  if (share.tested >= memory) {
    share.passed *= 0.5;
    share.tested *= 0.5;
  }
  share.passed += passed ? 1.0 : 0.0;
  share.tested += weight;
}

// Entropy of single tokens, in bits, of the first of them.
double entropy(const int32_t* token_ids, int64_t count) {
  count = std::min<int64_t>(count, 1 << 16);
  std::unordered_map<int32_t, int64_t> counts;
  for (int64_t i = 0; i < count; ++i) ++counts[token_ids[i]];
  double bits = 0.0;
  for (const auto& [token, n] : counts) {
    const double p = static_cast<double>(n) / static_cast<double>(count);
    bits -= p * std::log2(p);
  }
  return bits;
}

// The largest c such that values cut to c sum up to at most `total`.
int64_t even_cut(std::vector<int64_t> values, int64_t total) {
  std::sort(values.begin(), values.end());
  auto left = static_cast<int64_t>(values.size());
  for (const int64_t value : values) {
    if (value * left > total) return total / left;
    total -= value;
    --left;
  }
  return values.empty() ? 0 : values.back();
}

}  // namespace

int MatchShares::cell(int source, double chance) {
  // Finer towards 1, where long proposals are decided: even steps of the square root of 1 - chance.
  const double left = std::sqrt(std::max(0.0, 1.0 - chance));
  return source * kChances + std::min(static_cast<int>(left * kChances), kChances - 1);
}

// What has not been tested itself is believed to fare as other tokens of its source do.
double MatchShares::believed(int cell) const {
  const double left = (cell % kChances + 0.5) / kChances;
  const double first = prior(cell / kChances, 1.0 - left * left);
  const Share& others = classes_[cell / kChances];
  return std::min(1.0, first * (others.passed + kPriorTests) / (others.tested + kPriorTests));
}

Share MatchShares::share(int cell) const {
  return {learned_[cell].passed + believed(cell) * kPriorTests,
          learned_[cell].tested + kPriorTests};
}

void MatchShares::observe(int cell, bool passed) {
  const double left = (cell % kChances + 0.5) / kChances;
  add_test(classes_[cell / kChances], passed, prior(cell / kChances, 1.0 - left * left),
           kMatchMemory);
  add_test(learned_[cell], passed, 1.0, kMatchMemory);
}

std::vector<double> MatchShares::acceptance() const {
  std::vector<double> shares;
  for (int cell = 0; cell < kNumCells; ++cell) {
    const Share s = share(cell);
    shares.push_back(s.passed / s.tested);
  }
  return shares;
}

void MatchShares::age() {
  for (std::vector<Share>* shares : {&learned_, &classes_}) {
    for (Share& share : *shares) share = {0.5 * share.passed, 0.5 * share.tested};
  }
}

HistoryDrafter::HistoryDrafter(int64_t num_groups, const int64_t* groups, int64_t num_requests,
                               std::vector<int32_t> stop_token_ids,
                               std::shared_ptr<MatchShares> shares)
    : by_match_(std::move(shares)), stop_token_ids_(std::move(stop_token_ids)) {
  if (num_groups < 0) fail("num_groups: expected >= 0, got ", num_groups);
  groups_.reserve(num_groups);
  for (int64_t g = 0; g < num_groups; ++g) groups_.emplace_back(kMaxMatch);
  requests_.reserve(num_requests);
  for (int64_t i = 0; i < num_requests; ++i) {
    if (groups[i] < 0 || groups[i] >= num_groups) {
      fail("groups: expected 0 <= group < ", num_groups, ", got ", groups[i], " at index ", i);
    }
    // Rows are made when a request first generates, so that history comes first.
    requests_.push_back({groups[i], -1});
  }
  by_match_->age();
}

void HistoryDrafter::add_history(const int32_t* token_ids, const float* logprobs,
                                 const int64_t* cu_lens, const int64_t* groups, int64_t num_rows,
                                 int num_threads) {
  std::vector<std::vector<int64_t>> rows(groups_.size());
  for (int64_t r = 0; r < num_rows; ++r) {
    if (groups[r] < 0 || groups[r] >= static_cast<int64_t>(groups_.size())) {
      fail("groups: expected 0 <= group < ", groups_.size(), ", got ", groups[r], " at index ", r);
    }
    rows[groups[r]].push_back(r);
  }
  // Live rollouts are learned from, too.
  table_ = NgramTable(cu_lens[num_rows] + 256 * static_cast<int64_t>(requests_.size()));
  if (cu_lens[num_rows] > 0) contexts_ = GroupContexts(entropy(token_ids, cu_lens[num_rows]));
  cpu::parallel_for(NgramTable::kNumOrders, 1, num_threads, [&](int64_t begin, int64_t end) {
    int32_t context[NgramTable::kMaxOrder];
    for (int64_t order = begin; order < end; ++order) {
      for (int64_t r = 0; r < num_rows; ++r) {
        const int64_t first = cu_lens[r];
        for (int64_t i = first; i < cu_lens[r + 1]; ++i) {
          const int32_t* last = token_ids + i - 1;
          if (i - first < NgramTable::kMaxOrder) {
            context[0] = SuffixIndex::kStart;
            std::copy(token_ids + first, token_ids + i, context + 1);
            last = context + (i - first);
          }
          table_.learn(static_cast<int>(order), table_.locate(last), token_ids[i],
                       logprobs == nullptr ? NAN : std::exp(logprobs[i]));
        }
      }
    }
  });
  cpu::parallel_for(
      static_cast<int64_t>(groups_.size()), 1, num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t g = begin; g < end; ++g) {
          for (const int64_t r : rows[g]) {
            const int64_t row = groups_[g].add_row(cu_lens[r + 1] - cu_lens[r]);
            for (int64_t i = cu_lens[r]; i < cu_lens[r + 1]; ++i) {
              groups_[g].append(row, token_ids[i], logprobs == nullptr ? NAN : logprobs[i]);
            }
          }
        }
      });
}

void HistoryDrafter::follow(int64_t request, const int32_t* token_ids, const float* logprobs,
                            int64_t count) {
  Request& r = requests_[request];
  r.draft.assign(token_ids, token_ids + count);
  r.draft_logprobs.assign(logprobs, logprobs + count);
}

void HistoryDrafter::extend(const int64_t* requests, int64_t count, const int32_t* token_ids,
                            const float* logprobs, const int64_t* cu_lens) {
  for (int64_t i = 0; i < count; ++i) {
    Request& request = requests_[requests[i]];
    SuffixIndex& group = groups_[request.group];
    if (request.row < 0) request.row = group.add_row(0);
    for (int64_t k = cu_lens[i]; k < cu_lens[i + 1]; ++k) {
      if (request.num_tokens < static_cast<int64_t>(request.draft.size()) &&
          request.draft[request.num_tokens] == token_ids[k]) {
        ++request.num_followed;
      } else {
        request.draft.clear();
      }
      ++request.num_tokens;
      const NgramTable::Place place = table_.locate(group.last(request.row));
      const float logprob = logprobs == nullptr ? NAN : logprobs[k];
      group.append(request.row, token_ids[k], logprob);
      table_.learn(place, token_ids[k], logprob);
    }
  }
}

double HistoryDrafter::probability(int cell, const Request& request) const {
  const Share share = by_match_->share(cell);
  const double general = share.passed / share.tested;
  return (general * kRequestWeight + request.share.passed) /
         (kRequestWeight + request.share.tested);
}

void HistoryDrafter::propose_one(Request& request, int64_t limit, const Noise& noise,
                                 double min_probability, std::vector<int32_t>& context,
                                 int32_t* out, int64_t* num_own) const {
  const SuffixIndex& group = groups_[request.group];
  context.resize(kMaxMatch + 1 + limit);
  int64_t end = group.context(request.row, context.data());
  double likely = 1.0;
  bool is_own = noise.key != nullptr && !request.draft.empty();
  for (int64_t k = 0; k < limit; ++k) {
    int32_t token = -1;
    int cell = 0;
    double passes = 0.0;
    const int64_t at = request.num_tokens + k;
    is_own = is_own && at < static_cast<int64_t>(request.draft.size());
    if (is_own) {
      token = request.draft[at];
      const double logprob = request.draft_logprobs[at];
      const double score = logprob + gumbel(NoiseKey(*noise.key), noise.position + k, token);
      // All other tokens' best is below `score` with this probability.
      cell = MatchShares::cell(MatchShares::kOwnDraft,
                               std::exp(std::expm1(logprob) * std::exp(-score)));
      passes = probability(cell, request);
    }
    if (passes < kSure) {
      const int32_t* last = context.data() + end - 1;
      const NgramTable::Place place = table_.locate(last);
      SuffixIndex::Follower followers[kMaxFollowers];
      const int num_followers = group.followers(last, kMaxFollowers, followers);
      const NgramTable::Line* lines[NgramTable::kNumOrders];
      const int num_lines = table_.find(place, lines);
      const TokenGuess guess = guess_token(followers, num_followers, contexts_, lines, num_lines,
                                           noise.key, noise.position + k);
      if (guess.token >= 0 && guess.token != token) {
        const int other = MatchShares::cell(guess.source, guess.chance);
        const double other_passes = probability(other, request);
        if (other_passes > passes) {
          token = guess.token;
          cell = other;
          passes = other_passes;
          is_own = false;
        }
      }
    }
    if (token < 0 ||
        std::find(stop_token_ids_.begin(), stop_token_ids_.end(), token) != stop_token_ids_.end()) {
      return;
    }
    likely *= passes;
    if (likely < min_probability) return;
    *num_own += is_own;
    request.proposed.push_back(static_cast<int16_t>(cell));
    out[k] = token;
    context[end++] = token;
  }
}

int64_t HistoryDrafter::propose(const int64_t* requests, const int64_t* limits, const int64_t* keys,
                                const int64_t* positions, int64_t count, double min_probability,
                                int64_t max_total, int num_threads, int32_t* out, int64_t* out_lens,
                                int64_t* own_lens) {
  // Every request writes to room of its own first.
  std::vector<int64_t> starts(count + 1, 0);
  for (int64_t i = 0; i < count; ++i) starts[i + 1] = starts[i] + std::max<int64_t>(0, limits[i]);
  cpu::parallel_for(count, 8, num_threads, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> context;
    for (int64_t i = begin; i < end; ++i) {
      Request& request = requests_[requests[i]];
      request.proposed.clear();
      out_lens[i] = own_lens[i] = 0;
      if (request.row < 0 || limits[i] <= 0) continue;
      const Noise noise{keys == nullptr ? nullptr : keys + i, keys == nullptr ? 0 : positions[i]};
      propose_one(request, limits[i], noise, min_probability, context, out + starts[i],
                  own_lens + i);
      out_lens[i] = static_cast<int64_t>(request.proposed.size());
    }
  });
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) {
    std::copy_n(out + starts[i], out_lens[i], out + total);
    total += out_lens[i];
  }
  if (total > max_total) {
    const int64_t cut = even_cut({out_lens, out_lens + count}, max_total);
    const int32_t* from = out;
    int32_t* to = out;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t kept = std::min(out_lens[i], cut);
      std::copy(from, from + kept, to);
      from += out_lens[i];
      to += kept;
      requests_[requests[i]].proposed.resize(kept);
      out_lens[i] = kept;
      own_lens[i] = std::min(own_lens[i], kept);
    }
    total = to - out;
  }
  return total;
}

void HistoryDrafter::observe(const int64_t* requests, const int64_t* accepted_lens, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    Request& request = requests_[requests[i]];
    // Tokens after the first that failed were not tested.
    const auto tested =
        std::min<int64_t>(accepted_lens[i] + 1, static_cast<int64_t>(request.proposed.size()));
    for (int64_t k = 0; k < tested; ++k) {
      by_match_->observe(request.proposed[k], k < accepted_lens[i]);
      add_test(request.share, k < accepted_lens[i], 1.0, kRequestMemory);
    }
    request.proposed.clear();
  }
}

std::vector<int64_t> HistoryDrafter::followed_lens() const {
  std::vector<int64_t> lens;
  for (const Request& request : requests_) lens.push_back(request.num_followed);
  return lens;
}

int64_t HistoryDrafter::num_tokens() const {
  int64_t total = 0;
  for (const SuffixIndex& group : groups_) total += group.num_tokens();
  return total;
}

int64_t HistoryDrafter::num_bytes() const {
  int64_t total = static_cast<int64_t>(requests_.capacity() * sizeof(Request)) + table_.num_bytes();
  for (const SuffixIndex& group : groups_) total += group.num_bytes();
  return total;
}

std::vector<double> HistoryDrafter::acceptance() const { return by_match_->acceptance(); }

}  // namespace spec_rollout
