// Which rollouts of each prompt are remembered, within a bound of bytes.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <unordered_map>
#include <vector>

#include "drafting/suffix_index.h"

namespace spec_rollout {

// Names a group of rollouts (the samples of one prompt): a hash, so 128 bits.
struct GroupKey {
  uint64_t high = 0, low = 0;
  bool operator==(const GroupKey& other) const { return high == other.high && low == other.low; }
};

struct GroupKeyHash {
  size_t operator()(const GroupKey& key) const {
    return static_cast<size_t>((key.high ^ key.low) * 0x9E3779B97F4A7C15ull >> 7);
  }
};

// The rollouts of one prompt: rows of an index, live ones and kept ones.
struct Group {
  static constexpr int32_t kNoRow = -1;
  static constexpr int64_t kNoTag = std::numeric_limits<int64_t>::min();

  struct Kept {
    int64_t tag = kNoTag;
    int32_t older = kNoRow, newer = kNoRow;  // rows kept before and after this one
  };

  explicit Group(int32_t max_match) : index(max_match) {}

  SuffixIndex index;
  GroupKey key;
  int64_t num_live = 0;    // requests that joined and have not left
  std::vector<Kept> kept;  // by row
  int32_t oldest = kNoRow, newest = kNoRow;
  int64_t num_kept = 0, kept_bytes = 0;
  int64_t num_displaced = 0;  // rows that made room for others since they were last counted
  int64_t num_visiting = 0;   // rows kept since it last had no live requests
  int64_t num_surplus = 0;  // kept rows, the oldest, which as many newer visits' rows have followed
  int64_t counted_bytes = 0;                               // of it in the total
  Group *less_recent = nullptr, *more_recent = nullptr;    // of groups without live requests
  Group *less_surplus = nullptr, *more_surplus = nullptr;  // of those of them with surplus rows
  bool has_surplus = false;                                // it is one of them

  // A row that is not live, as the newest.
  void keep(int32_t row, int64_t tag);
  void forget_oldest();
  // A new live row. Where the index is full, the oldest kept row makes room.
  int64_t add_row(int64_t capacity);
  int64_t num_bytes() const;
};

// All groups. Rollouts are forgotten when there are too many: a prompt's oldest when these take
// more than `max_group_bytes`; when all take more than `max_bytes`, of prompts without live
// requests first those that a newer visit's have followed, and only then whole prompts, the least
// recently used first: in training that is the one that comes next. What was used last gives first,
// as it is the last to come again. What is live is never forgotten, so it alone can exceed a bound.
class GroupHistory {
 public:
  GroupHistory(int32_t max_match, int64_t max_bytes, int64_t max_group_bytes);

  // A request joins; a group is made where there is none. Thousands of live requests of one prompt
  // are spread over several groups.
  Group* join(GroupKey key);
  // A request leaves. Its row (kNoRow: it has none) is kept or forgotten. A group without rows and
  // requests is gone then.
  void leave(Group* group, int64_t row, bool keep, int64_t tag);
  // After rows were added to or grew in a group: counts its bytes, forgets what is too much.
  void grown(Group* group);
  // The group, if there is one.
  const Group* find(GroupKey key) const;
  // Forgets all but live rows.
  void clear();

  // All groups with kept rows, the least recently used first, those with live requests last.
  std::vector<const Group*> by_use() const;

  int64_t num_groups() const { return static_cast<int64_t>(groups_.size()); }
  int64_t num_bytes() const { return num_bytes_; }
  int64_t num_evicted_groups() const { return num_evicted_groups_; }
  int64_t num_evicted_rows() const { return num_evicted_rows_; }
  // Sums over all groups: takes time by their number.
  int64_t num_kept() const;
  int64_t num_tokens() const;
  // Nodes looked at by insertions and removals, ever.
  int64_t num_visits() const;

 private:
  void use(Group* group);   // it has live requests
  void rest(Group* group);  // it has none any more
  void count(Group* group);
  void erase(Group* group);
  void forget_oldest(Group* group);
  void list_surplus(Group* group);
  void unlist_surplus(Group* group);

  int32_t max_match_;
  int64_t max_bytes_, max_group_bytes_;
  int64_t num_bytes_ = 0, num_evicted_groups_ = 0, num_evicted_rows_ = 0;
  int64_t erased_visits_ = 0;
  std::unordered_map<GroupKey, std::unique_ptr<Group>, GroupKeyHash> groups_;
  Group *least_recent_ = nullptr, *most_recent_ = nullptr;
  Group* most_surplus_ = nullptr;  // the most recently used group with surplus rows
};

}  // namespace spec_rollout
