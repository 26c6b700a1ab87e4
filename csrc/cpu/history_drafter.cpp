#include "spec_rollout/history_drafter.h"

#include <algorithm>
#include <utility>

#include "parallel.h"
#include "spec_rollout/check.h"

namespace spec_rollout {
namespace {

// What is believed before anything was tested, worth as many tests as `tested`: longer matches are
// better ones.
constexpr double kPriorTests = 4.0;
double prior(int match) { return 1.0 - 0.6 / (1.0 + 0.5 * match); }

// Old tests count for less: the policy moves, and a rollout enters and leaves known text.
constexpr double kMatchMemory = 4096.0;  // tests
constexpr double kRequestMemory = 24.0;  // tests
constexpr double kRequestWeight =
    8.0;  // tests of its own after which a request's share counts half

void add_test(Share& share, bool passed, double memory) {
  if (share.tested >= memory) {
    share.passed *= 0.5;
    share.tested *= 0.5;
  }
  share.passed += passed ? 1.0 : 0.0;
  share.tested += 1.0;
}

int32_t match_class(int32_t match) { return std::min<int32_t>(match, MatchShares::kMaxMatch); }

}  // namespace

Share MatchShares::share(int32_t match) const {
  const Share& learned = learned_[match_class(match)];
  return {learned.passed + prior(match_class(match)) * kPriorTests, learned.tested + kPriorTests};
}

void MatchShares::observe(int32_t match, bool passed) {
  add_test(learned_[match_class(match)], passed, kMatchMemory);
}

void MatchShares::age() {
  for (Share& share : learned_) share = {0.5 * share.passed, 0.5 * share.tested};
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

void HistoryDrafter::add_history(const int32_t* token_ids, const int64_t* cu_lens,
                                 const int64_t* groups, int64_t num_rows, int num_threads) {
  std::vector<std::vector<int64_t>> rows(groups_.size());
  for (int64_t r = 0; r < num_rows; ++r) {
    if (groups[r] < 0 || groups[r] >= static_cast<int64_t>(groups_.size())) {
      fail("groups: expected 0 <= group < ", groups_.size(), ", got ", groups[r], " at index ", r);
    }
    rows[groups[r]].push_back(r);
  }
  cpu::parallel_for(static_cast<int64_t>(groups_.size()), 1, num_threads,
                    [&](int64_t begin, int64_t end) {
                      for (int64_t g = begin; g < end; ++g) {
                        for (const int64_t r : rows[g]) {
                          const int64_t row = groups_[g].add_row(cu_lens[r + 1] - cu_lens[r]);
                          for (int64_t i = cu_lens[r]; i < cu_lens[r + 1]; ++i) {
                            groups_[g].append(row, token_ids[i]);
                          }
                        }
                      }
                    });
}

void HistoryDrafter::extend(const int64_t* requests, int64_t count, const int32_t* token_ids,
                            const int64_t* cu_lens) {
  for (int64_t i = 0; i < count; ++i) {
    Request& request = requests_[requests[i]];
    SuffixIndex& group = groups_[request.group];
    if (request.row < 0) request.row = group.add_row(0);
    for (int64_t k = cu_lens[i]; k < cu_lens[i + 1]; ++k) group.append(request.row, token_ids[k]);
  }
}

double HistoryDrafter::probability(int32_t match, const Request& request) const {
  const Share share = by_match_->share(match);
  const double general = share.passed / share.tested;
  return (general * kRequestWeight + request.share.passed) /
         (kRequestWeight + request.share.tested);
}

int64_t HistoryDrafter::propose(const int64_t* requests, const int64_t* limits, int64_t count,
                                double min_probability, int32_t* out, int64_t* out_lens) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) {
    Request& request = requests_[requests[i]];
    request.proposed = 0;
    out_lens[i] = 0;
    if (request.row < 0 || limits[i] <= 0) continue;
    const SuffixIndex& group = groups_[request.group];
    const SuffixIndex::Match match = group.find(request.row);
    request.match = match.len;
    if (match.len == 0) continue;
    // If the first k tokens pass, the match has become k tokens longer.
    double likely = 1.0;
    int64_t wanted = 0;
    while (wanted < limits[i]) {
      likely *= probability(match.len + static_cast<int32_t>(wanted), request);
      if (likely < min_probability) break;
      ++wanted;
    }
    if (wanted == 0) continue;
    int64_t found = group.continuation(match, wanted, out + total);
    if (match.row == request.row && found > 0) {
      // The request repeats itself at this distance: what it says next may be said again, too.
      for (const int64_t period = found; found < wanted; ++found) {
        out[total + found] = out[total + found - period];
      }
    }
    const auto is_stop = [&](int32_t token) {
      return std::find(stop_token_ids_.begin(), stop_token_ids_.end(), token) !=
             stop_token_ids_.end();
    };
    out_lens[i] = std::find_if(out + total, out + total + found, is_stop) - (out + total);
    request.proposed = static_cast<int32_t>(out_lens[i]);
    total += out_lens[i];
  }
  return total;
}

void HistoryDrafter::observe(const int64_t* requests, const int64_t* accepted_lens, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    Request& request = requests_[requests[i]];
    const auto accepted = static_cast<int32_t>(accepted_lens[i]);
    // Tokens after the first that failed were not tested.
    const int32_t tested = std::min(accepted + 1, request.proposed);
    for (int32_t k = 0; k < tested; ++k) {
      by_match_->observe(request.match + k, k < accepted);
      add_test(request.share, k < accepted, kRequestMemory);
    }
    request.proposed = 0;
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

std::vector<double> HistoryDrafter::acceptance() const {
  std::vector<double> shares;
  for (int match = 0; match <= MatchShares::kMaxMatch; ++match) {
    const Share share = by_match_->share(match);
    shares.push_back(share.passed / share.tested);
  }
  return shares;
}

}  // namespace spec_rollout
