#include "spec_rollout/suffix_index.h"

#include <algorithm>

#include "spec_rollout/check.h"

namespace spec_rollout {
namespace {

// A walk this long means contexts that random text does not produce; what lies deeper is forgotten.
constexpr int kMaxDepth = 256;

uint32_t hash_token(int32_t token) { return static_cast<uint32_t>(token) * 0x9E3779B1u; }

}  // namespace

SuffixIndex::SuffixIndex(int32_t max_match) : max_match_(max_match), roots_(64) {
  if (max_match < 1) fail("max_match: expected >= 1, got ", max_match);
}

int64_t SuffixIndex::add_row(int64_t capacity) {
  if (num_rows() == kMaxRows) fail("row: expected at most ", kMaxRows, " rows in one index");
  Row& row = rows_.emplace_back();
  const int64_t reserved = std::clamp<int64_t>(capacity, 0, kMaxRowTokens) + 1;
  row.tokens.reserve(reserved);
  row.links.reserve(reserved);
  row.tokens.push_back(kStart);
  row.links.emplace_back();
  return num_rows() - 1;
}

void SuffixIndex::append(int64_t row_number, int32_t token) {
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
  int64_t bytes = static_cast<int64_t>(sizeof(*this) + roots_.capacity() * sizeof(Root) +
                                       rows_.capacity() * sizeof(Row));
  for (const Row& row : rows_) {
    bytes += static_cast<int64_t>(row.tokens.capacity() * sizeof(int32_t) +
                                  row.links.capacity() * sizeof(Links));
  }
  return bytes;
}

SuffixIndex::NodeId SuffixIndex::root_of(int32_t token) const {
  const size_t mask = roots_.size() - 1;
  for (size_t i = hash_token(token) & mask;; i = (i + 1) & mask) {
    if (roots_[i].node == kNone) return kNone;
    if (roots_[i].token == token) return roots_[i].node;
  }
}

SuffixIndex::NodeId* SuffixIndex::root_slot(int32_t token) {
  if (4 * (num_roots_ + 1) > 3 * static_cast<int64_t>(roots_.size())) grow_roots();
  const size_t mask = roots_.size() - 1;
  size_t i = hash_token(token) & mask;
  while (roots_[i].node != kNone && roots_[i].token != token) i = (i + 1) & mask;
  if (roots_[i].node == kNone) {
    roots_[i].token = token;
    ++num_roots_;
  }
  return &roots_[i].node;
}

void SuffixIndex::grow_roots() {
  std::vector<Root> old(roots_.size() * 2);
  old.swap(roots_);
  const size_t mask = roots_.size() - 1;
  for (const Root& root : old) {
    if (root.node == kNone) continue;
    size_t i = hash_token(root.token) & mask;
    while (roots_[i].node != kNone) i = (i + 1) & mask;
    roots_[i] = root;
  }
}

}  // namespace spec_rollout
