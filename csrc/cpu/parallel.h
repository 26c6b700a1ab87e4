// Threads for the kernels. The core links no OpenMP, but where the process has a GNU runtime loaded
// (torch's), its threads are used: two sets of threads would fight for the cores. Elsewhere, and in
// forked children, a small pool of its own.
#pragma once

#include <cstdint>
#include <functional>

namespace spec_rollout::cpu {

// Calls body(begin, end) on disjoint ranges covering [0, count), in pieces of about `grain`, on at
// most `num_threads` threads, the caller's included. Pieces are handed out as threads come free, so
// uneven rows balance. The first exception thrown by a piece is rethrown here after all threads
// have stopped.
void parallel_for(int64_t count, int64_t grain, int num_threads,
                  const std::function<void(int64_t, int64_t)>& body);

}  // namespace spec_rollout::cpu
