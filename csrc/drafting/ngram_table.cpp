#include "drafting/ngram_table.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <utility>

#include "spec_rollout/bfloat16_bits.h"

namespace spec_rollout {
namespace {

// The mean probability follows the policy: an old sighting weighs at most this many times a new.
constexpr int kMeanOver = 16;

// One step of a hash over tokens, last token first.
uint64_t mix(uint64_t hash, int32_t token) {
  hash = (hash ^ static_cast<uint32_t>(token)) * 0x9E3779B97F4A7C15ull;
  return hash ^ (hash >> 29);
}

}  // namespace

void NgramTable::Free::operator()(void* memory) const { std::free(memory); }

NgramTable::NgramTable(int64_t num_tokens, int64_t max_lines) : lines_per_order_(kMinLines) {
  while (lines_per_order_ < num_tokens && 2 * lines_per_order_ <= max_lines) lines_per_order_ *= 2;
  clear();
}

void NgramTable::clear() {
  // The system hands out zeroed pages as they are touched, which no aligned allocation promises.
  memory_.reset();
  memory_.reset(std::calloc(static_cast<size_t>(num_bytes()) + alignof(Line), 1));
  if (memory_ == nullptr) throw std::bad_alloc();
  void* start = memory_.get();
  size_t room = static_cast<size_t>(num_bytes()) + alignof(Line);
  lines_ =
      static_cast<Line*>(std::align(alignof(Line), static_cast<size_t>(num_bytes()), start, room));
}

int64_t NgramTable::num_bytes() const {
  return kNumOrders * lines_per_order_ * static_cast<int64_t>(sizeof(Line));
}

NgramTable::Place NgramTable::locate(const int32_t* context) const {
  Place place;
  uint64_t hash = 0;
  for (int order = 0, k = 0; order < kNumOrders; ++order) {
    for (; k < kOrders[order]; ++k) {
      if (k > 0 && context[-(k - 1)] < 0) return place;  // shorter orders say as much
      hash = mix(hash, context[-k]);
    }
    const uint64_t slot = (hash >> 32) & static_cast<uint64_t>(lines_per_order_ - 2);
    Line* pair = lines_ + order * lines_per_order_ + slot;
    __builtin_prefetch(pair);
    __builtin_prefetch(pair + 1);
    place.pair[order] = pair;
    place.tag[order] = static_cast<uint32_t>(hash) | 1u;
    ++place.num;
  }
  return place;
}

void NgramTable::learn(const Place& place, int32_t token, float logprob) {
  const float p = std::exp(logprob);
  for (int order = 0; order < place.num; ++order) learn(order, place, token, p);
}

void NgramTable::learn(int order, const Place& place, int32_t token, float p) {
  if (order >= place.num) return;
  Line* pair = place.pair[order];
  const uint32_t tag = place.tag[order];
  // The context's line, or of its two places the one that is easier to spare.
  Line& line = pair[0].tag == tag   ? pair[0]
               : pair[1].tag == tag ? pair[1]
                                    : pair[pair[0].seen <= pair[1].seen ? 0 : 1];
  if (line.tag != tag) {
    if (line.seen > 1) {  // it stays a while longer
      line.seen = static_cast<uint16_t>(line.seen - 1);
      return;
    }
    line = {};
    line.tag = tag;
  }
  // Counts can run ahead of `seen`, which others that want the place wear down.
  if (line.seen == 0xffff || line.entries[0].count == 0xffff) {
    line.seen /= 2;
    for (int i = 0; i < line.num; ++i) {
      line.entries[i].count = static_cast<uint16_t>((line.entries[i].count + 1) / 2);
    }
  }
  ++line.seen;
  int at = 0;
  while (at < line.num && line.entries[at].token != token) ++at;
  if (at == line.num) {
    if (line.num == kLineTokens) {
      Entry& last = line.entries[--at];
      if (last.count > 1) {
        --last.count;
        return;
      }
    } else {
      ++line.num;
    }
    line.entries[at] = {token, 0, 0};
  }
  Entry& entry = line.entries[at];
  ++entry.count;
  if (!std::isnan(p)) {
    const float mean = from_upper_half(entry.prob);
    const float over = static_cast<float>(std::min<int>(entry.count, kMeanOver));
    entry.prob = upper_half(std::max(entry.prob == 0 ? p : mean + (p - mean) / over, 1e-6f));
  }
  for (; at > 0 && line.entries[at - 1].count < line.entries[at].count; --at) {
    std::swap(line.entries[at - 1], line.entries[at]);
  }
}

int NgramTable::find(const Place& place, const Line** out) const {
  int found = 0;
  for (; found < place.num; ++found) {
    const Line* pair = place.pair[found];
    const uint32_t tag = place.tag[found];
    if (pair[0].tag != tag && pair[1].tag != tag) break;
    out[found] = pair + (pair[0].tag == tag ? 0 : 1);
  }
  return found;
}

}  // namespace spec_rollout
