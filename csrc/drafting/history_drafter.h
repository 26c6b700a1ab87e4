// Proposals for many rollouts at once, from what was generated before and is being generated, and
// how far to trust them.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "drafting/group_history.h"
#include "drafting/match_shares.h"
#include "drafting/ngram_table.h"
#include "drafting/noise.h"
#include "drafting/token_guess.h"
#include "drafting/word_size.h"

namespace spec_rollout {

// One SuffixIndex per group of rollouts (the samples of a prompt). Requests join their group, are
// rows of its index while they generate, and leave; what they generated then stays, within bounds,
// as history of the prompt (group_history.h). An n-gram table of fixed size learns from all of
// them. Time is proportional to the tokens added, and to those forgotten.
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
  struct Options {
    int64_t max_bytes;        // of all groups
    int64_t max_group_bytes;  // of what is kept of one group
    int64_t table_tokens;     // that the n-gram table has room for, more or less
    int64_t max_table_lines = NgramTable::kMaxLines;  // per order
    // Serves for long: what a token says, and how proposals fare, is learned anew now and then.
    // Else it is made for one call: the first is said by `add_history` alone.
    bool is_lasting;
  };

  HistoryDrafter(const Options& options, std::shared_ptr<MatchShares> shares);

  // Whose noise the keys of `propose` are of; Philox if nothing is said.
  void expect_noise(NoiseLaw law) { noise_law_ = law; }

  // A request joins a group. Returns a handle. Nothing from the first of `stop_token_ids` on is
  // proposed: where one is drawn, the request ends. What it generates is kept under `tag` (see
  // `recall`), or kNoTag. Handles of a drafter whose requests never left are 0, 1, 2 ...
  int64_t join(GroupKey group, std::vector<int32_t> stop_token_ids, int64_t tag);
  // The request has ended; its handle is no more. What it generated becomes history, or not.
  void leave(int64_t request, bool keep);

  // Rows of earlier rollouts, as if requests had generated them and left; `tags` may be null. All
  // rows of all groups at once, so that groups are built in parallel. `logprobs`, of each token,
  // may be null: not known.
  void add_history(const int32_t* token_ids, const float* logprobs, const int64_t* cu_lens,
                   const GroupKey* groups, const int64_t* tags, int64_t num_rows, int num_threads);
  // The request's own earlier rollout, made under the same noise: as long as what it generates is
  // the same, the next token is likely to be.
  void follow(int64_t request, const int32_t* token_ids, const float* logprobs, int64_t count);
  // What requests generated since the last call, in order; `logprobs` as above.
  void extend(const int64_t* requests, int64_t count, const int32_t* token_ids,
              const float* logprobs, const int64_t* cu_lens);
  // Proposes for each request tokens that pass with a probability of at least min_probability (of
  // the whole proposal up to there), at most limits[i]. With `favours_longest` that probability is
  // of a request with a mean number of tokens to go; of one with twice as many, half as much is
  // asked. `keys` and `positions` (of each request's next token) say the noise of those that
  // `with_noise` says have any; null: all have. `keys` null: there is none to count on. Together at
  // most `max_total`: the longest are cut, to one token of the likeliest requests if there are more
  // requests than that. `out` takes limits.sum() tokens. out_lens, own_lens and expected [count]:
  // tokens for each, how many of these, the first ones, are its draft's, and how many of them are
  // expected to pass. Returns the total.
  int64_t propose(const int64_t* requests, const int64_t* limits, const int64_t* keys,
                  const int64_t* positions, const bool* with_noise, int64_t count,
                  double min_probability, bool favours_longest, int64_t max_total, int num_threads,
                  int32_t* out, int64_t* out_lens, int64_t* own_lens, float* expected);
  // How many of the tokens proposed last to each of these requests passed.
  void observe(const int64_t* requests, const int64_t* accepted_lens, int64_t count);

  // What a live request has generated: (group, row); null: nothing yet.
  std::pair<const Group*, int64_t> generated(int64_t request) const;
  // The newest kept rollout of a group with this tag: (group, row); null: there is none.
  std::pair<const Group*, int64_t> recall(GroupKey group, int64_t tag) const;
  // Forgets all history, and nothing of live requests but what others may learn from them.
  void clear();

  // Tokens for which a request followed its draft.
  int64_t followed_len(int64_t request) const { return live(request).num_followed; }
  // Whether the request's group has anything to propose from but the request itself.
  bool has_history(int64_t request) const;
  const GroupHistory& history() const { return history_; }
  int64_t table_bytes() const { return table_.num_bytes(); }
  int64_t num_live() const { return num_live_; }
  int64_t num_bytes() const;
  // Tokens learned, and nodes looked at by all lookups, ever.
  int64_t num_learned() const { return num_learned_; }
  int64_t num_lookup_visits() const { return num_lookup_visits_; }
  // Share of tested proposals that passed lately, by class.
  std::vector<double> acceptance() const;

 private:
  // Longest context looked at.
  static constexpr int kMaxMatch = 32;

  struct Request {
    Group* group = nullptr;  // null: a slot that nobody has
    int64_t row = Group::kNoRow;
    int64_t tag = Group::kNoTag;
    uint32_t generation = 0;  // of the slot
    std::vector<int32_t> stop_token_ids = {};
    std::vector<int16_t> proposed = {};  // class of each token of the last proposal
    std::vector<float> passes = {};      // and with which probability it passes
    Share share = {};
    // The draft that it follows; empty once it has left it.
    std::vector<int32_t> draft = {};
    std::vector<float> draft_logprobs = {};
    int64_t num_tokens = 0;    // that it has generated
    int64_t num_followed = 0;  // of these, from the first on those that its draft has too
    int64_t num_visits = 0;    // of its lookups since the last proposal
  };

  struct Noise {
    const int64_t* key;  // null: none
    int64_t position;    // of the next token
  };
  // `context` is room to work in.
  void propose_one(Request& request, int64_t limit, const Noise& noise, double min_probability,
                   std::vector<int32_t>& context, int32_t* out, int64_t* num_own) const;
  double probability(int cell, const Request& request) const;
  // Tokens that a request is expected to generate yet: those of its draft; else as many as rollouts
  // kept of its group did that came as far. 0: there is none.
  double num_left(const Request& request) const;
  // What is asked of each request's proposals.
  std::vector<double> least_probabilities(const int64_t* requests, int64_t count,
                                          double of_mean) const;
  const Request& live(int64_t request) const;
  Request& live(int64_t request) {
    return const_cast<Request&>(std::as_const(*this).live(request));
  }
  void check_live(const int64_t* requests, int64_t count) const;
  void learned(int64_t num_tokens);

  bool is_lasting_;
  NoiseLaw noise_law_ = NoiseLaw::kPhilox;
  GroupHistory history_;
  NgramTable table_;  // of all groups
  WordSize word_size_;
  GroupContexts contexts_;
  std::vector<Request> requests_;
  std::vector<int32_t> free_slots_;
  std::shared_ptr<MatchShares> by_match_;
  int64_t num_live_ = 0, num_learned_ = 0, num_lookup_visits_ = 0;
};

}  // namespace spec_rollout
