#include "drafting/suffix_index.h"

#include <algorithm>

#include "spec_rollout/check.h"

namespace spec_rollout {
namespace {

// A walk this long means contexts that random text does not produce; what lies deeper is forgotten.
constexpr int kMaxDepth = 256;

// Of equal contexts, so many are looked at.
constexpr int kMaxOlder = 8;

uint32_t hash_token(int32_t token) { return static_cast<uint32_t>(token) * 0x9E3779B1u; }

}  // namespace

SuffixIndex::SuffixIndex(int32_t max_match) : max_match_(max_match), roots_(64, kNone) {
  if (max_match < 1) fail("max_match: expected >= 1, got ", max_match);
}

void SuffixIndex::reserve(Row& row, int64_t capacity) {
  row_room_ += capacity - static_cast<int64_t>(row.tokens.capacity());
  row.tokens.reserve(capacity);
  row.logprobs.reserve(capacity);
  row.links.reserve(capacity);
}

int64_t SuffixIndex::add_row(int64_t capacity) {
  if (num_rows() == kMaxRows) fail("row: expected at most ", kMaxRows, " rows in one index");
  int64_t number = static_cast<int64_t>(rows_.size());
  if (free_rows_.empty()) {
    rows_.emplace_back();
  } else {
    number = free_rows_.back();
    free_rows_.pop_back();
  }
  Row& row = rows_[number];
  reserve(row, std::clamp<int64_t>(capacity, 0, kMaxRowTokens) + 1);
  row.tokens.push_back(kStart);
  row.logprobs.push_back(0);
  row.links.emplace_back();
  row.began = row.ended = num_appended_;
  return number;
}

const SuffixIndex::Row& SuffixIndex::checked_row(int64_t row) const {
  const auto count = static_cast<int64_t>(rows_.size());
  if (row < 0 || row >= count) fail("row: expected 0 <= value < ", count, ", got ", row);
  if (rows_[row].tokens.empty()) fail("row: expected one that is there, got removed row ", row);
  return rows_[row];
}

void SuffixIndex::append(int64_t row_number, int32_t token, float logprob) {
  Row& row = checked_row(row_number);
  if (token < 0) fail("token_ids: expected ids >= 0, got ", token);
  const size_t size = row.tokens.size();
  if (static_cast<int64_t>(size) > kMaxRowTokens) {
    fail("token_ids: expected rows of at most ", kMaxRowTokens, " tokens, got more in row ",
         row_number);
  }
  if (size == row.tokens.capacity()) reserve(row, 2 * static_cast<int64_t>(size));
  row.tokens.push_back(token);
  row.logprobs.push_back(logprob);
  row.links.emplace_back();
  ++num_tokens_;
  row.ended = num_appended_++;
  // Only now does the position before have something to propose.
  insert(static_cast<NodeId>(row_number) << kOffsetBits | static_cast<NodeId>(size - 1));
}

void SuffixIndex::remove_row(int64_t row_number) {
  Row& row = checked_row(row_number);
  const auto len = static_cast<NodeId>(row.tokens.size() - 1);
  // The last one first: of equal contexts the newest stand in front.
  for (NodeId offset = len; offset-- > 0;) {
    unlink(static_cast<NodeId>(row_number) << kOffsetBits | offset);
  }
  num_tokens_ -= len;
  row_room_ -= static_cast<int64_t>(row.tokens.capacity());
  row = {};
  free_rows_.push_back(static_cast<int32_t>(row_number));
}

void SuffixIndex::shrink_row(int64_t row_number) {
  Row& row = checked_row(row_number);
  row_room_ -= static_cast<int64_t>(row.tokens.capacity());
  row.tokens.shrink_to_fit();
  row.logprobs.shrink_to_fit();
  row.links.shrink_to_fit();
  row_room_ += static_cast<int64_t>(row.tokens.capacity());
}

// Number of equal tokens going back from a and b, `from` of which are known to be equal; at most
// max_match. Both reach the start of their rows at the same time only if all of the context is
// equal, which counts as max_match.
int32_t SuffixIndex::common_context(const int32_t* a, const int32_t* b, int32_t from) const {
  for (int32_t k = from; k < max_match_; ++k) {
    if (a[-k] != b[-k]) return k;
    if (a[-k] == kStart) return max_match_;
  }
  return max_match_;
}

void SuffixIndex::insert(NodeId id) {
  const int32_t* context = token_at(id);
  NodeId* root = root_slot(*context);
  NodeId current = *root;
  *root = id;
  NodeId* less = &links_at(id).less;        // where the next node below the new one goes
  NodeId* greater = &links_at(id).greater;  // and the next one above it
  int32_t less_len = 0, greater_len = 0;    // context shared with the bounds found so far
  int depth = 0;
  for (; current != kNone && depth < kMaxDepth; ++depth) {
    const int32_t* other = token_at(current);
    const int32_t len = common_context(context, other, std::min(less_len, greater_len));
    Links& links = links_at(current);
    if (len == max_match_) {
      *less = links.less;
      *greater = links.greater;
      links_at(id).older = current;
      num_visits_ += depth + 1;
      return;
    }
    if (other[-len] < context[-len]) {
      *less = current;
      less = &links.greater;
      current = links.greater;
      less_len = len;
    } else {
      *greater = current;
      greater = &links.less;
      current = links.less;
      greater_len = len;
    }
  }
  *less = kNone;
  *greater = kNone;
  num_visits_ += depth;
}

// Which of two nodes is the newer, roughly: rows that grew at the same time are taken to have grown
// evenly. It decides which stays on top, never what is found.
int64_t SuffixIndex::time_of(NodeId id) const {
  const Row& row = rows_[id >> kOffsetBits];
  const auto len = static_cast<int64_t>(row.tokens.size());
  return row.began + (row.ended - row.began) * (id & ((1u << kOffsetBits) - 1)) / len;
}

// One tree of two, all contexts of one being less than all of the other's.
void SuffixIndex::merge(NodeId less, NodeId greater, NodeId* out) {
  for (int depth = 0; less != kNone && greater != kNone && depth < kMaxDepth; ++depth) {
    ++num_visits_;
    if (time_of(less) > time_of(greater)) {
      *out = less;
      out = &links_at(less).greater;
      less = *out;
    } else {
      *out = greater;
      out = &links_at(greater).less;
      greater = *out;
    }
  }
  *out = less != kNone ? less : greater;
}

// Afterwards no walk meets the node. Nothing to do if it was forgotten before.
void SuffixIndex::unlink(NodeId id) {
  const int32_t* context = token_at(id);
  NodeId* const root = find_root(*context);
  if (root == nullptr) return;
  NodeId* link = root;
  int32_t less_len = 0, greater_len = 0;
  for (int depth = 0;; ++depth) {
    if (*link == kNone) return;
    if (depth == kMaxDepth) {  // where nobody looks
      *link = kNone;
      return;
    }
    ++num_visits_;
    const int32_t* other = token_at(*link);
    const int32_t len = common_context(context, other, std::min(less_len, greater_len));
    if (len == max_match_) break;
    Links& links = links_at(*link);
    if (other[-len] < context[-len]) {
      less_len = len;
      link = &links.greater;
    } else {
      greater_len = len;
      link = &links.less;
    }
  }
  const NodeId first = *link;
  Links& links = links_at(first);
  if (first == id) {
    if (links.older == kNone) {
      merge(links.less, links.greater, link);
      if (*root == kNone) forget_root(root);
    } else {
      *link = links.older;
      links_at(*link).less = links.less;
      links_at(*link).greater = links.greater;
    }
    return;
  }
  // One of those with the same context. What `followers` does not look at is forgotten.
  NodeId* older = &links.older;
  for (int i = 1; *older != kNone; ++i, older = &links_at(*older).older) {
    if (i == kMaxOlder) {
      *older = kNone;
      return;
    }
    ++num_visits_;
    if (*older == id) {
      *older = links_at(id).older;
      return;
    }
  }
}

SuffixIndex::Match SuffixIndex::find(int64_t row_number) const {
  const int32_t* context = &checked_row(row_number).tokens.back();
  Match best;
  int32_t less_len = 0, greater_len = 0;
  NodeId current = root_of(*context);
  for (int depth = 0; current != kNone && depth < kMaxDepth; ++depth) {
    const int32_t* other = token_at(current);
    const int32_t len = common_context(context, other, std::min(less_len, greater_len));
    if (len > best.len) {
      best.len = len;
      best.row = static_cast<int32_t>(current >> kOffsetBits);
      best.offset = static_cast<int32_t>(current & ((1u << kOffsetBits) - 1));
    }
    if (len == max_match_) break;
    if (other[-len] < context[-len]) {
      less_len = len;
      current = links_at(current).greater;
    } else {
      greater_len = len;
      current = links_at(current).less;
    }
  }
  return best;
}

int SuffixIndex::followers(const int32_t* context, int max_followers, Follower* out,
                           int64_t* visits) const {
  int count = 0;
  int64_t looked_at = 0;
  const auto add = [&](NodeId id, int32_t len) {
    if (count == max_followers && (count == 0 || out[count - 1].match >= len)) return false;
    int at = count < max_followers ? count++ : count - 1;
    for (; at > 0 && out[at - 1].match < len; --at) out[at] = out[at - 1];
    const Row& row = rows_[id >> kOffsetBits];
    const uint32_t next = (id & ((1u << kOffsetBits) - 1)) + 1;
    out[at] = {row.tokens[next], len, row.logprobs[next]};
    return true;
  };
  int32_t less_len = 0, greater_len = 0;
  NodeId current = root_of(*context);
  for (int depth = 0; current != kNone && depth < kMaxDepth; ++depth) {
    const int32_t* other = token_at(current);
    const int32_t len = common_context(context, other, std::min(less_len, greater_len));
    const Links& links = links_at(current);
    NodeId same = current;
    ++looked_at;
    for (int i = 0; same != kNone && i < kMaxOlder && add(same, len); ++i) {
      same = links_at(same).older;
    }
    if (len == max_match_) break;
    if (other[-len] < context[-len]) {
      less_len = len;
      current = links.greater;
    } else {
      greater_len = len;
      current = links.less;
    }
  }
  if (visits != nullptr) *visits += looked_at;
  return count;
}

int64_t SuffixIndex::context(int64_t row_number, int32_t* out) const {
  const std::vector<int32_t>& tokens = rows_[row_number].tokens;
  const int64_t count = std::min<int64_t>(static_cast<int64_t>(tokens.size()), max_match_ + 1);
  std::copy_n(tokens.end() - count, count, out);
  return count;
}

int64_t SuffixIndex::continuation(const Match& match, int64_t max_tokens, int32_t* out) const {
  if (match.len == 0) return 0;
  const Row& row = rows_[match.row];
  const int64_t begin = match.offset + 1;
  const int64_t count =
      std::clamp<int64_t>(static_cast<int64_t>(row.tokens.size()) - begin, 0, max_tokens);
  std::copy_n(row.tokens.data() + begin, count, out);
  return count;
}

int64_t SuffixIndex::row_bytes(int64_t row) const {
  return static_cast<int64_t>(sizeof(Row) + rows_[row].tokens.capacity() * kTokenBytes);
}

int64_t SuffixIndex::num_bytes() const {
  return row_room_ * kTokenBytes +
         static_cast<int64_t>(sizeof(*this) + roots_.capacity() * sizeof(NodeId) +
                              rows_.capacity() * sizeof(Row) +
                              free_rows_.capacity() * sizeof(int32_t));
}

SuffixIndex::NodeId SuffixIndex::root_of(int32_t token) const {
  const size_t mask = roots_.size() - 1;
  for (size_t i = hash_token(token) & mask;; i = (i + 1) & mask) {
    if (roots_[i] == kNone || *token_at(roots_[i]) == token) return roots_[i];
  }
}

SuffixIndex::NodeId* SuffixIndex::find_root(int32_t token) {
  const size_t mask = roots_.size() - 1;
  for (size_t i = hash_token(token) & mask; roots_[i] != kNone; i = (i + 1) & mask) {
    if (*token_at(roots_[i]) == token) return &roots_[i];
  }
  return nullptr;
}

// Empties a slot. Roots after it that were put there because it was taken move up.
void SuffixIndex::forget_root(NodeId* slot) {
  const size_t mask = roots_.size() - 1;
  auto hole = static_cast<size_t>(slot - roots_.data());
  for (size_t i = (hole + 1) & mask; roots_[i] != kNone; i = (i + 1) & mask) {
    const size_t wanted = hash_token(*token_at(roots_[i])) & mask;
    if (((i - wanted) & mask) < ((i - hole) & mask)) continue;  // it would come to stand too early
    roots_[hole] = roots_[i];
    hole = i;
  }
  roots_[hole] = kNone;
  --num_roots_;
}

SuffixIndex::NodeId* SuffixIndex::root_slot(int32_t token) {
  if (4 * (num_roots_ + 1) > 3 * static_cast<int64_t>(roots_.size())) grow_roots();
  const size_t mask = roots_.size() - 1;
  size_t i = hash_token(token) & mask;
  while (roots_[i] != kNone && *token_at(roots_[i]) != token) i = (i + 1) & mask;
  if (roots_[i] == kNone) ++num_roots_;
  return &roots_[i];
}

void SuffixIndex::grow_roots() {
  std::vector<NodeId> old(roots_.size() * 2, kNone);
  old.swap(roots_);
  const size_t mask = roots_.size() - 1;
  for (const NodeId root : old) {
    if (root == kNone) continue;
    size_t i = hash_token(*token_at(root)) & mask;
    while (roots_[i] != kNone) i = (i + 1) & mask;
    roots_[i] = root;
  }
}

}  // namespace spec_rollout
