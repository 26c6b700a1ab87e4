#include "drafting/group_history.h"

#include <algorithm>
#include <utility>

#include "spec_rollout/check.h"

namespace spec_rollout {
namespace {

// Beside what a group holds: its node in the table of groups.
constexpr int64_t kGroupBytes = sizeof(Group) + 8 * sizeof(void*);

// Of a group that has all the live requests it can have.
GroupKey next_of(GroupKey key) { return {key.high * 0x9E3779B97F4A7C15ull + 1, key.low}; }

}  // namespace

void Group::keep(int32_t row, int64_t tag) {
  if (row >= static_cast<int32_t>(kept.size())) kept.resize(row + 1);
  kept[row] = {tag, newest, kNoRow};
  (newest == kNoRow ? oldest : kept[newest].newer) = row;
  newest = row;
  ++num_kept;
  ++num_visiting;
  index.shrink_row(row);
  kept_bytes += index.row_bytes(row);
}

void Group::forget_oldest() {
  const int32_t row = oldest;
  kept_bytes -= index.row_bytes(row);
  oldest = kept[row].newer;
  (oldest == kNoRow ? newest : kept[oldest].older) = kNoRow;
  --num_kept;
  if (num_surplus > 0) --num_surplus;
  index.remove_row(row);
}

int64_t Group::add_row(int64_t capacity) {
  if (index.num_rows() == SuffixIndex::kMaxRows && num_kept > 0) {
    forget_oldest();
    ++num_displaced;  // counted for all groups by one thread: several fill theirs at once
  }
  return index.add_row(capacity);
}

int64_t Group::num_bytes() const {
  return kGroupBytes + index.num_bytes() + static_cast<int64_t>(kept.capacity() * sizeof(Kept));
}

GroupHistory::GroupHistory(int32_t max_match, int64_t max_bytes, int64_t max_group_bytes)
    : max_match_(max_match), max_bytes_(max_bytes), max_group_bytes_(max_group_bytes) {
  if (max_bytes < 0) fail("max_bytes: expected >= 0, got ", max_bytes);
  if (max_group_bytes < 0) fail("max_group_bytes: expected >= 0, got ", max_group_bytes);
}

Group* GroupHistory::join(GroupKey key) {
  for (;; key = next_of(key)) {
    std::unique_ptr<Group>& place = groups_[key];
    if (place == nullptr) {
      place = std::make_unique<Group>(max_match_);
      place->key = key;
    } else if (place->num_live == 0) {
      use(place.get());
    } else if (place->num_live == SuffixIndex::kMaxRows) {
      continue;
    }
    Group* const group = place.get();
    ++group->num_live;
    grown(group);  // it may be new
    return group;
  }
}

void GroupHistory::leave(Group* group, int64_t row, bool keep, int64_t tag) {
  if (row != Group::kNoRow) {
    if (keep && group->index.row_len(row) > 0) {
      group->keep(static_cast<int32_t>(row), tag);
    } else {
      group->index.remove_row(row);
    }
  }
  if (--group->num_live == 0) rest(group);
  grown(group);
}

void GroupHistory::grown(Group* group) {
  num_evicted_rows_ += std::exchange(group->num_displaced, 0);
  while (group->kept_bytes > max_group_bytes_) forget_oldest(group);
  count(group);
  if (group->num_live == 0 && group->num_kept == 0) {
    erase(group);
    group = nullptr;
  }
  while (num_bytes_ > max_bytes_ && most_surplus_ != nullptr) {
    Group* const rested = most_surplus_;
    forget_oldest(rested);
    count(rested);
  }
  while (num_bytes_ > max_bytes_ && least_recent_ != nullptr) {
    if (least_recent_ == group) group = nullptr;
    ++num_evicted_groups_;
    num_evicted_rows_ += least_recent_->num_kept;
    erase(least_recent_);
  }
  // Only groups with live requests are left: what this one does not need for them.
  while (group != nullptr && num_bytes_ > max_bytes_ && group->num_kept > 0) {
    forget_oldest(group);
    count(group);
  }
}

const Group* GroupHistory::find(GroupKey key) const {
  const auto found = groups_.find(key);
  return found == groups_.end() ? nullptr : found->second.get();
}

void GroupHistory::clear() {
  while (least_recent_ != nullptr) erase(least_recent_);
  for (auto& [key, group] : groups_) {
    while (group->num_kept > 0) group->forget_oldest();
    count(group.get());
  }
}

std::vector<const Group*> GroupHistory::by_use() const {
  std::vector<const Group*> groups;
  for (const Group* g = least_recent_; g != nullptr; g = g->more_recent) groups.push_back(g);
  for (const auto& [key, group] : groups_) {
    if (group->num_live > 0 && group->num_kept > 0) groups.push_back(group.get());
  }
  return groups;
}

int64_t GroupHistory::num_kept() const {
  int64_t total = 0;
  for (const auto& [key, group] : groups_) total += group->num_kept;
  return total;
}

int64_t GroupHistory::num_tokens() const {
  int64_t total = 0;
  for (const auto& [key, group] : groups_) total += group->index.num_tokens();
  return total;
}

int64_t GroupHistory::num_visits() const {
  int64_t total = erased_visits_;
  for (const auto& [key, group] : groups_) total += group->index.num_visits();
  return total;
}

void GroupHistory::use(Group* group) {
  (group->less_recent == nullptr ? least_recent_ : group->less_recent->more_recent) =
      group->more_recent;
  (group->more_recent == nullptr ? most_recent_ : group->more_recent->less_recent) =
      group->less_recent;
  group->less_recent = group->more_recent = nullptr;
  if (group->has_surplus) unlist_surplus(group);
}

void GroupHistory::rest(Group* group) {
  group->less_recent = most_recent_;
  (most_recent_ == nullptr ? least_recent_ : most_recent_->more_recent) = group;
  most_recent_ = group;
  const int64_t num_older = std::max<int64_t>(0, group->num_kept - group->num_visiting);
  group->num_surplus = std::min(group->num_surplus + group->num_visiting, num_older);
  group->num_visiting = 0;
  if (group->num_surplus > 0) list_surplus(group);
}

void GroupHistory::list_surplus(Group* group) {
  group->less_surplus = most_surplus_;
  if (most_surplus_ != nullptr) most_surplus_->more_surplus = group;
  most_surplus_ = group;
  group->has_surplus = true;
}

void GroupHistory::unlist_surplus(Group* group) {
  (group->more_surplus == nullptr ? most_surplus_ : group->more_surplus->less_surplus) =
      group->less_surplus;
  if (group->less_surplus != nullptr) group->less_surplus->more_surplus = group->more_surplus;
  group->less_surplus = group->more_surplus = nullptr;
  group->has_surplus = false;
}

void GroupHistory::count(Group* group) {
  const int64_t bytes = group->num_bytes();
  num_bytes_ += bytes - group->counted_bytes;
  group->counted_bytes = bytes;
}

void GroupHistory::erase(Group* group) {
  use(group);
  num_bytes_ -= group->counted_bytes;
  erased_visits_ += group->index.num_visits();
  const GroupKey key = group->key;
  groups_.erase(key);
}

void GroupHistory::forget_oldest(Group* group) {
  group->forget_oldest();
  ++num_evicted_rows_;
  if (group->has_surplus && group->num_surplus == 0) unlist_surplus(group);
}

}  // namespace spec_rollout
