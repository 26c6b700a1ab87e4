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

// How proposed tokens fared, by the length of the match they followed and by the chance they were
// given. Outlives the drafters of single rollout calls, so that what one call learned the next one
// knows.
class MatchShares {
 public:
  // Matches of this length and longer are one class.
  static constexpr int kMaxMatch = 32;
  static constexpr int kChances = 16;

  MatchShares() : learned_(kNumCells), classes_(kMatchClasses) {}

  // The class of a token proposed after `match` tokens of equal context, of which the samples seen
  // and the noise say that it passes with this chance.
  static int cell(int32_t match, double chance);
  // Share that passed, drawn towards what is believed before any test.
  Share share(int cell) const;
  void observe(int cell, bool passed);
  // Share that passed of every class.
  std::vector<double> acceptance() const;
  // A call begins: what was learned counts half. A class that is not proposed any more, because it
  // failed, is so believed in again after some calls.
  void age();

 private:
  static constexpr int kMatchClasses = 12;
  static constexpr int kNumCells = kMatchClasses * kChances;
  double believed(int cell) const;

  std::vector<Share> learned_;
  // By class of match: tests that passed, and how many would have if prior beliefs were right.
  std::vector<Share> classes_;
};

// One SuffixIndex per group of rollouts (the samples of a prompt). Every live request is a row of
// its group's index.
//
// With keyed noise a token is drawn as argmax(log p + noise), and the noise of every token at every
// position is known before the model has said anything. What followed the same context before, with
// the log-probabilities it was drawn with, is an estimate of p; so of these followers the one is
// proposed that has the largest log p + noise, which is not always the most frequent one: the
// sample is guessed, not the mode. (Drafting with the target's Gumbel noise: Daliri, Musco and
// Suresh, "Coupling without communication and drafter-invariant speculative decoding", 2024.) The
// same comparison says how sure the guess is. If the followers seen have the mass S, the others'
// best is below x with probability exp(-(1 - S) exp(-x)), x = log p + noise of the guess.
//
// A token is proposed if it is likely enough to be what will be drawn. The estimate is the share of
// proposals that passed lately, by length of the match and by the chance above, drawn towards the
// request's own share: text that has been repeated for long goes on being repeated, and some
// requests stray.
class HistoryDrafter {
 public:
  // Nothing from the first of `stop_token_ids` on is proposed: where one is drawn, the request
  // ends.
  HistoryDrafter(int64_t num_groups, const int64_t* groups, int64_t num_requests,
                 std::vector<int32_t> stop_token_ids, std::shared_ptr<MatchShares> shares);

  // Rows of earlier rollouts. All rows of all groups at once, so that groups are built in parallel.
  // `logprobs`, of each token, may be null: not known.
  void add_history(const int32_t* token_ids, const float* logprobs, const int64_t* cu_lens,
                   const int64_t* groups, int64_t num_rows, int num_threads);
  // What requests generated since the last call, in order; `logprobs` as above.
  void extend(const int64_t* requests, int64_t count, const int32_t* token_ids,
              const float* logprobs, const int64_t* cu_lens);
  // Proposes for each request tokens that pass with a probability of at least min_probability (of
  // the whole proposal up to there), at most limits[i]. `keys` and `positions` (of each request's
  // next token) say the noise; null: there is none to count on. `out` takes limits.sum() tokens;
  // out_lens [count]. Returns the total.
  int64_t propose(const int64_t* requests, const int64_t* limits, const int64_t* keys,
                  const int64_t* positions, int64_t count, double min_probability, int32_t* out,
                  int64_t* out_lens);
  // How many of the tokens proposed last to each of these requests passed.
  void observe(const int64_t* requests, const int64_t* accepted_lens, int64_t count);

  int64_t num_tokens() const;
  int64_t num_bytes() const;
  // Share of tested proposals that passed lately, by class.
  std::vector<double> acceptance() const;

 private:
  struct Request {
    int64_t group, row;
    std::vector<int16_t> proposed = {};  // class of each token of the last proposal
    Share share = {};
  };

  double probability(int cell, const Request& request) const;

  std::vector<SuffixIndex> groups_;
  std::vector<Request> requests_;
  std::shared_ptr<MatchShares> by_match_;
  std::vector<int32_t> stop_token_ids_;
};

}  // namespace spec_rollout
