// Proposals for many rollouts at once, from what their groups generated before and are generating
// now, and how far to trust them.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "spec_rollout/suffix_index.h"

namespace spec_rollout {

// How many of some tests passed; decayed counts.
struct Share {
  double passed = 0.0, tested = 0.0;
};

// How proposed tokens fared, by length of the match they followed. Outlives the drafters of single
// rollout calls, so that what one call learned the next one knows.
class MatchShares {
 public:
  // Matches of this length and longer are one class.
  static constexpr int kMaxMatch = 32;

  MatchShares() : learned_(kMaxMatch + 1) {}

  // Share that passed, drawn towards what is believed before any test.
  Share share(int32_t match) const;
  void observe(int32_t match, bool passed);
  // A call begins: what was learned counts half. A class that is not proposed any more, because it
  // failed, is so believed in again after some calls.
  void age();

 private:
  std::vector<Share> learned_;
};

// One SuffixIndex per group of rollouts (the samples of a prompt). Every live request is a row of
// its group's index.
//
// A token is proposed if it is likely enough to be what will be drawn. The estimate is the share of
// proposals that passed lately, by length of the match, drawn towards the request's own share: text
// that has been repeated for long goes on being repeated, and some requests stray.
class HistoryDrafter {
 public:
  // Nothing from the first of `stop_token_ids` on is proposed: where one is drawn, the request
  // ends.
  HistoryDrafter(int64_t num_groups, const int64_t* groups, int64_t num_requests,
                 std::vector<int32_t> stop_token_ids, std::shared_ptr<MatchShares> shares);

  // Rows of earlier rollouts. All rows of all groups at once, so that groups are built in parallel.
  void add_history(const int32_t* token_ids, const int64_t* cu_lens, const int64_t* groups,
                   int64_t num_rows, int num_threads);
  // What requests generated since the last call, in order.
  void extend(const int64_t* requests, int64_t count, const int32_t* token_ids,
              const int64_t* cu_lens);
  // Proposes for each request tokens that pass with a probability of at least min_probability (of
  // the whole proposal up to there), at most limits[i]. `out` takes limits.sum() tokens; out_lens
  // [count]. Returns the total.
  int64_t propose(const int64_t* requests, const int64_t* limits, int64_t count,
                  double min_probability, int32_t* out, int64_t* out_lens);
  // How many of the tokens proposed last to each of these requests passed.
  void observe(const int64_t* requests, const int64_t* accepted_lens, int64_t count);

  int64_t num_tokens() const;
  int64_t num_bytes() const;
  // Share of tested proposals that passed lately, by length of the match; 0 has none.
  std::vector<double> acceptance() const;

 private:
  struct Request {
    int64_t group, row;
    int32_t match = 0;     // of the last proposal
    int32_t proposed = 0;  // its length
    Share share;
  };

  double probability(int32_t match, const Request& request) const;

  std::vector<SuffixIndex> groups_;
  std::vector<Request> requests_;
  std::shared_ptr<MatchShares> by_match_;
  std::vector<int32_t> stop_token_ids_;
};

}  // namespace spec_rollout
