#include "drafting/suffix_index.h"

#include <algorithm>

#include "spec_rollout/bfloat16_bits.h"
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

int64_t SuffixIndex::add_row(int64_t capacity) {
  if (num_rows() == kMaxRows) fail("row: expected at most ", kMaxRows, " rows in one index");
  Row& row = rows_.emplace_back();
  const int64_t reserved = std::clamp<int64_t>(capacity, 0, kMaxRowTokens) + 1;
  row.tokens.reserve(reserved);
  row.logprobs.reserve(reserved);
  row.links.reserve(reserved);
  row.tokens.push_back(kStart);
  row.logprobs.push_back(0);
  row.links.emplace_back();
  return num_rows() - 1;
}

void SuffixIndex::append(int64_t row_number, int32_t token, float logprob) {
  if (row_number < 0 || row_number >= num_rows()) {
    fail("row: expected 0 <= value < ", num_rows(), ", got ", row_number);
  }
  if (token < 0) fail("token_ids: expected ids >= 0, got ", token);
  Row& row = rows_[row_number];
  if (static_cast<int64_t>(row.tokens.size()) > kMaxRowTokens) {
    fail("token_ids: expected rows of at most ", kMaxRowTokens, " tokens, got more in row ",
         row_number);
  }
  const auto last = static_cast<NodeId>(row.tokens.size() - 1);
  row.tokens.push_back(token);
  row.logprobs.push_back(upper_half(logprob));
  row.links.emplace_back();
  ++num_tokens_;
  // Only now does the position before have something to propose.
  insert(static_cast<NodeId>(row_number) << kOffsetBits | last);
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
  for (int depth = 0; current != kNone && depth < kMaxDepth; ++depth) {
    const int32_t* other = token_at(current);
    const int32_t len = common_context(context, other, std::min(less_len, greater_len));
    Links& links = links_at(current);
    if (len == max_match_) {
      *less = links.less;
      *greater = links.greater;
      links_at(id).older = current;
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
}

SuffixIndex::Match SuffixIndex::find(int64_t row_number) const {
  if (row_number < 0 || row_number >= num_rows()) {
    fail("row: expected 0 <= value < ", num_rows(), ", got ", row_number);
  }
  const Row& row = rows_[row_number];
  const int32_t* context = &row.tokens.back();
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

int SuffixIndex::followers(const int32_t* context, int max_followers, Follower* out) const {
  int count = 0;
  const auto add = [&](NodeId id, int32_t len) {
    if (count == max_followers && (count == 0 || out[count - 1].match >= len)) return false;
    int at = count < max_followers ? count++ : count - 1;
    for (; at > 0 && out[at - 1].match < len; --at) out[at] = out[at - 1];
    const Row& row = rows_[id >> kOffsetBits];
    const uint32_t next = (id & ((1u << kOffsetBits) - 1)) + 1;
    out[at] = {row.tokens[next], len, from_upper_half(row.logprobs[next])};
    return true;
  };
  int32_t less_len = 0, greater_len = 0;
  NodeId current = root_of(*context);
  for (int depth = 0; current != kNone && depth < kMaxDepth; ++depth) {
    const int32_t* other = token_at(current);
    const int32_t len = common_context(context, other, std::min(less_len, greater_len));
    const Links& links = links_at(current);
    NodeId same = current;
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

int64_t SuffixIndex::num_bytes() const {
  int64_t bytes = static_cast<int64_t>(sizeof(*this) + roots_.capacity() * sizeof(NodeId) +
                                       rows_.capacity() * sizeof(Row));
  for (const Row& row : rows_) {
    bytes += static_cast<int64_t>(row.tokens.capacity() * sizeof(int32_t) +
                                  row.logprobs.capacity() * sizeof(uint16_t) +
                                  row.links.capacity() * sizeof(Links));
  }
  return bytes;
}

SuffixIndex::NodeId SuffixIndex::root_of(int32_t token) const {
  const size_t mask = roots_.size() - 1;
  for (size_t i = hash_token(token) & mask;; i = (i + 1) & mask) {
    if (roots_[i] == kNone || *token_at(roots_[i]) == token) return roots_[i];
  }
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
