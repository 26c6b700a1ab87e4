#include "cache/entry_bytes.h"

#include <algorithm>
#include <cstring>

#include "cache/crc32c.h"
#include "cpu/parallel.h"

namespace spec_rollout::cache {
namespace {

// Rows handed to a thread at a time: some 10 microseconds of work at usual lengths.
constexpr int64_t kGrain = 8;

uint8_t* put_int64(uint8_t* to, int64_t value) {
  for (int i = 0; i < 8; ++i) *to++ = static_cast<uint8_t>(static_cast<uint64_t>(value) >> (8 * i));
  return to;
}

// Copies the first bytes of an array, and goes on with the checksum over all of it.
uint32_t copy_front(uint32_t crc, uint8_t* target, const Bytes& array, int64_t num_bytes) {
  crc = crc32c_copy(crc, target, array.data, static_cast<size_t>(num_bytes));
  return crc32c(crc, array.data + num_bytes, static_cast<size_t>(array.size - num_bytes));
}

bool unpack(const EntryBytes& entry, int64_t start, int64_t len, Array logprobs_from,
            const PackedArrays& out) {
  if (entry.arrays[kTokenIds].data == nullptr) return len == 0;
  if (!entry.readable || !has_equal_lens(entry) || len > entry.num_tokens()) return false;
  const bool has_behaviour = entry.arrays[kBehaviourLogprobs].data != nullptr;
  const Array behaviour_from = has_behaviour ? kBehaviourLogprobs : kLogprobs;
  if (out.logprobs != nullptr && entry.arrays[logprobs_from].data == nullptr) return false;
  if (out.behaviour_logprobs != nullptr && entry.arrays[behaviour_from].data == nullptr) {
    return false;
  }
  uint32_t crc = header_checksum(entry);
  for (int k = 0; k < kNumArrays; ++k) {
    const Bytes& array = entry.arrays[k];
    const int64_t num_bytes = kWidths[k] * len;
    // At most two outputs are made of an array, and these only of float32.
    uint8_t* targets[2] = {};
    int num_targets = 0;
    const auto wanted = [&](uint8_t* output) {
      if (output != nullptr) targets[num_targets++] = output + kWidths[k] * start;
    };
    if (k == kTokenIds) wanted(out.token_ids);
    if (k == logprobs_from) wanted(out.logprobs);
    if (k == behaviour_from) wanted(out.behaviour_logprobs);
    if (k == kAges) wanted(out.ages);
    if (array.data == nullptr) {
      if (k == kAges && num_targets > 0) std::memset(targets[0], 0, static_cast<size_t>(num_bytes));
      continue;
    }
    crc = num_targets > 0 ? copy_front(crc, targets[0], array, num_bytes)
                          : crc32c(crc, array.data, static_cast<size_t>(array.size));
    if (num_targets > 1) std::memcpy(targets[1], targets[0], static_cast<size_t>(num_bytes));
  }
  return crc == entry.checksum;
}

}  // namespace

uint32_t header_checksum(const EntryBytes& entry) {
  uint8_t description[26];
  uint8_t* end = put_int64(description, entry.sample_id);
  end = put_int64(end, entry.policy_version);
  end = put_int64(end, entry.num_tokens());
  *end++ = entry.finish_reason;
  uint8_t present = 0;
  for (int k = kLogprobs; k < kNumArrays; ++k) {
    if (entry.arrays[k].data != nullptr) present |= static_cast<uint8_t>(1 << (k - 1));
  }
  *end++ = present;
  const uint32_t crc = crc32c(0, entry.key.data, static_cast<size_t>(entry.key.size));
  return crc32c(crc, description, sizeof(description));
}

bool has_equal_lens(const EntryBytes& entry) {
  const int64_t num_tokens = entry.num_tokens();
  for (int k = 0; k < kNumArrays; ++k) {
    const Bytes& array = entry.arrays[k];
    const bool optional = k != kTokenIds;
    if (optional && array.data == nullptr) continue;
    if (array.size != kWidths[k] * num_tokens) return false;
  }
  return true;
}

void unpack_entries(const std::vector<EntryBytes>& entries, const std::vector<int64_t>& cu_lens,
                    Array logprobs_from, const PackedArrays& out, uint8_t* sound, int num_threads) {
  const auto count = static_cast<int64_t>(entries.size());
  cpu::parallel_for(count, kGrain, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t start = cu_lens[row], len = cu_lens[row + 1] - start;
      sound[row] = unpack(entries[row], start, len, logprobs_from, out);
    }
  });
}

void pack_entries(std::vector<NewEntry>& entries, int num_threads) {
  const auto count = static_cast<int64_t>(entries.size());
  cpu::parallel_for(count, kGrain, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      NewEntry& entry = entries[row];
      uint32_t crc = header_checksum(entry.source);
      for (int k = 0; k < kNumArrays; ++k) {
        const Bytes& array = entry.source.arrays[k];
        if (array.data == nullptr) continue;
        crc = crc32c_copy(crc, entry.targets[k], array.data, static_cast<size_t>(array.size));
      }
      entry.checksum = crc;
    }
  });
}

}  // namespace spec_rollout::cache
