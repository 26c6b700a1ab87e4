// Fresh memory costs a page fault per 4 kB at its first touch, several times what it costs to fill
// it.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace spec_rollout::cpu {

// Asks for 2 MB pages where large outputs are about to be written. A hint: nothing depends on it.
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (address + static_cast<uintptr_t>(bytes)) & ~(kPage - 1);
  if (data != nullptr && begin + kPage <= end) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
}

}  // namespace spec_rollout::cpu
