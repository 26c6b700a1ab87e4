// Longest-suffix matching over the rollouts of one prompt: what followed the last time the text
// went like this?
//
// Every position of every row whose next token is known is a node of a binary search tree, ordered
// by its context read backwards from the position (one tree per last token). A node is inserted as
// the root of its tree, which is split on the way down, as in the match finder of LZMA: the newest
// nodes stay on top, so of several longest matches the most recently added is found, and both
// insertion and search are one walk. Contexts that agree on `max_match` tokens are one node, the
// newer, from which a list leads to the older ones: a looping model costs no depth.
//
// A row can be removed again: each of its nodes is looked up and unlinked, and the trees below it
// are merged with the newer nodes on top, which takes about as long as inserting it did.
//
// Memory: 4 bytes for the token, 4 for its log-probability, 12 for the three links.
#pragma once

#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

namespace spec_rollout {

class SuffixIndex {
 public:
  static constexpr int64_t kMaxRows = 1 << 12;
  static constexpr int64_t kMaxRowTokens = (1 << 20) - 2;

  struct Match {
    int32_t len =
        0;  // tokens of context that agree, the start of a row counting as one; 0: no match
    int32_t row = -1;     // where the matching context ends
    int32_t offset = -1;  // its last token; the proposal begins at the next
  };

  // A token that followed such a context once.
  struct Follower {
    int32_t token = -1;
    int32_t match = 0;  // tokens of context that agree, as in Match
    float logprob = 0;  // with which it was drawn then; NaN: not known
  };

  explicit SuffixIndex(int32_t max_match);

  // A new, empty row; `capacity` tokens are reserved. Returns its number: that of a removed row if
  // there is one.
  int64_t add_row(int64_t capacity);
  void append(int64_t row, int32_t token, float logprob = NAN);
  // Forgets a row; its number may be used again.
  void remove_row(int64_t row);
  // Gives back memory that was reserved for more tokens of the row.
  void shrink_row(int64_t row);
  // Longest suffix of the row that occurs before a known token, in any row. At most max_match long.
  Match find(int64_t row) const;
  // Tokens that followed the match: writes at most max_tokens, returns how many.
  int64_t continuation(const Match& match, int64_t max_tokens, int32_t* out) const;

  // What followed the contexts that agree longest with one ending at `context` (max_match tokens
  // back, or to a kStart before), the longest first and of these the newest first.
  // `visits`, if not null: nodes looked at are added to it.
  int followers(const int32_t* context, int max_followers, Follower* out,
                int64_t* visits = nullptr) const;
  // The last tokens of a row, at most max_match, after a kStart if the row has no more. Returns how
  // many were written; `out` takes max_match + 1.
  int64_t context(int64_t row, int32_t* out) const;

  // The last token of a row; tokens before it follow downwards, to a kStart.
  const int32_t* last(int64_t row) const { return &rows_[row].tokens.back(); }

  // The tokens of a row and their log-probs.
  int64_t row_len(int64_t row) const { return static_cast<int64_t>(rows_[row].tokens.size()) - 1; }
  const int32_t* row_tokens(int64_t row) const { return rows_[row].tokens.data() + 1; }
  const float* row_logprobs(int64_t row) const { return rows_[row].logprobs.data() + 1; }
  // Memory that the row alone takes.
  int64_t row_bytes(int64_t row) const;

  int64_t num_rows() const { return static_cast<int64_t>(rows_.size() - free_rows_.size()); }
  int64_t num_tokens() const { return num_tokens_; }
  int64_t num_bytes() const;
  // Nodes looked at by all insertions and removals so far.
  int64_t num_visits() const { return num_visits_; }

  static constexpr int32_t kStart = -1;  // first "token" of every row

 private:
  using NodeId = uint32_t;  // row << 20 | offset
  static constexpr NodeId kNone = 0xffffffffu;
  static constexpr int kOffsetBits = 20;

  struct Links {
    NodeId less = kNone, greater = kNone;
    NodeId older = kNone;  // with the same context
  };
  struct Row {
    std::vector<int32_t> tokens;
    std::vector<float> logprobs;
    std::vector<Links> links;
    int64_t began = 0, ended = 0;  // of all tokens ever appended here: those before its first, last
  };
  static constexpr int64_t kTokenBytes = sizeof(int32_t) + sizeof(float) + sizeof(Links);
  const int32_t* token_at(NodeId id) const {
    return rows_[id >> kOffsetBits].tokens.data() + (id & ((1u << kOffsetBits) - 1));
  }
  Links& links_at(NodeId id) {
    return rows_[id >> kOffsetBits].links[id & ((1u << kOffsetBits) - 1)];
  }
  const Links& links_at(NodeId id) const {
    return rows_[id >> kOffsetBits].links[id & ((1u << kOffsetBits) - 1)];
  }
  int32_t common_context(const int32_t* a, const int32_t* b, int32_t from) const;
  const Row& checked_row(int64_t row) const;
  Row& checked_row(int64_t row) { return const_cast<Row&>(std::as_const(*this).checked_row(row)); }
  void reserve(Row& row, int64_t capacity);
  void insert(NodeId id);
  void unlink(NodeId id);
  void merge(NodeId less, NodeId greater, NodeId* out);
  int64_t time_of(NodeId id) const;
  NodeId* root_slot(int32_t token);
  NodeId root_of(int32_t token) const;
  NodeId* find_root(int32_t token);  // null: there is none
  void forget_root(NodeId* slot);
  void grow_roots();

  int32_t max_match_;
  int64_t num_tokens_ = 0;
  int64_t num_appended_ = 0;
  int64_t num_visits_ = 0;
  int64_t row_room_ = 0;  // tokens that rows have room for, all together
  std::vector<Row> rows_;
  std::vector<int32_t> free_rows_;  // removed
  std::vector<NodeId> roots_;       // open addressing by last token; a power of two
  int64_t num_roots_ = 0;
};

}  // namespace spec_rollout
