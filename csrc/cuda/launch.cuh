// What every launcher shares: error checks and grid sizes.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "spec_rollout/check.h"

namespace spec_rollout::cuda {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(concat(what, ": CUDA error ", static_cast<int>(error), " (",
                                    cudaGetErrorString(error), ")"));
  }
}

// Reports what the launch itself got wrong; never waits for the kernel.
inline void check_launch(const char* kernel) { check_cuda(cudaGetLastError(), kernel); }

// Blocks of a one-dimensional grid; larger counts must be looped over by the kernel (grid stride).
inline unsigned grid_size(int64_t blocks) {
  return static_cast<unsigned>(std::clamp<int64_t>(blocks, 1, 0x7fffffff));
}

inline int num_processors() {
  int device = 0, processors = 1;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
             "cudaDeviceGetAttribute");
  return processors;
}

__device__ inline void raise_status(int32_t* status, int32_t bit) {
  if (status != nullptr) atomicOr(status, bit);
}

}  // namespace spec_rollout::cuda
