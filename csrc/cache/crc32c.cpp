#include "cache/crc32c.h"

#include <algorithm>
#include <array>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#define SPEC_ROLLOUT_CRC_X86
#include <nmmintrin.h>
#elif defined(__aarch64__) && defined(__GNUC__) && \
    (defined(__linux__) || defined(__ARM_FEATURE_CRC32))
#define SPEC_ROLLOUT_CRC_ARM
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#endif

namespace spec_rollout::cache {
namespace {

// Reflected, as all of this is: bit 0 of a word is the highest power.
constexpr uint32_t kPolynomial = 0x82F63B78;

using Table = std::array<uint32_t, 256>;

// kTables[k][b]: the remainder of byte b followed by k bytes of zeros.
constexpr std::array<Table, 8> make_tables() {
  std::array<Table, 8> tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) * kPolynomial);
    tables[0][byte] = crc;
  }
  for (size_t k = 1; k < 8; ++k) {
    for (size_t byte = 0; byte < 256; ++byte) {
      const uint32_t crc = tables[k - 1][byte];
      tables[k][byte] = (crc >> 8) ^ tables[0][crc & 0xff];
    }
  }
  return tables;
}

constexpr std::array<Table, 8> kTables = make_tables();

// Any byte order; compilers make one load of it.
inline uint64_t load_little_endian(const uint8_t* data) {
  uint64_t word = 0;
  for (int i = 0; i < 8; ++i) word |= static_cast<uint64_t>(data[i]) << (8 * i);
  return word;
}

uint32_t crc32c_table(uint32_t crc, const void* data, size_t num_bytes) {
  const auto* bytes = static_cast<const uint8_t*>(data);
  crc = ~crc;
  for (; num_bytes >= 8; num_bytes -= 8, bytes += 8) {
    const uint64_t word = load_little_endian(bytes) ^ crc;
    crc = 0;
    for (int i = 0; i < 8; ++i) crc ^= kTables[7 - i][(word >> (8 * i)) & 0xff];
  }
  for (; num_bytes > 0; --num_bytes, ++bytes) {
    crc = (crc >> 8) ^ kTables[0][(crc ^ *bytes) & 0xff];
  }
  return ~crc;
}

#if defined(SPEC_ROLLOUT_CRC_X86) || defined(SPEC_ROLLOUT_CRC_ARM)

// The instruction gives a result every cycle, but has it ready only after three: three streams go
// side by side, each over a block, and are put together by what a block of zeros does to a
// remainder. That is linear, so it is four table look-ups.
constexpr size_t kLongBlock = 1024, kShortBlock = 128;

struct Zeros {
  std::array<Table, 4> tables;

  explicit Zeros(size_t num_bytes) {
    // Of each bit on its own, then of all sums.
    std::array<uint32_t, 32> of_bit;
    for (int bit = 0; bit < 32; ++bit) {
      uint32_t crc = uint32_t{1} << bit;
      for (size_t i = 0; i < num_bytes; ++i) crc = (crc >> 8) ^ kTables[0][crc & 0xff];
      of_bit[bit] = crc;
    }
    for (int part = 0; part < 4; ++part) {
      for (uint32_t byte = 0; byte < 256; ++byte) {
        uint32_t crc = 0;
        for (int bit = 0; bit < 8; ++bit) {
          if (byte >> bit & 1) crc ^= of_bit[8 * part + bit];
        }
        tables[part][byte] = crc;
      }
    }
  }

  uint32_t after(uint32_t crc) const {
    return tables[0][crc & 0xff] ^ tables[1][crc >> 8 & 0xff] ^ tables[2][crc >> 16 & 0xff] ^
           tables[3][crc >> 24];
  }
};

const Zeros& long_zeros() {
  static const Zeros zeros(kLongBlock);
  return zeros;
}

const Zeros& short_zeros() {
  static const Zeros zeros(kShortBlock);
  return zeros;
}

#if defined(SPEC_ROLLOUT_CRC_X86)
#define SPEC_ROLLOUT_CRC_TARGET __attribute__((target("sse4.2")))
constexpr const char* kInstruction = "sse4.2";

bool has_instruction() { return __builtin_cpu_supports("sse4.2"); }

