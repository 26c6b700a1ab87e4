// Checks of packed offsets and lengths, before anything is written.
#pragma once

#include "spec_rollout/check.h"
#include "spec_rollout/tensor_view.h"

namespace spec_rollout::cpu {

// cu[0] = 0, non-decreasing, cu[batch] = total.
inline void check_cu_lens(const char* name, const IntVec& cu, int64_t batch, int64_t total) {
  if (cu[0] != 0) fail(name, ": expected to start at 0, got ", cu[0]);
  for (int64_t r = 0; r < batch; ++r) {
    if (cu[r + 1] < cu[r]) {
      fail(name, ": expected non-decreasing offsets, got ", cu[r], " then ", cu[r + 1],
           " at index ", r + 1);
    }
  }
  if (cu[batch] != total) fail(name, ": expected to end at ", total, ", got ", cu[batch]);
}

inline void check_range(const char* name, const IntVec& values, int64_t count, int64_t low,
                        int64_t high) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t value = values[i];
    if (value < low || value >= high) {
      fail(name, ": expected ", low, " <= value < ", high, ", got ", value, " at index ", i);
    }
  }
}

}  // namespace spec_rollout::cpu
