// Proposals for many rollouts at once, from what was generated before and is being generated, and
// how far to trust them.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "drafting/ngram_table.h"
#include "drafting/suffix_index.h"
#include "drafting/token_guess.h"

namespace spec_rollout {

// How many of some tests passed; decayed counts.
struct Share {
  double passed = 0.0, tested = 0.0;
};

// How proposed tokens fared, by the context that they had been seen in and by the chance they were
// given. Outlives the drafters of single rollout calls, so that what one call learned the next one
// knows.
class MatchShares {
 public:
  static constexpr int kChances = 16;
  // Instead of a context: the token that the request's own draft has here.
  static constexpr int kOwnDraft = kNumSources;

  MatchShares() : learned_(kNumCells), classes_(kNumSources + 1) {}

  // The class of a token proposed from a source (TokenGuess, or kOwnDraft), of which the samples
  // seen and the noise say that it passes with this chance.
  static int cell(int source, double chance);
  // Share that passed, drawn towards what is believed before any test.
  Share share(int cell) const;
  void observe(int cell, bool passed);
  // Share that passed of every class.
  std::vector<double> acceptance() const;
  // A call begins: what was learned counts half. A class that is not proposed any more, because it
  // failed, is so believed in again after some calls.
  void age();

 private:
  static constexpr int kNumCells = (kNumSources + 1) * kChances;
  double believed(int cell) const;

  std::vector<Share> learned_;
  // By source: tests that passed, and how many would have if prior beliefs were right.
  std::vector<Share> classes_;
};

// One SuffixIndex per group of rollouts (the samples of a prompt). Every live request is a row of
// its group's index.
//
// With keyed noise a token is drawn as argmax(log p + noise), and the noise is known before the
// model has said anything. So what followed the same words before, with the probabilities it was
// drawn with, tells not only what is likely but which of several likely tokens will be drawn: the
// sample is guessed, not the mode (token_guess.h). Drafting with the target's Gumbel noise is due
// to Daliri, Musco and Suresh, "Coupling without communication and drafter-invariant speculative
// decoding", 2024; here the drafter is the history.
//
// A token is proposed if it is likely enough to be what will be drawn. The estimate is the share of
// proposals that passed lately, by the context the token was seen in and by the chance given,
// drawn towards the request's own share: text that has been repeated for long goes on being
// repeated, and some requests stray.
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
  // The request's own earlier rollout, made under the same noise: as long as what it generates is
  // the same, the next token is likely to be.
  void follow(int64_t request, const int32_t* token_ids, const float* logprobs, int64_t count);
  // What requests generated since the last call, in order; `logprobs` as above.
  void extend(const int64_t* requests, int64_t count, const int32_t* token_ids,
              const float* logprobs, const int64_t* cu_lens);
  // Proposes for each request tokens that pass with a probability of at least min_probability (of
  // the whole proposal up to there), at most limits[i]. `keys` and `positions` (of each request's
  // next token) say the noise; null: there is none to count on. `out` takes limits.sum() tokens;
  // Together at most `max_total`: the
  // longest are cut. out_lens and own_lens [count]: tokens for each, and how many of these, the
  // first ones, are its draft's. Returns the total.
  int64_t propose(const int64_t* requests, const int64_t* limits, const int64_t* keys,
                  const int64_t* positions, int64_t count, double min_probability,
                  int64_t max_total, int num_threads, int32_t* out, int64_t* out_lens,
                  int64_t* own_lens);
  // How many of the tokens proposed last to each of these requests passed.
  void observe(const int64_t* requests, const int64_t* accepted_lens, int64_t count);

  // Of each request: tokens for which it followed its draft.
  std::vector<int64_t> followed_lens() const;
  int64_t num_tokens() const;
  int64_t num_bytes() const;
  // Share of tested proposals that passed lately, by class.
  std::vector<double> acceptance() const;

 private:
  // Longest context looked at.
  static constexpr int kMaxMatch = 32;

  struct Request {
    int64_t group, row;
    std::vector<int16_t> proposed = {};  // class of each token of the last proposal
    Share share = {};
    // The draft that it follows; empty once it has left it.
    std::vector<int32_t> draft = {};
    std::vector<float> draft_logprobs = {};
    int64_t num_tokens = 0;    // that it has generated
    int64_t num_followed = 0;  // of these, from the first on those that its draft has too
  };

  struct Noise {
    const int64_t* key;  // null: none
    int64_t position;    // of the next token
  };
  // `context` is room to work in.
  void propose_one(Request& request, int64_t limit, const Noise& noise, double min_probability,
                   std::vector<int32_t>& context, int32_t* out, int64_t* num_own) const;
  double probability(int cell, const Request& request) const;

  std::vector<SuffixIndex> groups_;
  NgramTable table_{0};  // of all groups
  GroupContexts contexts_{6.0};
  std::vector<Request> requests_;
  std::shared_ptr<MatchShares> by_match_;
  std::vector<int32_t> stop_token_ids_;
};

}  // namespace spec_rollout
