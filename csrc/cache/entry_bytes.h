// Cached rollouts as bytes: their checksum, and the way between them and packed arrays.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace spec_rollout::cache {

// The arrays of an entry, in the order of its checksum.
enum Array { kTokenIds, kLogprobs, kTrainerLogprobs, kBehaviourLogprobs, kAges, kNumArrays };

// Bytes of a token in each.
constexpr std::array<int64_t, kNumArrays> kWidths = {4, 4, 4, 4, 2};

struct Bytes {
  const uint8_t* data = nullptr;  // null: absent
  int64_t size = 0;
};

// What an entry's checksum covers, and the checksum it came with.
struct EntryBytes {
  Bytes key;
  int64_t sample_id = 0;
  int64_t policy_version = 0;
  int64_t checksum = 0;
  uint8_t finish_reason = 0;
  bool readable = true;  // false: not an entry, or one that no checksum can fit
  std::array<Bytes, kNumArrays> arrays;

  int64_t num_tokens() const { return arrays[kTokenIds].size / kWidths[kTokenIds]; }
};

// Of the key and the description, which the arrays follow: sample id, policy version and number of
// tokens (8 bytes each, little-endian), finish reason and arrays present (a byte each; bit k - 1
// for array k).
uint32_t header_checksum(const EntryBytes& entry);

// Whether every array has as many tokens as the first.
bool has_equal_lens(const EntryBytes& entry);

// Rows of packed arrays. Null: not wanted.
struct PackedArrays {
  uint8_t* token_ids = nullptr;
  uint8_t* logprobs = nullptr;
  uint8_t* behaviour_logprobs = nullptr;
  uint8_t* ages = nullptr;  // of entries without ages: 0
};

// Compares the checksum of every entry and copies it, in one way through memory.
//
// Args:
//   entries: Rows; null is an empty one.
//   cu_lens: Where each row begins in `out`, in tokens, and where the last one ends; a row's
//     length is at most that of its entry.
//   logprobs_from: The array that `out.logprobs` is made of.
//   out: Every entry must have what is wanted of it: `logprobs_from`, and behaviour log-probs or,
//     in their place, log-probs. A row that lacks it is not sound.
//   sound: Whether the checksum fits, of each row; what was written of others means nothing.
void unpack_entries(const std::vector<EntryBytes>& entries, const std::vector<int64_t>& cu_lens,
                    Array logprobs_from, const PackedArrays& out, uint8_t* sound, int num_threads);

// An entry to be made: where its arrays come from, and where their copies go.
struct NewEntry {
  EntryBytes source;
  std::array<uint8_t*, kNumArrays> targets = {};
  uint32_t checksum = 0;  // set here
};

// Copies the arrays of every entry, and computes its checksum on the way.
void pack_entries(std::vector<NewEntry>& entries, int num_threads);

}  // namespace spec_rollout::cache
