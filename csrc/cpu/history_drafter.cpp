#include "spec_rollout/history_drafter.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <utility>

#include "parallel.h"
#include "spec_rollout/check.h"
#include "spec_rollout/philox.h"

namespace spec_rollout {
namespace {

// What is believed before anything was tested, worth as many tests as this: longer matches are
// better ones, and the chance is not to be trusted all the way.
constexpr double kPriorTests = 4.0;
double prior(int match, double chance) {
  return (1.0 - 0.6 / (1.0 + 0.5 * match)) * (0.1 + 0.9 * chance);
}

// A follower drawn with an unknown probability is believed to have had its share of the followers
// seen, less something for those that were not.
constexpr float kSeenMass = 0.9f;
constexpr int kMaxFollowers = 12;

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

// Longest match of each class.
constexpr int kClassEnds[] = {1, 2, 3, 4, 5, 6, 8, 11, 15, 21, 31, MatchShares::kMaxMatch};

struct Guess {
  int32_t token = -1;
  int32_t match = 0;
  double chance = 0.0;
};

// The follower most likely to be drawn, and how likely that is. `key` null: without noise.
Guess guess(const SuffixIndex::Follower* followers, int count, const int64_t* key,
            int64_t position) {
  struct Candidate {
    int32_t token, match;
    int seen;
    float sum, weight;  // of known probabilities
  } candidates[kMaxFollowers];
  int num = 0;
  for (int i = 0; i < count; ++i) {
    const SuffixIndex::Follower& f = followers[i];
    // Much shorter matches say little beside a long one.
    if (2 * f.match < followers[0].match) break;
    int c = 0;
    while (c < num && candidates[c].token != f.token) ++c;
    if (c == num) candidates[num++] = {f.token, f.match, 0, 0.0f, 0.0f};
    Candidate& candidate = candidates[c];
    ++candidate.seen;
    if (!std::isnan(f.logprob)) {
      candidate.sum += std::exp(f.logprob);
      candidate.weight += 1.0f;
    }
  }
  float seen = 0.0f, mass = 0.0f;
  for (int c = 0; c < num; ++c) seen += static_cast<float>(candidates[c].seen);
  float p[kMaxFollowers];
  for (int c = 0; c < num; ++c) {
    const Candidate& candidate = candidates[c];
    p[c] = candidate.weight > 0.0f ? candidate.sum / candidate.weight
                                   : kSeenMass * static_cast<float>(candidate.seen) / seen;
    p[c] = std::max(p[c], 1e-6f);
    mass += p[c];
  }
  // Together at most 1; a little is always left for what was never seen.
  const float scale = mass > 0.999f ? 0.999f / mass : 1.0f;
  const float left = 1.0f - scale * mass;
  Guess best;
  float best_score = 0.0f;
  for (int c = 0; c < num; ++c) {
    float score = std::log(scale * p[c]);
    if (key != nullptr) score += gumbel(NoiseKey(*key), position, candidates[c].token);
    if (best.token >= 0 && score <= best_score) continue;
    best = {candidates[c].token, candidates[c].match,
            key != nullptr ? std::exp(-left * std::exp(-score)) : scale * p[c]};
    best_score = score;
  }
  return best;
}

}  // namespace

int MatchShares::cell(int32_t match, double chance) {
  const int row = static_cast<int>(
      std::lower_bound(std::begin(kClassEnds), std::end(kClassEnds) - 1, match) - kClassEnds);
  // Finer towards 1, where long proposals are decided: even steps of the square root of 1 - chance.
  const double left = std::sqrt(std::max(0.0, 1.0 - chance));
  return row * kChances + std::min(static_cast<int>(left * kChances), kChances - 1);
}

// What has not been tested itself is believed to fare as matches of its length do.
double MatchShares::believed(int cell) const {
  const double left = (cell % kChances + 0.5) / kChances;
  const double first = prior(kClassEnds[cell / kChances], 1.0 - left * left);
  const Share& others = classes_[cell / kChances];
  return std::min(1.0, first * (others.passed + kPriorTests) / (others.tested + kPriorTests));
}

Share MatchShares::share(int cell) const {
  return {learned_[cell].passed + believed(cell) * kPriorTests,
          learned_[cell].tested + kPriorTests};
}

void MatchShares::observe(int cell, bool passed) {
  const double left = (cell % kChances + 0.5) / kChances;
  add_test(classes_[cell / kChances], passed, prior(kClassEnds[cell / kChances], 1.0 - left * left),
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
  for (int64_t g = 0; g < num_groups; ++g) groups_.emplace_back(MatchShares::kMaxMatch);
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

void HistoryDrafter::extend(const int64_t* requests, int64_t count, const int32_t* token_ids,
                            const float* logprobs, const int64_t* cu_lens) {
  for (int64_t i = 0; i < count; ++i) {
    Request& request = requests_[requests[i]];
    SuffixIndex& group = groups_[request.group];
    if (request.row < 0) request.row = group.add_row(0);
    for (int64_t k = cu_lens[i]; k < cu_lens[i + 1]; ++k) {
      group.append(request.row, token_ids[k], logprobs == nullptr ? NAN : logprobs[k]);
    }
  }
}

double HistoryDrafter::probability(int cell, const Request& request) const {
  const Share share = by_match_->share(cell);
  const double general = share.passed / share.tested;
  return (general * kRequestWeight + request.share.passed) /
         (kRequestWeight + request.share.tested);
}

int64_t HistoryDrafter::propose(const int64_t* requests, const int64_t* limits, const int64_t* keys,
                                const int64_t* positions, int64_t count, double min_probability,
                                int32_t* out, int64_t* out_lens) {
  constexpr int kMaxContext = MatchShares::kMaxMatch + 1;
  std::vector<int32_t> context;
  SuffixIndex::Follower followers[kMaxFollowers];
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) {
    Request& request = requests_[requests[i]];
    request.proposed.clear();
    out_lens[i] = 0;
    if (request.row < 0 || limits[i] <= 0) continue;
    const SuffixIndex& group = groups_[request.group];
    context.resize(kMaxContext + limits[i]);
    int64_t end = group.context(request.row, context.data());
    double likely = 1.0;
    for (int64_t k = 0; k < limits[i]; ++k) {
      const int found = group.followers(context.data() + end - 1, kMaxFollowers, followers);
      if (found == 0) break;
      const Guess next = guess(followers, found, keys == nullptr ? nullptr : keys + i,
                               positions == nullptr ? 0 : positions[i] + k);
      if (std::find(stop_token_ids_.begin(), stop_token_ids_.end(), next.token) !=
          stop_token_ids_.end()) {
        break;
      }
      const int cell = MatchShares::cell(next.match, next.chance);
      likely *= probability(cell, request);
      if (likely < min_probability) break;
      request.proposed.push_back(static_cast<int16_t>(cell));
      out[total++] = next.token;
      context[end++] = next.token;
    }
    out_lens[i] = static_cast<int64_t>(request.proposed.size());
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

int64_t HistoryDrafter::num_tokens() const {
  int64_t total = 0;
  for (const SuffixIndex& group : groups_) total += group.num_tokens();
  return total;
}

int64_t HistoryDrafter::num_bytes() const {
  int64_t total = static_cast<int64_t>(requests_.capacity() * sizeof(Request));
  for (const SuffixIndex& group : groups_) total += group.num_bytes();
  return total;
}

std::vector<double> HistoryDrafter::acceptance() const { return by_match_->acceptance(); }

}  // namespace spec_rollout
