// CRC-32C (Castagnoli; RFC 3720, appendix B.4): the checksum of cached rollouts. Processors have an
// instruction for it; the value is the same with and without.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace spec_rollout::cache {

// Of `num_bytes` bytes that follow those whose checksum is `crc`; 0 if none do.
using Crc32c = uint32_t (*)(uint32_t crc, const void* data, size_t num_bytes);

struct Crc32cImpl {
  const char* name;
  Crc32c function;
};

// Those that this processor can run, the fastest first; the last one is the table.
const std::vector<Crc32cImpl>& crc32c_available();

// By the first of these.
uint32_t crc32c(uint32_t crc, const void* data, size_t num_bytes);

// The same while the bytes are copied, in one way through memory.
uint32_t crc32c_copy(uint32_t crc, void* target, const void* data, size_t num_bytes);

}  // namespace spec_rollout::cache