SPEC_ROLLOUT_CRC_TARGET inline uint32_t step8(uint32_t crc, const uint8_t* data) {
  uint64_t word;
  std::memcpy(&word, data, 8);
  return static_cast<uint32_t>(_mm_crc32_u64(crc, word));
}

SPEC_ROLLOUT_CRC_TARGET inline uint32_t step1(uint32_t crc, uint8_t byte) {
  return _mm_crc32_u8(crc, byte);
}
#else
// In assembly: compilers differ in what they want to be told before they offer the intrinsics.
#define SPEC_ROLLOUT_CRC_TARGET
constexpr const char* kInstruction = "armv8";

bool has_instruction() {
#if defined(__ARM_FEATURE_CRC32)
  return true;
#else
  constexpr unsigned long kHasCrc32 = 1ul << 7;  // HWCAP_CRC32
  return (getauxval(AT_HWCAP) & kHasCrc32) != 0;
#endif
}

inline uint32_t step8(uint32_t crc, const uint8_t* data) {
  const uint64_t word = load_little_endian(data);
  asm(".arch_extension crc\n\tcrc32cx %w0, %w0, %x1" : "+r"(crc) : "r"(word));
  return crc;
}

inline uint32_t step1(uint32_t crc, uint8_t byte) {
  asm(".arch_extension crc\n\tcrc32cb %w0, %w0, %w1" : "+r"(crc) : "r"(uint32_t{byte}));
  return crc;
}
#endif

SPEC_ROLLOUT_CRC_TARGET inline const uint8_t* three_streams(uint32_t& crc, const uint8_t* data,
                                                            size_t block, const Zeros& zeros) {
  uint32_t first = crc, second = 0, third = 0;
  for (const uint8_t* end = data + block; data < end; data += 8) {
    first = step8(first, data);
    second = step8(second, data + block);
    third = step8(third, data + 2 * block);
  }
  crc = zeros.after(zeros.after(first) ^ second) ^ third;
  return data + 2 * block;
}

SPEC_ROLLOUT_CRC_TARGET uint32_t crc32c_instruction(uint32_t crc, const void* data,
                                                    size_t num_bytes) {
  const auto* bytes = static_cast<const uint8_t*>(data);
  const uint8_t* const end = bytes + num_bytes;
  crc = ~crc;
  if (num_bytes >= 3 * kShortBlock) {
    const Zeros &long_block = long_zeros(), &short_block = short_zeros();
    while (static_cast<size_t>(end - bytes) >= 3 * kLongBlock) {
      bytes = three_streams(crc, bytes, kLongBlock, long_block);
    }
    while (static_cast<size_t>(end - bytes) >= 3 * kShortBlock) {
      bytes = three_streams(crc, bytes, kShortBlock, short_block);
    }
  }
  for (; end - bytes >= 8; bytes += 8) crc = step8(crc, bytes);
  for (; bytes < end; ++bytes) crc = step1(crc, *bytes);
  return ~crc;
}

#endif

}  // namespace

const std::vector<Crc32cImpl>& crc32c_available() {
  static const std::vector<Crc32cImpl> available = [] {
    std::vector<Crc32cImpl> found;
#if defined(SPEC_ROLLOUT_CRC_X86) || defined(SPEC_ROLLOUT_CRC_ARM)
    if (has_instruction()) found.push_back({kInstruction, crc32c_instruction});
#endif
    found.push_back({"table", crc32c_table});
    return found;
  }();
  return available;
}

uint32_t crc32c(uint32_t crc, const void* data, size_t num_bytes) {
  static const Crc32c fastest = crc32c_available().front().function;
  return fastest(crc, data, num_bytes);
}

uint32_t crc32c_copy(uint32_t crc, void* target, const void* data, size_t num_bytes) {
  constexpr size_t kPiece = 8192;  // stays in the first cache until it is read again
  const auto* from = static_cast<const uint8_t*>(data);
  auto* to = static_cast<uint8_t*>(target);
  for (size_t done = 0; done < num_bytes; done += kPiece) {
    const size_t size = std::min(kPiece, num_bytes - done);
    std::memcpy(to + done, from + done, size);
    // Of the copy: it is what is used.
    crc = crc32c(crc, to + done, size);
  }
  return crc;
}

}  // namespace spec_rollout::cache
