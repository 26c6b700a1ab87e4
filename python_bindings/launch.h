// Runs an op's CPU or CUDA implementation once its arguments are read.
#pragma once

#include <stdexcept>

#if defined(SPEC_ROLLOUT_WITH_CUDA)
#include <cuda_runtime.h>
#endif

#include "convert.h"

namespace spec_rollout::python {

#if defined(SPEC_ROLLOUT_WITH_CUDA)
// Makes a GPU the current one; nothing where it is already.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check(cudaGetDevice(&previous_));
    if (device_ != previous_) check(cudaSetDevice(device_));
  }
  ~DeviceGuard() {
    if (device_ != previous_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  static void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
  }
  int device_, previous_ = 0;
};
#endif

// Runs the CPU or the CUDA implementation without the interpreter lock; on CUDA, on the tensors'
// device and torch's current stream there.
template <class Cpu, class Cuda>
void launch(const ArgReader& reader, Cpu cpu, [[maybe_unused]] Cuda cuda) {
  if (reader.on_cpu()) {
    py::gil_scoped_release release;
    return cpu();
  }
#if defined(SPEC_ROLLOUT_WITH_CUDA)
  void* stream = current_stream(reader.device());
  py::gil_scoped_release release;
  const DeviceGuard guard(reader.device());
  cuda(stream);
#else
  throw std::runtime_error(
      "spec_rollout was built without CUDA: install it where an NVIDIA GPU and nvcc are found, or "
      "with SPEC_ROLLOUT_CUDA=ON (spec-rollout doctor says why it has none)");
#endif
}

#if defined(SPEC_ROLLOUT_WITH_CUDA)
#define SPEC_ROLLOUT_CUDA_CALL(call) [&](void* stream) { cuda::call; }
#else
#define SPEC_ROLLOUT_CUDA_CALL(call) [] {}
#endif

inline int32_t* status_word(ArgReader& reader, py::handle status) {
  if (status.is_none()) return nullptr;
  Dim one{"1", 1};
  return static_cast<int32_t*>(reader.tensor(status, "status", {one}, {DType::kInt32}).data);
}

}  // namespace spec_rollout::python
