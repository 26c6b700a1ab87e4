// A small thread pool: the core must not depend on a framework's, and a second OpenMP runtime
// beside torch's would fight it for the cores.
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
